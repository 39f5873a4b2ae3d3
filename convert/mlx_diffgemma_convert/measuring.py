"""`measure` on the terminal: the table, the mixed recipe, the plot."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_diffgemma.chart import WIDTH, Axis, Chart, decade_axis
from mlx_diffgemma.checkpoint.quantization import Format
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma_convert.plan_table import size_text
from mlx_diffgemma_convert.settings import Measurement

if TYPE_CHECKING:
    from mlx_diffgemma_convert.budget import Choice
    from mlx_diffgemma_convert.measure import Measured
    from mlx_diffgemma_convert.probes import Task

_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def run_measure(
    source: str, converted: Sequence[str], measurement: Measurement, *, as_json: bool = False
) -> None:
    """Measure the models that are named, and find a mixed recipe where a budget is given.

    Raises:
        UsageError: options contradict each other, or the budget is too small.
    """
    if not converted and measurement.budget is None:
        raise UsageError("name converted models to compare with the source, or give --budget.")
    if measurement.plot and not converted:
        raise UsageError("--plot draws converted models; name some.")
    if measurement.save and measurement.budget is None:
        raise UsageError("--save is about the recipe that --budget finds; give --budget.")
    budget = None if measurement.budget is None else parse_size(measurement.budget)
    seed, count = measurement.seed, measurement.count
    most = max(count, measurement.generate)
    from mlx_diffgemma_convert.probes import read_tasks

    tasks = read_tasks(measurement.prompts, most)
    report: dict[str, Any] = {}
    if converted:
        from mlx_diffgemma_convert.measure import measure

        lines = []
        to_generate = tasks[: measurement.generate]
        for line in measure(source, converted, tasks[:count], to_generate, seed):
            _say(f"measured {line.name}")
            lines.append(line)
        report["models"] = [line.as_dict() for line in lines]
        if measurement.plot:
            _plot(measurement.plot, lines)
    if budget is not None:
        choice, rules = find_recipe(source, tasks[:count], budget, seed)
        name = f"mixed-{measurement.budget}"
        if measurement.save:
            from mlx_diffgemma_convert.budget import save_recipe

            save_recipe(measurement.save, name, rules)
        report["recipe"] = {
            "name": name, "rules": rules, "bytes": choice.nbytes,
            "expected_kl": choice.expected_kl,
        }  # fmt: skip
    if as_json:
        print(json.dumps(report, indent=2))
        return
    if converted:
        print(table(lines))
    if budget is not None:
        print(
            f"{report['recipe']['name']}: {size_text(choice.nbytes)}, expected divergence "
            f"{choice.expected_kl:.2e}"
        )
        print("\n".join(f"  {rule}" for rule in rules))


def find_recipe(
    source: str, tasks: Sequence[Task], budget: int, seed: int
) -> tuple[Choice, list[str]]:
    """The mixed recipe that a greedy choice finds within `budget` bytes, and its rules.

    Raises:
        UsageError: the source is quantized, or the budget is too small.
    """
    from mlx_diffgemma.checkpoint.locate import locate
    from mlx_diffgemma.generation import load
    from mlx_diffgemma_convert.budget import choose, groups_of, rules_of, sensitivities
    from mlx_diffgemma_convert.measure import reference_of
    from mlx_diffgemma_convert.source import FolderSource

    model, tokenizer = load(source)
    groups = groups_of(model)
    stored = FolderSource(locate(source)).tensors.values()
    whole = sum(tensor.nbytes for tensor in stored)
    fixed = int(whole - sum(group.nbytes(Format("none")) for group in groups))
    with reference_of(model, tokenizer, tasks, seed) as reference:
        costs = sensitivities(model, groups, reference, _say)
    choice = choose(groups, costs, fixed, budget)
    return choice, rules_of(choice)


def parse_size(text: str) -> int:
    """The number of bytes in a size such as `14GB` or `1.4MB`.

    Raises:
        UsageError: `text` is no size.
    """
    for unit, factor in _UNITS.items():
        if text.endswith(unit):
            try:
                return int(float(text.removesuffix(unit)) * factor)
            except ValueError:
                break
    raise UsageError(f"'{text}' is no size; write it as 14GB or 1.4MB.")


def table(lines: Sequence[Measured]) -> str:
    """The report as a table in Markdown, for a terminal and for a README alike."""
    from mlx_diffgemma_convert.probes import LEVELS

    levels = " | ".join(f"KL {level}" for level in LEVELS)
    head = (
        f"| model | size | bits per weight | {levels} | with self-conditioning | flips | "
        "steps per canvas | exact |"
    )
    rows = [head, "|" + "---|" * head.count(" |")]
    for line in lines:
        name = Path(line.name).name
        cells = [name, size_text(line.nbytes), f"{line.bits_per_weight:.2f}"]
        if line.divergence is None:
            cells += ["0"] * (len(LEVELS) + 2)
        else:
            cells += [f"{kl:.2e}" for kl in line.divergence.kl]
            conditioned = line.divergence.kl_conditioned
            cells.append(f"{sum(conditioned) / len(conditioned):.2e}")
            cells.append(f"{line.divergence.flips:.2%}")
        cells.append(f"{line.steps_per_canvas:.2f}")
        cells.append("" if line.exact is None else f"{line.exact:.1%}")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _plot(path: Path, lines: Sequence[Measured]) -> None:
    points = [
        Point(Path(line.name).name, line.bits_per_weight, line.divergence.mean)
        for line in lines
        if line.divergence is not None and line.divergence.mean > 0
    ]
    write_plot(path, points)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


@dataclass(frozen=True)
class Point:
    """A model: its bits per weight and its mean divergence in nats."""

    name: str
    bits: float
    kl: float


def write_plot(path: Path, points: Sequence[Point]) -> None:
    """Draw the points, divergence on a logarithmic scale.

    Raises:
        UsageError: there is nothing to draw.
    """
    if not points:
        raise UsageError(
            "--plot has nothing to draw, as no model diverges from its source; drop it."
        )
    low = floor(min(p.bits for p in points))
    high = max(ceil(max(p.bits for p in points)), low + 1)
    bits = Axis("bits per weight", low, high, tuple((n, str(n)) for n in range(low, high + 1)))
    logs = [log10(p.kl) for p in points]
    chart = Chart(bits, decade_axis("KL divergence from the source, nats", min(logs), max(logs)))
    labels: list[tuple[float, float]] = []
    for point, log in zip(points, logs, strict=True):
        px, py = chart.x(point.bits), chart.y(log)
        anchor, shift = ("end", -8) if px > WIDTH * 0.8 else ("start", 8)
        label = next(
            (py + dy for dy in (-6, 18, -22, 34, -38, 50) if _free(labels, px, py + dy)), py - 6
        )
        labels.append((px, label))
        chart.dot(point.bits, log, "#0b6bcb")
        chart.text(px + shift, label, point.name, anchor)
    chart.write(path)


def _free(labels: Sequence[tuple[float, float]], x: float, y: float) -> bool:
    """Whether a label at (x, y) would lie on none of `labels`."""
    return all(abs(x - other_x) > 90 or abs(y - other_y) > 14 for other_x, other_y in labels)

"""Variants of one thing: prepared, timed in turns, and each compared with another of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mlx_diffgemma.bench.counting import Cost
from mlx_diffgemma.bench.device import Device
from mlx_diffgemma.bench.timing import alternate, milliseconds, peak_bytes
from mlx_diffgemma.checkpoint.memory import available_memory, size_text
from mlx_diffgemma.errors import DiffGemmaError

_SLOWEST = 4  # factor from the least time of all products to a guess of the whole time
_NONE = Cost()


@dataclass(frozen=True)
class Variant:
    """Something to time.

    Attributes:
        name: what the table calls it.
        make: prepares it, and gives what runs it once.
        baselines: names of other variants of its part that it is compared with.
        share: what the time of a run is divided by, such as the canvases in it.
        cost: cost of the products of a run.
        setup: cost of the products of preparing it.
        needs: bytes beside the weights that it may take; 0 where that is little.
    """

    name: str
    make: Callable[[], Callable[[], object]]
    baselines: tuple[str, ...] = ()
    share: int = 1
    cost: Cost = _NONE
    setup: Cost = _NONE
    needs: int = 0


@dataclass(frozen=True)
class Line:
    """A variant beside one that it is compared with.

    Attributes:
        part: name of what the variant is a form of.
        name: name of the variant.
        seconds: median of a share of a run; None where nothing was timed.
        baseline: name of the variant that the ratio is to; None where there is none.
        ratio: `seconds` over those of the baseline; None where either is missing.
        beside: most bytes held beside the weights; None where nothing was run.
        note: why nothing was timed.
    """

    part: str
    name: str
    seconds: float | None
    baseline: str | None
    ratio: float | None
    beside: int | None
    note: str = ""


def measure(part: str, variants: Sequence[Variant], repeats: int) -> list[Line]:
    """Prepare each variant, see what memory it takes, and time all of them in turns."""
    runs: dict[str, Callable[[], object]] = {}
    beside: dict[str, int] = {}
    notes: dict[str, str] = {}
    for variant in variants:
        mx.synchronize()
        mx.clear_cache()
        room = available_memory()
        if room is not None and variant.needs > room:
            notes[variant.name] = (
                f"left out: it may take {size_text(variant.needs)}, and {size_text(room)} are free"
            )
            continue
        before = mx.get_active_memory()
        try:
            run = variant.make()
            run()  # what is compiled is compiled now
            beside[variant.name] = peak_bytes(partial(_to_the_end, run)) - before
        except (RuntimeError, DiffGemmaError) as error:
            notes[variant.name] = "failed: " + next(iter(str(error).splitlines()), "no reason")
        else:
            runs[variant.name] = run
    times = alternate(runs, repeats, warmup=0)
    shares = {variant.name: variant.share for variant in variants}
    medians = {name: median(taken) / shares[name] for name, taken in times.items()}
    return [
        Line(
            part,
            variant.name,
            medians.get(variant.name),
            baseline,
            _ratio(medians.get(variant.name), medians.get(baseline or "")),
            beside.get(variant.name),
            notes.get(variant.name, ""),
        )
        for variant in variants
        for baseline in variant.baselines or (None,)
    ]


def _to_the_end(run: Callable[[], object]) -> None:
    run()
    mx.synchronize()


def _ratio(seconds: float | None, of: float | None) -> float | None:
    return None if seconds is None or of is None else seconds / of


def guessed_seconds(
    variants: Sequence[Variant], device: Device, repeats: int
) -> tuple[float, float]:
    """Least and most seconds that measuring is guessed to take: what the products take at the
    device's best, and a multiple of it with some seconds for each variant, as MLX compiles it."""
    runs = repeats + 2  # one to warm up, one to look at the memory
    least = sum(
        runs * device.floor(variant.cost) + device.floor(variant.setup) for variant in variants
    )
    return least, _SLOWEST * least + 2.0 * len(variants) + 30.0


def as_table(report: Mapping[str, Any]) -> Group:
    """The lines of a report, and under them why some have no time."""
    table = Table(title=f"{report['device']}, mlx {report['mlx']}", title_justify="left")
    for head in ("part", "what", "ms", "ratio", "to", "MB"):
        table.add_column(head, justify="right" if head in ("ms", "ratio", "MB") else "left")
    lines, notes = report["lines"], []
    for place, line in enumerate(lines):
        seconds, ratio, beside = line["seconds"], line["ratio"], line["beside"]
        table.add_row(
            line["part"] if place == 0 or lines[place - 1]["part"] != line["part"] else "",
            line["name"],
            "–" if seconds is None else milliseconds(seconds),
            "–" if ratio is None else f"{ratio:.3f}",
            line["baseline"] or "",
            "–" if beside is None else f"{beside / 1e6:.0f}",
            end_section=place + 1 == len(lines) or lines[place + 1]["part"] != line["part"],
        )
        if line["note"]:
            notes.append(f"{line['part']}, {line['name']}: {line['note']}")
    return Group(table, *map(Text, dict.fromkeys(notes)))

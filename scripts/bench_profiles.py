"""What does each profile, rule, sampler and cap cost in exact answers, on the demo's tasks?

    python scripts/bench_profiles.py --count 1000 --openblas /usr/lib/.../libopenblas.so.0
    python scripts/bench_profiles.py --count 1000 --only profile     # or rule, sampler, cap
    python scripts/bench_profiles.py --only rule --task two --task bare --jobs 16
    python scripts/bench_profiles.py --rules RULES.json              # {"name": {settings}}

Inputs and noise are fresh: made from `--seed`, the same for all. Every batch is written to
`OUT/profiles.jsonl` as it is answered, and a second run goes on where the first one stopped; what
it has is always in `OUT/profiles.md` (tables), `OUT/steps.svg` (exact answers over the cap on
steps) and `OUT/rules.svg` (exact answers over passes).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import cycle
from math import log10
from pathlib import Path
from typing import Any, NamedTuple

from mlx_diffgemma.bench.openblas import load_openblas
from mlx_diffgemma.chart import Axis, Chart, decade_axis, linear_axis

_SEEDS = 1_000_000  # batches of one seed begin at numbers below this
CAPS = (48, 32, 16, 8, 4, 2)
HEADS = (
    "| {} | task | inputs | exact | steps a canvas | passes a canvas | tokens a forward |\n"
    "|---|---|---|---|---|---|---|"
)
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#9a6700", "#57606a")
TITLES = {"one": "one puzzle", "two": "two puzzles"}


def settings() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Group, name and settings of everything to compare."""
    from mlx_diffgemma.diffusion.config import SAMPLERS
    from mlx_diffgemma.diffusion.profiles import PROFILES, profile_settings
    from mlx_diffgemma.tune.candidates import CANDIDATES

    for name in PROFILES:
        yield "profile", name, profile_settings(name)
    for name, rule in CANDIDATES.items():
        yield "rule", name, dict(rule)
    for name in SAMPLERS:
        yield "sampler", name, {"sampler": name}
    for cap in CAPS:
        yield "cap", str(cap), {"max_denoising_steps": cap}


class Ledger:
    """The marks of every batch, in a file that a later run reads again."""

    def __init__(self, path: Path) -> None:
        from exercises.exam import Marks

        self.path = path
        self.batches: dict[str, Marks] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                self.batches[entry["key"]] = Marks(**entry["marks"])

    def add(self, key: str, marks: Any) -> None:
        self.batches[key] = marks
        with self.path.open("a") as file:
            print(json.dumps({"key": key, "marks": asdict(marks)}), file=file)


class Batch(NamedTuple):
    """Some inputs of a task under some settings; equal settings are measured only once."""

    key: str
    task: str
    start: int
    stop: int
    given: Mapping[str, Any]


class Desk:
    """A model that answers batches; each process has one."""

    def __init__(self, args: argparse.Namespace) -> None:
        if args.openblas:
            load_openblas(args.openblas)
        from exercises import exam
        from mlx_diffgemma import load

        self.args = args
        self.inputs = exam.make_tasks(args.count, args.seed, args.task)
        self.model, self.tokenizer = load(args.model, adapter_path=args.adapter_path)

    def batches(self, given: Mapping[str, Any]) -> Iterator[Batch]:
        """The batches of a rule. A profile that has changed is measured anew: a key holds what
        differs from the checkpoint's settings."""
        from mlx_diffgemma.fitting import diffusion_config

        args, shipped = self.args, asdict(diffusion_config(self.model))
        config = asdict(diffusion_config(self.model, **given))
        changed = {name: value for name, value in config.items() if value != shipped[name]}
        model = args.model if args.adapter_path is None else f"{args.model} {args.adapter_path}"
        for task in args.task:
            for start in range(0, args.count, args.batch):
                stop = min(start + args.batch, args.count)
                key = json.dumps([model, args.seed, task, start, stop, changed], sort_keys=True)
                yield Batch(key, task, start, stop, given)

    def answer(self, batch: Batch) -> tuple[Batch, Any]:
        from exercises import exam
        from mlx_diffgemma.fitting import diffusion_config

        part = self.inputs[batch.task][batch.start : batch.stop]
        config = diffusion_config(self.model, **batch.given)
        prompts = [exercise.prompt for exercise in part]
        seed = self.args.seed * _SEEDS + batch.start  # another seed is another noise too
        answers = exam.answer(self.model, self.tokenizer, config, prompts, seed)
        return batch, exam.mark(answers, part)


desk: Desk


def _sit_down(args: argparse.Namespace) -> None:
    global desk
    desk = Desk(args)


def _answer(batch: Batch) -> tuple[Batch, Any]:
    return desk.answer(batch)


def row(name: str, task: str, marks: Any) -> str:
    return (
        f"| {name} | {task} | {marks.count} | {marks.rate:.3f} ± {marks.standard_error:.3f} "
        f"| {marks.steps_per_canvas:.2f} | {marks.passes_per_canvas:.2f} "
        f"| {marks.tokens_per_forward:.1f} |"
    )


def curve(points: Mapping[str, list[tuple[int, Any]]]) -> Chart:
    """The exact rate over the cap on steps, one line a task; bars are two standard errors."""
    places = {cap: place for place, cap in enumerate(sorted(CAPS))}
    across = Axis(
        "most steps a canvas",
        -0.5,
        len(CAPS) - 0.5,
        tuple((place, str(cap)) for cap, place in places.items()),
    )
    chart = Chart(across, linear_axis("exact answers", 0.0, 1.0))
    for colour, marks in zip(cycle(COLOURS), points.values(), strict=False):
        at = [(places[cap], m) for cap, m in sorted(marks, key=lambda pair: pair[0])]
        chart.line([(place, m.rate) for place, m in at], colour)
        for place, m in at:
            _dot(chart, place, m, colour)
    chart.legend([(TITLES.get(task, task), c) for c, task in zip(cycle(COLOURS), points)])
    return chart


def cloud(results: Mapping[tuple[str, str, str], Any], reference: str) -> Chart:
    """The exact rate over passes a canvas: a dot for each rule, one colour a task, with
    bars of two standard errors; lines mark the reference's rate."""
    shown = {key: marks for key, marks in results.items() if key[0] != "cap"}
    most = max(marks.passes_per_canvas for marks in shown.values())
    chart = Chart(
        decade_axis("passes a canvas, of decoder and encoder", 0.0, log10(most)),
        linear_axis("exact answers", 0.0, 1.0),
    )
    tasks = list(dict.fromkeys(task for _, _, task in shown))
    colours = dict(zip(tasks, cycle(COLOURS), strict=False))
    for (_, name, task), marks in shown.items():
        across = log10(marks.passes_per_canvas)
        _dot(chart, across, marks, colours[task])
        if name == reference:
            chart.line([(0.0, marks.rate), (across, marks.rate)], colours[task])
            chart.text(chart.x(across) + 8, chart.y(marks.rate) + 4, reference)
    chart.legend([(TITLES.get(task, task), colour) for task, colour in colours.items()])
    return chart


def _dot(chart: Chart, across: float, marks: Any, colour: str) -> None:
    low, high = (marks.rate + sign * 2 * marks.standard_error for sign in (-1, 1))
    chart.line([(across, max(low, 0.0)), (across, min(high, 1.0))], colour)
    chart.dot(across, marks.rate, colour)


def report(out: Path, results: Mapping[tuple[str, str, str], Any], command: str) -> None:
    """Write the tables and the curves of what there is."""
    lines = [f"Made by `{command}`; ± is one standard error.", ""]
    for group in dict.fromkeys(group for group, _, _ in results):
        lines.append(HEADS.format({"cap": "most steps"}.get(group, group)))
        lines += [row(n, task, m) for (g, n, task), m in results.items() if g == group]
        lines.append("")
    (out / "profiles.md").write_text("\n".join(lines))
    points: dict[str, list[tuple[int, Any]]] = {}
    for (group, name, task), marks in results.items():
        if group == "cap":
            points.setdefault(task, []).append((int(name), marks))
    if points:
        curve(points).write(out / "steps.svg")
    if any(group != "cap" for group, _, _ in results):
        from mlx_diffgemma.tune.candidates import REFERENCE

        cloud(results, REFERENCE).write(out / "rules.svg")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--adapter-path")
    parser.add_argument("--count", type=int, default=1000, help="inputs a task")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--task", action="append", help="repeatable; one and two if left out")
    parser.add_argument("--batch", type=int, default=8, help="inputs answered at once")
    parser.add_argument("--only", choices=["profile", "rule", "sampler", "cap"], action="append")
    parser.add_argument("--rules", type=Path, help="JSON file of rules, in place of all others")
    parser.add_argument("--jobs", type=int, default=1, help="processes that answer")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--openblas", help="path of libopenblas.so.0, on a CPU")
    args = parser.parse_args()
    args.task = args.task or ["one", "two"]
    return args


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    _sit_down(args)  # first, for it loads OpenBLAS, which must come before mlx
    ledger = Ledger(args.out / "profiles.jsonl")
    compared = list(settings())
    if args.rules:
        compared = [("rule", *each) for each in json.loads(args.rules.read_text()).items()]
    planned = {
        (group, name): list(desk.batches(given))
        for group, name, given in compared
        if not args.only or group in args.only
    }
    missing = {
        batch.key: batch
        for batches in planned.values()
        for batch in batches
        if batch.key not in ledger.batches
    }
    command = (
        f"python scripts/bench_profiles.py --model {args.model} --count {args.count} "
        f"--seed {args.seed} --batch {args.batch}"
        + "".join(f" --task {task}" for task in args.task)
    )
    shown: set[tuple[str, str]] = set()

    def tell() -> None:
        """Print the rules that are complete by now, and write the report of all that are."""
        from exercises.exam import Marks

        results = {}
        for (group, name), batches in planned.items():
            if not all(batch.key in ledger.batches for batch in batches):
                continue
            for task in args.task:
                found = (ledger.batches[b.key] for b in batches if b.task == task)
                results[group, name, task] = total = sum(found, Marks())
                if (group, name) not in shown:
                    print(row(f"{group} {name}", task, total), flush=True)
            shown.add((group, name))
        if results:
            report(args.out, results, command)

    print(HEADS.format("setting"), flush=True)
    tell()
    for batch, marks in _answered(list(missing.values()), args):
        ledger.add(batch.key, marks)
        complete = all(b.key in ledger.batches for b in _rule_of(batch, planned))
        if complete:
            tell()


def _rule_of(batch: Batch, planned: Mapping[tuple[str, str], Sequence[Batch]]) -> Sequence[Batch]:
    return next(batches for batches in planned.values() if batch.key in {b.key for b in batches})


def _answered(batches: Sequence[Batch], args: argparse.Namespace) -> Iterator[tuple[Batch, Any]]:
    """Batches with their marks, as they are answered, by as many processes as wanted."""
    if args.jobs == 1:
        yield from map(_answer, batches)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.jobs, _sit_down, (args,)) as pool:
        yield from pool.imap_unordered(_answer, batches)


if __name__ == "__main__":
    main()

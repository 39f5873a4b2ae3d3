"""What does each profile, sampler and cap on steps cost in exact answers, on the demo's sudokus?

    python scripts/bench_profiles.py --count 1000 --openblas /usr/lib/.../libopenblas.so.0
    python scripts/bench_profiles.py --count 1000 --only profile     # or sampler, or cap

Puzzles are fresh: made from `--seed`, the same for all. Every batch is written to
`OUT/profiles.jsonl` as it is answered, and a second run goes on where the first one stopped; what
it has is always in `OUT/profiles.md` (tables) and `OUT/steps.svg` (the curve).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_diffgemma.bench.openblas import load_openblas
from mlx_diffgemma.chart import Axis, Chart, linear_axis

CAPS = (48, 32, 16, 8, 4, 2)
HEADS = (
    "| {} | task | inputs | exact | steps a canvas | tokens a forward |\n|---|---|---|---|---|---|"
)


def settings() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Group, name and settings of everything to compare."""
    from mlx_diffgemma.diffusion.config import SAMPLERS
    from mlx_diffgemma.diffusion.profiles import PROFILES, profile_settings

    for name in PROFILES:
        yield "profile", name, profile_settings(name)
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


def key(model: str, seed: int, task: str, start: int, stop: int, changed: Mapping[str, Any]) -> str:
    """What a batch is: a profile that has changed is measured anew, equal settings only once.
    `changed` are those that differ from the checkpoint's."""
    return json.dumps([model, seed, task, start, stop, dict(changed)], sort_keys=True)


def row(name: str, task: str, marks: Any) -> str:
    return (
        f"| {name} | {task} | {marks.count} | {marks.rate:.3f} ± {marks.standard_error:.3f} "
        f"| {marks.steps_per_canvas:.2f} | {marks.tokens_per_forward:.1f} |"
    )


def curve(points: Mapping[str, list[tuple[int, Any]]]) -> Chart:
    """The exact rate over the cap on steps, one line a task; bars are two standard errors."""
    places = {cap: place for place, cap in enumerate(sorted(CAPS))}
    across = Axis(
        "most steps a canvas", 0, len(CAPS) - 1, tuple((n, str(cap)) for cap, n in places.items())
    )
    chart = Chart(across, linear_axis("exact answers", 0.0, 1.0))
    shown = [("one", "one puzzle", "#1f6feb"), ("two", "two puzzles", "#d1242f")]
    for task, _, colour in shown:
        if not points[task]:
            continue
        marks = sorted(points[task], key=lambda pair: pair[0])
        chart.line([(places[cap], m.rate) for cap, m in marks], colour)
        for cap, m in marks:
            ends = (min(1.0, max(0.0, m.rate + s * 2 * m.standard_error)) for s in (-1, 1))
            chart.line([(places[cap], end) for end in ends], colour)
            chart.dot(places[cap], m.rate, colour)
    chart.legend([(label, colour) for task, label, colour in shown if points[task]])
    return chart


def report(out: Path, results: Mapping[tuple[str, str, str], Any], command: str) -> None:
    """Write the tables and the curve of what there is."""
    lines = [f"Made by `{command}`; ± is one standard error.", ""]
    for group in dict.fromkeys(group for group, _, _ in results):
        lines.append(HEADS.format({"cap": "most steps"}.get(group, group)))
        lines += [row(n, task, m) for (g, n, task), m in results.items() if g == group]
        lines.append("")
    (out / "profiles.md").write_text("\n".join(lines))
    points: dict[str, list[tuple[int, Any]]] = {"one": [], "two": []}
    for (group, name, task), marks in results.items():
        if group == "cap":
            points[task].append((int(name), marks))
    if any(points.values()):
        curve(points).write(out / "steps.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--count", type=int, default=1000, help="inputs a task")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="inputs answered at once")
    parser.add_argument("--only", choices=["profile", "sampler", "cap"], action="append")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--openblas", help="path of libopenblas.so.0, on a CPU")
    args = parser.parse_args()
    if args.openblas:
        load_openblas(args.openblas)

    from exercises import exam
    from mlx_diffgemma import load
    from mlx_diffgemma.fitting import diffusion_config

    args.out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(args.out / "profiles.jsonl")
    inputs = exam.make_tasks(args.count, args.seed)
    model, tokenizer = load(args.model)
    shipped = diffusion_config(model)
    command = (
        f"python scripts/bench_profiles.py --model {args.model} --count {args.count} "
        f"--seed {args.seed} --batch {args.batch}"
    )
    results: dict[tuple[str, str, str], exam.Marks] = {}
    print(HEADS.format("setting"), flush=True)
    for group, name, given in settings():
        if args.only and group not in args.only:
            continue
        config = diffusion_config(model, **given)
        changed = {k: v for k, v in asdict(config).items() if v != asdict(shipped)[k]}
        for task, exercises in inputs.items():
            total = exam.Marks()
            for start in range(0, args.count, args.batch):
                part = exercises[start : start + args.batch]
                batch = key(args.model, args.seed, task, start, start + len(part), changed)
                if batch not in ledger.batches:
                    prompts = [exercise.prompt for exercise in part]
                    answers = exam.answer(model, tokenizer, config, prompts, seed=start)
                    ledger.add(batch, exam.mark(answers, part))
                total += ledger.batches[batch]
            results[group, name, task] = total
            print(row(f"{group} {name}", task, total), flush=True)
            report(args.out, results, command)


if __name__ == "__main__":
    main()

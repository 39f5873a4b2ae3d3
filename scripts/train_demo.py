"""Train the demo's model from nothing, on endless fresh exercises, in as many sittings as it takes.

    python scripts/train_demo.py RUN --hours 1 --openblas /usr/lib/.../libopenblas.so.0
    python scripts/train_demo.py RUN --hours 2 --processes 2    # goes on, to the step
    python scripts/train_demo.py RUN --examples 300000          # makes the run longer
    python scripts/train_demo.py RUN --finish                   # writes RUN/model, examined

RUN holds `recipe.json` (of the first sitting, with what later ones changed), `start/` (the
checkpoint that it began with: random, or that of `--start`), the state of the training, and
`log.jsonl`, which says the recipe of every sitting. A sitting ends when its hours are over or all
examples were seen, and may be killed at any moment: it loses what came after the last save.
`--finish` writes, from whatever state there is, a checkpoint in the layout of
`mlx_diffgemma/demo/checkpoint` with a card, and the curve of exact answers over the cap on steps.

On a CPU with AVX-512 that OpenBLAS takes for an older one, OPENBLAS_CORETYPE=SKYLAKEX in the
environment makes products twice as fast.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo_recipe import Recipe, recipe_of, stream_of, training
from mlx_diffgemma.bench.openblas import load_openblas
from mlx_diffgemma.disk import write_atomically

if TYPE_CHECKING:
    from exercises.exam import Marks

SCRIPTS = Path(__file__).parent
SHIPPED = SCRIPTS.parent / "mlx_diffgemma" / "demo" / "checkpoint"
EXAM_SEED = 2026


def begin(folder: Path, seed: int, model: Path | None = None) -> None:
    """Write the checkpoint that a run starts from: a copy of `model`, or a random one in the shapes
    of the shipped one."""
    from make_tiny_checkpoint import write_checkpoint

    partial = folder / "start.part"
    shutil.rmtree(partial, ignore_errors=True)
    if model is not None:
        shutil.copytree(model, partial)
        partial.rename(folder / "start")
        return
    write_checkpoint(partial, json.loads((SHIPPED / "config.json").read_text()), seed=seed)
    for path in SHIPPED.glob("*"):
        if path.name.startswith(("tokenizer", "chat_template", "generation_config")):
            shutil.copy(path, partial)
    partial.rename(folder / "start")


def examine(
    model: Any, tokenizer: Any, names: Sequence[str], count: int, **settings: Any
) -> dict[str, Marks]:
    """How the model answers `count` inputs of each task, with the default settings but these."""
    from exercises import exam
    from mlx_diffgemma.fitting import diffusion_config

    config, marks = diffusion_config(model, **settings), {}
    for name, exercises in exam.make_tasks(count, EXAM_SEED, names).items():
        marks[name] = exam.Marks()
        for start in range(0, count, 8):
            part = exercises[start : start + 8]
            prompts = [exercise.prompt for exercise in part]
            answers = exam.answer(model, tokenizer, config, prompts, seed=start)
            marks[name] += exam.mark(answers, part)
    return marks


def sit(folder: Path, recipe: Recipe, hours: float, say: Callable[..., None]) -> bool:
    """Train until the examples or the hours are over; returns whether all examples were seen."""
    from mlx_diffgemma import load
    from mlx_diffgemma.train import processes
    from mlx_diffgemma.train.events import Evaluation, Finished, Report, Saved
    from mlx_diffgemma.train.loop import train

    model, tokenizer = load(folder / "start")
    model.unfreeze()
    ends = time.monotonic() + 3600 * hours
    config = training(recipe)

    def exact(model: Any) -> float:
        if not (folder / "state.safetensors").exists():
            return 0.0  # a random model takes all the steps and canvases that there are
        capped = {"max_denoising_steps": 16, "max_tokens": 192}
        marks = examine(model, tokenizer, list(recipe.shares), 16, **capped)
        say("exam", **{name: round(mark.rate, 3) for name, mark in marks.items()})
        return sum(mark.exact for mark in marks.values()) / sum(m.count for m in marks.values())

    stream = stream_of(recipe, tokenizer)
    held_out = stream(1 << 40, 64)
    for event in train(model, config, stream, held_out, folder, resume=True, generate_exact=exact):
        match event:
            case Report():
                say("report", examples=event.step * recipe.batch, loss=round(event.loss, 4),
                    rate=round(event.learning_rate, 5), norm=round(event.grad_norm, 3),
                    per_second=round(event.examples_per_second, 1),
                    memory=round(event.peak_memory, 2))  # fmt: skip
            case Evaluation():
                losses = {str(noise): round(loss, 4) for noise, loss in event.by_noise.items()}
                say(
                    "evaluation", examples=event.step * recipe.batch, loss=losses, exact=event.exact
                )
            case Saved() if processes.any_says(time.monotonic() > ends):
                say("stopped", examples=event.step * recipe.batch)
                return False
            case Finished():
                say("finished", examples=event.step * recipe.batch)
    return True


def write_model(folder: Path, name: str = "train_demo") -> Path:
    """`model`: what was trained by the script of this name, in bf16, written and verified by the
    converter."""
    from mlx_diffgemma.checkpoint.quantization import Recipe as Formats
    from mlx_diffgemma_convert.job import convert
    from mlx_diffgemma_convert.journal import Journal
    from mlx_diffgemma_convert.plan import make_plan
    from mlx_diffgemma_convert.source import OverlaidSource

    target = folder / "model"
    shutil.rmtree(target, ignore_errors=True)
    source = OverlaidSource(folder / "start", [folder / "adapters.safetensors"], name)
    plan = make_plan(source, Formats("plain", ()), dtype="bf16")
    with Journal(target) as journal:
        convert(plan, journal, restart=True)
    return target


def write_card(model: Path, text: str) -> None:
    """Put this card in place of the converter's, in its record too."""
    from mlx_diffgemma_convert.record import read_record, write_record

    record = read_record(model)
    record["files"]["README.md"] = sha256(text.encode()).hexdigest()
    (model / "README.md").write_bytes(text.encode())
    write_record(model, record)


def finish(folder: Path, recipe: Recipe, count: int, openblas: str | None) -> None:
    """Write the model with its card, and the curve of the exact rate over the cap on steps."""
    from mlx.utils import tree_flatten

    from demo_card import card
    from mlx_diffgemma import load

    target = write_model(folder)
    model, tokenizer = load(target)
    marks = examine(model, tokenizer, [name for name, part in recipe.shares.items() if part], count)
    size = sum(array.size for _, array in tree_flatten(model.parameters()))
    text = card(recipe, size, steps_done(folder) * recipe.batch, marks, count, EXAM_SEED)
    write_card(target, text)
    print(text, flush=True)
    curve = [sys.executable, str(SCRIPTS / "bench_profiles.py"), "--model", str(target), "--only",
             "cap", "--count", str(count), "--out", str(folder)]  # fmt: skip
    (folder / "profiles.jsonl").unlink(missing_ok=True)  # it may be of another state of the run
    subprocess.run(curve + (["--openblas", openblas] if openblas else []), check=True)


def start_others(folder: Path, count: int) -> None:
    """Run this command in `count` - 1 more processes, which train with this one.

    They find each other as those of `mlx.launch` do, which would take a core to watch over them.
    """
    if count == 1 or "MLX_RANK" in os.environ:
        return
    from mlx_diffgemma.train.processes import local_hosts

    (folder / "hosts.json").write_text(json.dumps(local_hosts(count)))
    os.environ["MLX_HOSTFILE"] = str(folder / "hosts.json")
    for rank in range(1, count):
        command = [sys.executable, *sys.argv]
        subprocess.Popen(command, env={**os.environ, "MLX_RANK": str(rank)})
    os.environ["MLX_RANK"] = "0"


def steps_done(folder: Path) -> int:
    """Optimizer steps of the state in `folder`."""
    import mlx.core as mx

    _, metadata = mx.load(str(folder / "state.safetensors"), return_metadata=True)
    return int(json.loads(metadata["run"])["step"])


def prepare(folder: Path, given: Mapping[str, Any], model: Path | None) -> None:
    """Write what is given into the recipe, and the checkpoint that the run starts from."""
    recipe = replace(recipe_of(folder), **given)
    write_atomically(folder / "recipe.json", json.dumps(asdict(recipe), indent=2).encode())
    if not (folder / "start").exists():
        begin(folder, recipe.seed, model)


def share(text: str) -> tuple[str, float]:
    """`one=0.5` -> ("one", 0.5)."""
    name, _, number = text.partition("=")
    return name, float(number)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run; made if it is not there")
    parser.add_argument("--hours", type=float, default=1.0, help="most hours of this sitting")
    parser.add_argument("--processes", type=int, default=1, help="a core for each, on a CPU")
    parser.add_argument("--openblas", help="path of libopenblas.so.0, on a CPU")
    parser.add_argument("--start", type=Path, help="a checkpoint to begin with, not random weights")
    parser.add_argument("--finish", action="store_true", help="train no more; write the model")
    parser.add_argument("--count", type=int, default=200, help="inputs a task of the final exam")
    parser.add_argument(
        "--share", type=share, action="append", dest="shares", metavar="TASK=SHARE",
        help="repeatable; replaces the shares of all tasks",
    )  # fmt: skip
    for name, kind in (("examples", int), ("batch", int), ("seed", int), ("ramp", float),
                       ("rate", float), ("decay", float), ("encoder", float)):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, help="of the recipe; kept for later sittings")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    if args.openblas:
        load_openblas(args.openblas)
    if not args.finish:
        start_others(args.run, args.processes)
    from mlx_diffgemma.train import processes

    first = processes.is_first()
    given = {f.name: getattr(args, f.name) for f in fields(Recipe)}
    if args.shares:
        given["shares"] = dict(args.shares)
    if first:
        given = {name: value for name, value in given.items() if value is not None}
        prepare(args.run, given, args.start)
    processes.any_says(False)  # the others wait for what the first one wrote
    recipe = recipe_of(args.run)

    def say(kind: str, **what: Any) -> None:
        if not first:
            return
        line = json.dumps({"at": time.strftime("%H:%M:%S"), "kind": kind, **what})
        with (args.run / "log.jsonl").open("a") as log:
            print(line, file=log)
        print(line, flush=True)

    if not args.finish:
        say("sitting", recipe=asdict(recipe))
    if (args.finish or sit(args.run, recipe, args.hours, say)) and first:
        finish(args.run, recipe, args.count, args.openblas)


if __name__ == "__main__":
    main()

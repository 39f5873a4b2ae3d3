"""How long do typed decisions take, and how good are they?

    python scripts/bench_decide.py                                  # 262,144 words, small layers
    python scripts/bench_decide.py --quality 200 --plot docs/decide.svg   # sudokus, demo model

Speed: one request against its questions one by one, and against JSON under a schema, in one run.
Quality: all blanks of a fresh puzzle are questions of one request, the grid is the frame. It is
calibrated as `decide calibrate` does it, held out; the same puzzles serve all settings, and fewer
draws are the first ones of the most.
"""

from __future__ import annotations

import argparse
import string
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_diffgemma import cpu, decide, generate_structured, load
from mlx_diffgemma.bench.presets import SMALL, config_like
from mlx_diffgemma.bench.random_model import random_model
from mlx_diffgemma.bench.timing import spent_in
from mlx_diffgemma.chart import Chart, linear_axis
from mlx_diffgemma.checkpoint.quantization import Recipe
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.editing.calibration import Calibration, Example
from mlx_diffgemma.editing.decide import DecisionSettings
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

DRAWS, STEPS = (1, 2, 4, 8), (1, 2, 4)
COLOURS = {1: "#c44", 2: "#e90", 4: "#26a"}


def characters(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a character, and nothing for the rest of the vocabulary."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", *map(chr, range(32, 127))]
    names += [f"<unused{n}>" for n in range(len(names), vocab)]
    words = {name: n for n, name in enumerate(names)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def questions(count: int) -> dict[str, Any]:
    criteria = dict.fromkeys(("red", "green", "blue", "none"))
    return {
        f"q{n}": {"type": "choice", "instructions": "Which colour?", "criteria": criteria}
        for n in range(count)
    }


def seconds(run: Callable[[], object], repeats: int) -> float:
    """The median time of a run, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def share_of_head(model: DiffusionGemma, run: Callable[[], object], repeats: int) -> float:
    """Which part of the passes over canvases goes into the logits of the labels."""
    run()
    with (
        spent_in(DiffusionGemma, "logits_of", waits_for=lambda model, hidden, ids: hidden) as head,
        spent_in(Denoiser, "weigh", waits_for=_arrays_of) as whole,
    ):
        for _ in range(repeats):
            run()
    return head.seconds / whole.seconds


def _arrays_of(denoiser: Denoiser, canvases: Any, prefixes: Any) -> list[Any]:
    return [prefix.arrays() for prefix in prefixes]


def speed(state_length: int, repeats: int) -> None:
    config = ModelConfig.from_dict(config_like(SMALL))
    model = random_model(config, Recipe("unquantized", ()), mx.float32)
    cpu.use(model)
    tokenizer = characters(config.text.vocab_size)
    rng = np.random.default_rng(0)
    state = "".join(rng.choice(list(string.ascii_letters + " "), state_length).tolist())
    given = {"seed": 0, "raw": True}
    print(f"{config.text.vocab_size:,} words, a state of {state_length:,} tokens, CPU")
    print("questions  passes  canvases  s  one by one  ratio  with the state known  head's share")
    for count in (1, 3, 12, 40):
        asked = questions(count)
        ask = partial(decide, model, tokenizer, state)
        together = partial(ask, asked, **given)
        found = together()
        other = model.make_cache()
        ask({"other": questions(1)["q0"] | {"instructions": "?"}}, prefix_cache=other, **given)

        def one_by_one(
            cached: bool, ask: Any = ask, asked: Any = asked, other: Any = other
        ) -> None:
            for name, question in asked.items():
                more = {"prefix_cache": other.snapshot()} if cached else {}
                ask({name: question}, **given, **more)

        def with_state_known(ask: Any = ask, asked: Any = asked, other: Any = other) -> None:
            ask(asked, prefix_cache=other.snapshot(), **given)

        alone = seconds(partial(one_by_one, False), repeats)
        whole = seconds(together, repeats)
        known = seconds(with_state_known, repeats)
        known_alone = seconds(partial(one_by_one, True), repeats)
        share = share_of_head(model, together, repeats)
        print(
            f"{count:9}  {found.passes:6}  {'+'.join(map(str, found.canvases)):8}  {whole:.3f}  "
            f"{alone:10.3f}  {whole / alone:.3f}  {known:.3f} / {known_alone:.3f} = "
            f"{known / known_alone:.3f}  {share:.1%}",
            flush=True,
        )
    asked = questions(12)
    schema = {
        "type": "object",
        "properties": {name: {"enum": list(q["criteria"])} for name, q in asked.items()},
        "required": list(asked),
        "additionalProperties": False,
    }
    written = partial(
        generate_structured, model, tokenizer, state, 400, json_schema=schema,
        max_denoising_steps=4, **given,
    )  # fmt: skip
    start = time.perf_counter()
    passes = written().passes
    took = time.perf_counter() - start
    whole = seconds(partial(decide, model, tokenizer, state, asked, **given), repeats)
    print(f"JSON under a schema, 12 questions: {took:.2f} s, {passes} passes; {whole / took:.4f}")


def example(puzzle: sudoku.Puzzle) -> dict[str, Any]:
    """All blanks of a puzzle as questions."""
    cells = {f"c{n}": n for n, sign in enumerate(puzzle.givens) if sign == sudoku.BLANK}
    digits = {"type": "choice", "criteria": dict.fromkeys("123456")}
    signs = (f"{{c{n}}}" if s == sudoku.BLANK else s for n, s in enumerate(puzzle.givens))
    return {
        "state": sudoku.prompt([puzzle]),
        "questions": dict.fromkeys(cells, digits),
        "answers": {name: puzzle.solution[n] for name, n in cells.items()},
        "frame": "".join(signs),
    }


def quality(
    count: int, length: int | None, every: Sequence[int], seed: int, plot: Path | None
) -> None:
    model, tokenizer = load("demo")
    rng = np.random.default_rng(seed)
    examples = [example(sudoku.make_puzzle(rng)) for _ in range(count)]
    print(f"{count} puzzles, seed {seed}, canvas {length or 'as short as it can be'}")
    print("| steps | draws | accuracy | Brier | after | calib. error | after | temperature |")
    print("|---|---|---|---|---|---|---|---|")
    found: dict[tuple[int, int], float] = {}
    for steps in every:
        seen: dict[int, list[Example]] = {draws: [] for draws in DRAWS}
        for number, each in enumerate(examples):
            decided = decide(
                model, tokenizer, each["state"], each["questions"], frame=each["frame"],
                seed=number, draws=max(DRAWS), steps=steps, canvas_length=length,
            )  # fmt: skip
            for name, right in each["answers"].items():
                answer = decided.answers[name]
                best = answer.question.index_of(right)
                for draws in DRAWS:
                    mean = np.log(np.exp(answer.log_probs[:draws]).mean(axis=0))
                    seen[draws].append(Example(number, "choice", answer.labels, mean, best))
        for draws in DRAWS:
            settings = DecisionSettings(draws=draws, steps=steps, canvas_length=length)
            fit = Calibration.fitted(seen[draws], model, settings).fits["choice"]
            before, after = fit.before, fit.after
            found[steps, draws] = before.accuracy
            print(
                f"| {steps} | {draws} | {before.accuracy:.4f} | {before.brier:.4f} | "
                f"{after.brier:.4f} | {before.error:.4f} | {after.error:.4f} | "
                f"{fit.temperature:.2f} |",
                flush=True,
            )
    if plot is not None:
        low = min(found.values())
        up = linear_axis("share of blanks that are right", low, 1.0)
        chart = Chart(linear_axis("draws", 0, 8), up)
        for steps in every:
            colour = COLOURS[steps]
            points = [(float(draws), found[steps, draws]) for draws in DRAWS]
            chart.line(points, colour)
            for point in points:
                chart.dot(*point, colour)
        chart.legend([(f"{n} step{'s' * (n > 1)}", COLOURS[n]) for n in every])
        chart.write(plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--state", type=int, default=1024, help="tokens of the state")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quality", type=int, help="number of sudokus to ask the demo model")
    parser.add_argument("--canvas", type=int, help="length of the canvas")
    parser.add_argument(
        "--steps", type=int, action="append", choices=STEPS, help="passes over a canvas"
    )
    parser.add_argument("--seed", type=int, default=1709)
    parser.add_argument("--plot", type=Path, help="SVG file for accuracy over draws")
    arguments = parser.parse_args()
    if arguments.quality:
        every = arguments.steps or STEPS
        quality(arguments.quality, arguments.canvas, every, arguments.seed, arguments.plot)
    else:
        speed(arguments.state, arguments.repeats)


if __name__ == "__main__":
    main()

"""How many forward passes does valid JSON take, beside one token at a time?

    python scripts/bench_structured.py --model demo
    python scripts/bench_structured.py --model demo --sudokus 80
    python scripts/bench_structured.py --model OUT_4BIT --prompt "Describe the Eiffel tower."
    python scripts/bench_structured.py --vocabulary 262144

One token at a time is the same canvas and the same grammar, but every pass pins the next token
only; tokens that the grammar forces cost it nothing either. With `--vocabulary`, forty schemas of
daily use are answered with a tokenizer of as many words and guesses in place of a model, within a
minute: masks and milliseconds of CPU a pass beside the model (their mean and the slowest pass), the
passes of a free answer of as many tokens under the same guesses, and the time before the first
pass.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_diffgemma import generate_structured, load
from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.diffusion.canvas import Canvas
from mlx_diffgemma.diffusion.constraints import FREE, Layout
from mlx_diffgemma.diffusion.denoiser import Denoiser, Queued
from mlx_diffgemma.diffusion.lookahead import tokens_in
from mlx_diffgemma.diffusion.stopping import as_shown, has_converged
from mlx_diffgemma.editing.grammar import GrammarMatcher, json_schema_matcher, regex_matcher
from mlx_diffgemma.editing.session import Session
from mlx_diffgemma.editing.vocabulary import Kind, Vocabulary
from mlx_diffgemma.errors import NumericalError
from mlx_diffgemma.model.cache import Prefix

TEXT = {"type": "string", "maxLength": 12}
YEAR = {"type": "integer", "minimum": 0, "maximum": 2100}
SCHEMAS: dict[str, dict[str, Any]] = {
    "flat object": {
        "type": "object",
        "properties": {"name": TEXT, "year": YEAR, "open": {"type": "boolean"}},
        "required": ["name", "year", "open"],
        "additionalProperties": False,
    },
    "enums": {
        "type": "object",
        "properties": {
            "sentiment": {"enum": ["positive", "neutral", "negative"]},
            "language": {"enum": ["English", "French", "German"]},
            "spam": {"type": "boolean"},
        },
        "required": ["sentiment", "language", "spam"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "person": {
                "type": "object",
                "properties": {"first_name": TEXT, "last_name": TEXT},
                "required": ["first_name", "last_name"],
                "additionalProperties": False,
            },
            "address": {
                "type": "object",
                "properties": {"city": TEXT, "code": {"type": "string", "pattern": "^[0-9]{5}$"}},
                "required": ["city", "code"],
                "additionalProperties": False,
            },
        },
        "required": ["person", "address"],
        "additionalProperties": False,
    },
    "array": {
        "type": "array",
        "minItems": 3,
        "maxItems": 3,
        "items": {
            "type": "object",
            "properties": {"x": YEAR, "y": YEAR},
            "required": ["x", "y"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip

# What must stand somewhere later, which a search byte by byte does not find.
LATE: dict[str, dict[str, Any]] = {
    "[a-z]cole": {"type": "string", "pattern": "[a-z]cole"},
    r"\wcole": {"type": "string", "pattern": r"\wcole"},
    "names with cole": {
        "type": "object",
        "patternProperties": {"[a-z]cole": {"type": "integer"}},
        "minProperties": 1,
        "additionalProperties": False,
    },
}


Start = Callable[[Vocabulary], GrammarMatcher]


def one_at_a_time(
    model: Any, tokenizer: Any, prompt: str, start: Start, seed: int
) -> tuple[str, int, int]:
    """Text, tokens and forward passes of the naive loop."""
    session = Session(model, tokenizer, prompt, seed=seed, max_denoising_steps=1)
    matcher = start(session.vocabulary)
    written: list[int] = []
    while True:
        forced = matcher.forced()
        matcher.advance(forced)
        written += forced
        held = len(written) // session.length * session.length
        pinned = written[held:]
        layout = Layout(
            (*pinned, *[FREE] * (session.length - len(pinned))), {len(pinned): matcher.allowed()}
        )
        if not matcher.must_end:
            done = session.denoise(session.prefix(written[:held]), layout)
            token = done.tokens[len(pinned)]
        if matcher.must_end or token in session.vocabulary.eos:
            return session.vocabulary.decode(written), len(written), session.passes
        matcher.advance([token])
        written.append(token)


def sudokus(model: Any, tokenizer: Any, count: int) -> None:
    """How often what matches is also right: the demo model's own task under a pattern."""
    rng = np.random.default_rng(1701)  # not the puzzles that the rule was chosen on
    puzzles = [sudoku.make_puzzle(rng) for _ in range(count)]
    grid = r"([1-6]{6}\n){5}[1-6]{6}"
    print(f"{'pattern':34} {'right':>6} {'passes':>7} | one at a time: right passes")
    for name in ("of a grid, puzzle in the prompt", "of a grid, no puzzle", "with the givens"):
        right = passes = naive_right = naive_passes = 0
        for seed, puzzle in enumerate(puzzles, 9000):
            prompt, pattern = sudoku.BARE_PROMPT, grid
            if name == "of a grid, puzzle in the prompt":
                prompt = sudoku.prompt([puzzle])
            if name == "with the givens":
                pattern = puzzle.givens.replace(".", "[1-6]").replace("\n", "\\n")
            found = generate_structured(model, tokenizer, prompt, regex=pattern, seed=seed)
            text, _, steps = one_at_a_time(
                model, tokenizer, prompt, partial(regex_matcher, pattern=pattern), seed
            )
            fits = puzzle.solution.__eq__
            if name == "of a grid, no puzzle":
                fits = sudoku.is_valid_grid
            right, naive_right = right + fits(found.text), naive_right + fits(text)
            passes, naive_passes = passes + found.passes, naive_passes + steps
        print(
            f"{name:34} {right / count:6.3f} {passes / count:7.1f} | "
            f"{naive_right / count:20.3f} {naive_passes / count:6.1f}",
            flush=True,
        )


class Guesses(Denoiser):
    """Stands in for a model: what it predicts takes no time of the device, and grows surer with
    every pass.

    Each position of a canvas has tokens that it would take, the best first, and as much doubt of
    the best that may stand there as a random number says, half of which goes with every pass. The
    tokens are of one `kind`.
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, seed: int, kind: Kind = "text") -> None:
        super().__init__(model)
        self.text, self.seed = np.array(tokens_in(vocabulary.kind(kind))), seed
        self.wished: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def queue(self, canvases: Sequence[Canvas], prefixes: Sequence[Prefix]) -> Queued:
        return Guessed([self._guessed(canvas) for canvas in canvases])

    def _guessed(self, canvas: Canvas) -> Canvas:
        layout, length = canvas.layout, len(canvas)
        wishes, doubts = self._wishes(canvas.index, length)
        tokens, entropy = wishes[:, 0].copy(), doubts * np.float32(0.5) ** canvas.passes
        if layout is not None:
            for place, mask in layout.masks(canvas.vocab).items():
                may = mask[wishes[place] // 32] >> (wishes[place] % 32) & 1
                # Where nothing that the position would take may stand, one of what may is taken.
                allowed = wishes[place][may == 1] if may.any() else np.array(tokens_in(mask))
                if len(allowed):
                    tokens[place] = allowed[wishes[place, 0] % len(allowed) if not may.any() else 0]
            tokens = np.where(layout.open, tokens, layout.fixed)
            entropy = np.where(layout.open, entropy, np.float32(0))
        order = np.sort(entropy)
        bound = order[np.cumsum(order) - order <= canvas.settings.entropy_bound].max()
        return denoised(canvas, tokens, entropy, entropy <= bound)

    def _wishes(self, index: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [C, 32] that the positions of a canvas would take, and their doubts [C]."""
        if (index, length) not in self.wished:
            rng = np.random.default_rng((self.seed, index, length))
            wishes = rng.choice(self.text, (length, 32)).astype(np.int32)
            self.wished[index, length] = wishes, rng.exponential(1.0, length).astype(np.float32)
        return self.wished[index, length]


@dataclass(frozen=True)
class Guessed(Queued):
    """A step of guesses."""

    canvases: list[Canvas]

    def each(self) -> list[Canvas | NumericalError]:
        return list(self.canvases)


def denoised(
    canvas: Canvas, tokens: np.ndarray, entropy: np.ndarray, accepted: np.ndarray
) -> Canvas:
    """A canvas after a pass that drafted `tokens` [C] with an `entropy` [C]."""
    shown, _ = as_shown(canvas.settings, tokens, entropy)
    after = replace(
        canvas,
        passes=canvas.passes + 1,
        draft=tokens,
        entropy=entropy,
        accepted=accepted,
        shown=shown,
        unchanged=np.where(shown == canvas.shown, canvas.unchanged + 1, 0),
    )
    converged = has_converged(after)
    used_up = after.step > canvas.settings.max_denoising_steps
    return replace(after, converged=converged, done=not canvas.endless and (converged or used_up))


def daily(size: int, seeds: int, max_tokens: int) -> None:
    """What forty schemas cost beside a model that knows `size` words: the host's work of all
    passes, its model left out, and the passes that a free answer of as many tokens takes."""
    tests = Path(__file__).resolve().parents[1] / "tests"
    sys.path[:0] = [str(tests), str(tests / "editing")]
    from big_vocabulary import EOS, big
    from daily_schemas import SCHEMAS as DAILY
    from tiny_models import make_config, make_model, make_weights

    from mlx_diffgemma import stream_generate
    from mlx_diffgemma.config import ModelConfig
    from mlx_diffgemma.diffusion import matching

    tokenizer = big(size)
    raw = make_config(5, vocab_size=size, head_dim=8, hidden_size=16) | {"canvas_length": 256}
    config = ModelConfig.from_dict(raw)
    model = make_model(config, make_weights(config, 5))
    shared: dict[str, Any] = {"raw": True, "eos_token_ids": EOS}
    for number in ("first", "second"):
        start = time.perf_counter()
        vocabulary = Vocabulary(tokenizer, size, EOS)
        read = time.perf_counter()
        json_schema_matcher(vocabulary, {"type": "string"})
        whole = time.perf_counter() - start
        print(f"{number} use: {read - start:.3f} s, with a grammar {whole:.3f} s")
    made: list[GrammarMatcher] = []
    spent: list[float] = []
    following, require = matching._Match.following, matching.Closer.require

    def timed(self: Any, row: object, canvas: Any) -> Any:
        start = time.thread_time()
        found = following(self, row, canvas)
        spent.append(time.thread_time() - start)
        return found

    def seen(self: Any, state: Any, most: int) -> None:
        made.append(state)
        require(self, state, most)

    matching._Match.following = timed  # type: ignore[method-assign]
    matching.Closer.require = seen  # type: ignore[method-assign]
    print(
        f"{'schema':20} {'tokens':>7} {'passes':>7} {'plain':>6} {'masks':>6} {'ms':>6} "
        f"{'most ms':>8} {'begin ms':>9}"
    )
    total, slow = np.zeros(7), 0
    for name, schema in {**DAILY, **LATE}.items():
        row = np.zeros(7)
        for seed in range(seeds):
            way = json_schema_matcher(vocabulary, schema).way_out(4096, thorough=True)
            room = max(max_tokens, 8 + len(way or ()))
            made.clear()
            spent.clear()
            denoiser = Guesses(model, vocabulary, seed)
            first: list[float] = []

            def began(_: object, first: list[float] = first) -> None:
                if not first:
                    first.append(time.perf_counter())

            start = time.perf_counter()
            found = generate_structured(
                model, tokenizer, "x", room, json_schema=schema, seed=seed, denoiser=denoiser,
                on_step=began, **shared,
            )  # fmt: skip
            json.loads(found.text)
            beginning = first[0] - start if first else time.perf_counter() - start
            length, plain = max(1, len(found.tokens)), 0
            for response in stream_generate(
                model, tokenizer, "x", length, seed=seed, stop_at_eos=False, draft=False,
                denoiser=denoiser, **shared,
            ):  # fmt: skip
                plain = sum(response.denoising_steps)
            row += [
                len(found.tokens), found.passes, plain, made[0].masks.computed,
                1000 * sum(spent), 0, 1000 * beginning,
            ]  # fmt: skip
            row[5] = max(row[5], 1000 * max(spent, default=0.0))
        slow += row[4] > 20 * row[1]
        most = max(total[5], row[5])
        total += row
        total[5] = most
        _daily_row(name, row, seeds)
    _daily_row("all", total, seeds * len(DAILY | LATE))
    print(f"{slow} of {len(DAILY | LATE)} schemas took more than 20 ms a pass")


def _daily_row(name: str, row: np.ndarray, runs: int) -> None:
    tokens, passes, plain, masks, spent, most, beginning = row.tolist()
    print(
        f"{name:20} {tokens:7.0f} {passes:7.0f} {plain:6.0f} {masks / max(1, passes):6.1f} "
        f"{spent / max(1, passes):6.1f} {most:8.1f} {beginning / runs:9.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompt", default="sudoku")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="most denoising steps of a canvas")
    parser.add_argument("--sudokus", type=int, help="how many sudokus to write under a pattern")
    parser.add_argument("--vocabulary", type=int, help="words of a tokenizer, such as 262144")
    parser.add_argument("--max-tokens", type=int, default=48, help="with --vocabulary")
    arguments = parser.parse_args()
    if arguments.vocabulary:
        daily(arguments.vocabulary, arguments.seeds, arguments.max_tokens)
        return
    model, tokenizer = load(arguments.model)
    if arguments.sudokus:
        sudokus(model, tokenizer, arguments.sudokus)
        return
    print(
        f"{'schema':14} {'tokens':>7} {'passes':>7} {'per pass':>9} | one at a time: tokens passes"
    )
    for name, schema in SCHEMAS.items():
        tokens = passes = naive_tokens = naive_passes = 0
        for seed in range(arguments.seeds):
            found = generate_structured(
                model,
                tokenizer,
                arguments.prompt,
                json_schema=schema,
                seed=seed,
                max_denoising_steps=arguments.steps,
            )
            json.loads(found.text)
            tokens, passes = tokens + len(found.tokens), passes + found.passes
            start = partial(json_schema_matcher, schema=schema)
            _, length, steps = one_at_a_time(model, tokenizer, arguments.prompt, start, seed)
            naive_tokens, naive_passes = naive_tokens + length, naive_passes + steps
        print(
            f"{name:14} {tokens:7} {passes:7} {tokens / passes:9.1f} | {naive_tokens:21} "
            f"{naive_passes:6}",
            flush=True,
        )


if __name__ == "__main__":
    main()

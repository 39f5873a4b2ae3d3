"""How many forward passes does valid JSON take, beside one token at a time?

    python scripts/bench_structured.py --model demo
    python scripts/bench_structured.py --model demo --sudokus 80
    python scripts/bench_structured.py --model OUT_4BIT --prompt "Describe the Eiffel tower."
    python scripts/bench_structured.py --vocabulary 262144

One token at a time is the same canvas and the same grammar, but every pass pins the next token
only; tokens that the grammar forces cost it nothing either. With `--vocabulary`, a random model
with a tokenizer of as many words answers under forty schemas of daily use: masks and milliseconds
beside the model, and the passes of plain generation of as many tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_diffgemma import generate_structured, load
from mlx_diffgemma.bench.timing import spent_in
from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.diffusion.constraints import FREE, Layout
from mlx_diffgemma.editing.grammar import GrammarMatcher, json_schema_matcher, regex_matcher
from mlx_diffgemma.editing.session import Session
from mlx_diffgemma.editing.vocabulary import Vocabulary

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


def daily(size: int, seeds: int, max_tokens: int) -> None:
    """What forty schemas cost beside a random model that knows `size` words."""
    tests = Path(__file__).resolve().parents[1] / "tests"
    sys.path[:0] = [str(tests), str(tests / "editing")]
    from big_vocabulary import EOS, big
    from daily_schemas import SCHEMAS as DAILY
    from tiny_models import make_config, make_model, make_weights

    from mlx_diffgemma import stream_generate
    from mlx_diffgemma.config import ModelConfig
    from mlx_diffgemma.diffusion import matching

    tokenizer = big(size)
    raw = make_config(5, vocab_size=size, head_dim=8, hidden_size=16) | {"canvas_length": 16}
    config = ModelConfig.from_dict(raw)
    model = make_model(config, make_weights(config, 5))
    shared: dict[str, Any] = {"raw": True, "eos_token_ids": EOS, "max_denoising_steps": 8}
    for number in ("first", "second"):
        start = time.perf_counter()
        vocabulary = Vocabulary(tokenizer, size, EOS)
        read = time.perf_counter()
        json_schema_matcher(vocabulary, {"type": "string"})
        whole = time.perf_counter() - start
        print(f"{number} use: {read - start:.3f} s, with a grammar {whole:.3f} s")
    print(f"{'schema':20} {'tokens':>7} {'passes':>7} {'plain':>6} {'masks':>6} {'ms':>6}  a pass")
    total = np.zeros(5)
    for name, schema in DAILY.items():
        row = np.zeros(5)
        for seed in range(seeds):
            way = json_schema_matcher(vocabulary, schema).way_out(4096, thorough=True)
            room = max(max_tokens, 8 + len(way or ()))
            with (
                spent_in(matching._Match, "following") as matched,
                spent_in(matching.Closer, "require") as required,
            ):
                found = generate_structured(
                    model, tokenizer, "x", room, json_schema=schema, seed=seed, **shared
                )
            grammar = required.calls[0][1]
            json.loads(found.text)
            plain = 0
            length = max(1, len(found.tokens))
            for response in stream_generate(
                model, tokenizer, "x", length, seed=seed, stop_at_eos=False, **shared
            ):
                plain = sum(response.denoising_steps)
            row += [
                len(found.tokens), found.passes, plain, grammar.masks.computed,
                1000 * matched.seconds,
            ]  # fmt: skip
        total += row
        _daily_row(name, row)
    _daily_row("all", total)


def _daily_row(name: str, row: np.ndarray) -> None:
    tokens, passes, plain, masks, spent = row.tolist()
    print(
        f"{name:20} {tokens:7.0f} {passes:7.0f} {plain:6.0f} {masks / passes:6.1f} "
        f"{spent / passes:6.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompt", default="sudoku")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="most denoising steps of a canvas")
    parser.add_argument("--sudokus", type=int, help="how many sudokus to write under a pattern")
    parser.add_argument("--vocabulary", type=int, help="words of a random model, such as 262144")
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

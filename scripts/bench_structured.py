"""How many forward passes does valid JSON take, beside one token at a time?

    python scripts/bench_structured.py --model demo --steps 4
    python scripts/bench_structured.py --model OUT_4BIT --prompt "Describe the Eiffel tower."

One token at a time is the same canvas and the same grammar, but every pass pins the next token
only; tokens that the grammar forces cost it nothing either.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from mlx_diffgemma import generate_structured, load
from mlx_diffgemma.diffusion.constraints import FREE, Layout
from mlx_diffgemma.editing.grammar import json_schema_matcher
from mlx_diffgemma.editing.session import Session

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


def one_at_a_time(
    model: Any, tokenizer: Any, prompt: str, schema: Any, seed: int
) -> tuple[int, int]:
    """Tokens and forward passes of the naive loop, at most a canvas of tokens."""
    session = Session(model, tokenizer, prompt, seed=seed, max_denoising_steps=1)
    matcher = json_schema_matcher(session.vocabulary, schema)
    pinned: list[int] = []
    while True:
        forced = matcher.forced()
        matcher.advance(forced)
        pinned += forced
        if matcher.must_end or len(pinned) >= session.length:
            return len(pinned), session.passes
        free = [FREE] * (session.length - len(pinned))
        layout = Layout((*pinned, *free), {len(pinned): matcher.allowed()})
        token = session.denoise(session.prefix(), layout).tokens[len(pinned)]
        if token in session.vocabulary.eos:
            return len(pinned), session.passes
        matcher.advance([token])
        pinned.append(token)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompt", default="sudoku")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="most denoising steps of a canvas")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
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
            one = one_at_a_time(model, tokenizer, arguments.prompt, schema, seed)
            naive_tokens, naive_passes = naive_tokens + one[0], naive_passes + one[1]
        print(
            f"{name:14} {tokens:7} {passes:7} {tokens / passes:9.1f} | {naive_tokens:21} "
            f"{naive_passes:6}",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""What surrounds a gap comes back byte for byte, whatever it is. About 1,000 texts in all."""

from __future__ import annotations

import numpy as np
import pytest
from small_models import demo, random_text, tiny

from mlx_diffgemma.editing.edit import around_lines, edit
from mlx_diffgemma.editing.fill import fill
from mlx_diffgemma.editing.infill import infill
from mlx_diffgemma.editing.session import Session
from mlx_diffgemma.editing.window import Gap, lay_out

QUICK = {"prompt": "x", "raw": True, "max_denoising_steps": 1}
HOLE = "\uf8fe"


@pytest.mark.slow
@pytest.mark.parametrize("load", [tiny, demo])
@pytest.mark.parametrize("seed", range(10))
def test_infill(load, seed):
    model, tokenizer = load()
    rng = np.random.default_rng(seed)
    for _ in range(20):
        literals = [random_text(rng, int(rng.integers(0, 30))) for _ in range(rng.integers(2, 4))]
        done = infill(
            model, tokenizer, HOLE.join(literals), hole=HOLE, lengths=[int(rng.integers(1, 5))],
            seed=int(rng.integers(99)), **QUICK,
        )  # fmt: skip
        assert len(done.holes) == len(literals) - 1
        expected = literals[0] + "".join(
            hole.text + literal for hole, literal in zip(done.holes, literals[1:], strict=True)
        )
        assert done.text == expected


@pytest.mark.slow
@pytest.mark.parametrize("load", [tiny, demo])
@pytest.mark.parametrize("seed", range(10))
def test_edit(load, seed):
    model, tokenizer = load()
    rng = np.random.default_rng([seed, 1])
    for _ in range(15):
        end = rng.choice(["\n", "\r\n"])
        count = int(rng.integers(1, 6))
        lines = [
            random_text(rng, int(rng.integers(0, 4))).replace("\n", "").replace("\r", "")
            for _ in range(count)
        ]
        text = end.join(lines) + ("" if rng.random() < 0.5 and lines[-1] else end)
        first = int(rng.integers(1, count + 1))
        last = int(rng.integers(first, min(count, first + 1) + 1))
        before, present, after = around_lines(text, (first, last))
        assert before + present + after == text
        done = edit(
            model, tokenizer, text, "x", (first, last), lengths=[int(rng.integers(1, 5))],
            strength=float(rng.choice([0.5, 1.0])), seed=int(rng.integers(99)), **QUICK,
        )  # fmt: skip
        assert done.text == before + done.filled.text + after
        if "\r\n" in text and "\n" not in text.replace("\r\n", ""):
            assert "\n" not in done.filled.text.replace("\r\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("load", [tiny, demo])
@pytest.mark.parametrize("seed", range(10))
def test_fill(load, seed):
    model, tokenizer = load()
    rng = np.random.default_rng([seed, 2])
    kinds = ["", ":digits", ":word", ":text", ":a|ab|b"]
    for _ in range(15):
        count = int(rng.integers(1, 3))
        literals = [random_text(rng, int(rng.integers(0, 15))) for _ in range(count + 1)]
        escaped = [each.replace("{", "{{").replace("}", "}}") for each in literals]
        slots = [f"{{s{i}{rng.choice(kinds)}}}" for i in range(count)]
        template = escaped[0] + "".join(a + b for a, b in zip(slots, escaped[1:], strict=True))
        done = fill(model, tokenizer, template, lengths=[2], seed=int(rng.integers(99)), **QUICK)
        expected = literals[0] + "".join(
            done.slots[f"s{i}"] + literal for i, literal in enumerate(literals[1:])
        )
        assert done.text == expected


@pytest.mark.parametrize("load", [tiny, demo])
def test_every_token_outside_a_gap_is_that_of_the_text(load):
    """And the ends of a gap can only hold what keeps the text around it."""
    model, tokenizer = load()
    session = Session(model, tokenizer, "x", raw=True, seed=0)
    vocabulary = session.vocabulary
    rng = np.random.default_rng(4)
    for _ in range(60):
        literals = [random_text(rng, int(rng.integers(0, 25))) for _ in range(3)]
        gaps = [Gap((int(rng.integers(1, 4)),)) for _ in range(2)]
        window = lay_out(vocabulary, literals, gaps, [[g.middle for g in gaps]], session.length)[0]
        tokens = [*window.prefix, *window.layout.tokens]
        spans = [(s.start + len(window.prefix), s.stop + len(window.prefix)) for s in window.spans]
        left = vocabulary.encode(literals[0])
        kept = spans[0][0] + len(window.spans[0].before[:1])
        assert left[: spans[0][0]] == tokens[: spans[0][0]]
        assert kept == len(left)
        for span in window.spans:
            if span.before:
                mask = window.layout.allowed[span.start]
                for token in range(vocabulary.size):
                    if mask[token // 32] >> (token % 32) & 1:
                        assert vocabulary.pieces[token].startswith(span.before)
            if span.after:
                mask = window.layout.allowed[span.stop - 1]
                for token in range(vocabulary.size):
                    if mask[token // 32] >> (token % 32) & 1:
                        assert vocabulary.pieces[token].endswith(span.after)

"""Whatever the model, what is written satisfies the constraint."""

from __future__ import annotations

import json
import re

import jsonschema
import numpy as np
import pytest
from bench_structured import Guesses
from json_schemas import random_schema
from small_models import demo, tiny, vocabulary

from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.diffusion.closing import ClosingError
from mlx_diffgemma.editing.grammar import GrammarMatcher, json_schema_matcher
from mlx_diffgemma.editing.structured import UnmetConstraintError, generate_structured
from mlx_diffgemma.errors import DiffGemmaError, UsageError
from mlx_diffgemma.generation import stream_generate

COUNT = 110  # schemas for each of the two models


def choices_in(model, tokenizer, schema, tokens):
    """How many of the tokens the schema leaves open, the end included."""
    matcher = json_schema_matcher(vocabulary(model, tokenizer), schema)
    left, count = list(tokens), 0
    while True:
        forced = matcher.forced()
        matcher.advance(forced)
        left = left[len(forced) :]
        if not left:
            return count + (not matcher.must_end)
        matcher.advance(left[:1])
        left, count = left[1:], count + 1


def has_what_the_vocabulary_lacks(schema, load) -> bool:
    """The demo's tokenizer writes nothing but ASCII."""
    return load is demo and not json.dumps(schema, ensure_ascii=False).isascii()


@pytest.mark.slow
@pytest.mark.parametrize("load", [tiny, demo])
def test_json_always_validates(load):
    """And takes hardly more forward passes than there are tokens to choose, which is what decoding
    token by token takes (run with -s to see them)."""
    model, tokenizer = load()
    rng = np.random.default_rng(3)
    passes = tokens = choices = done = 0
    while done < (
        COUNT // 4 if load is demo else COUNT
    ):  # a pass of the demo takes ten times longer
        schema = random_schema(rng)
        if has_what_the_vocabulary_lacks(schema, load):
            continue
        found = generate_structured(
            model, tokenizer, "x", 160, raw=True, json_schema=schema, seed=done,
            max_denoising_steps=20,
        )  # fmt: skip
        jsonschema.validate(json.loads(found.text), schema)
        open_tokens = choices_in(model, tokenizer, schema, found.tokens)
        assert found.passes <= open_tokens + len(found.denoising_steps)  # one wait a canvas
        assert len(found.tokens) == len(found.entropy) == len(found.probability) <= 160
        for entropy, p in zip(found.entropy, found.probability, strict=True):
            assert p == 1 if entropy == 0 else np.exp(-entropy) - 1e-4 <= p <= 1
        assert found.passes == sum(found.denoising_steps)
        passes, tokens, done = passes + found.passes, tokens + len(found.tokens), done + 1
        choices += open_tokens
    print(f"\n{load.__name__}: {done} schemas, {tokens} tokens, {choices} open, {passes} passes")


def test_what_guesses_without_end_is_ended_too():
    """Nothing that is guessed ends an answer, and all of it grows certain."""
    model, tokenizer = tiny()
    words = vocabulary(model, tokenizer)
    rng = np.random.default_rng(8)
    for seed in range(30):
        schema = random_schema(rng)
        found = generate_structured(
            model, tokenizer, "x", 160, raw=True, json_schema=schema, seed=seed,
            denoiser=Guesses(model, words, seed, "word" if seed % 2 else "text"),
            eos_token_ids=words.eos, max_denoising_steps=20,
        )  # fmt: skip
        jsonschema.validate(json.loads(found.text), schema)
        open_tokens = choices_in(model, tokenizer, schema, found.tokens)
        assert found.passes <= open_tokens + len(found.denoising_steps)


@pytest.mark.parametrize("load", [tiny, demo])
@pytest.mark.parametrize(
    "pattern",
    ["a|bb|ccc", "(ab)*c", "[0-9]{30,40}", r"([a-z]+ ){2}end\.", "x{3}", r"\d+\.\d{2}", "a?"],
)
def test_a_regex_matches_across_canvases(load, pattern):
    model, tokenizer = load()
    for seed in range(3):
        found = generate_structured(
            model, tokenizer, "x", 48, raw=True, regex=pattern, seed=seed,
            max_denoising_steps=3, canvas_length=8,
        )  # fmt: skip
        assert re.fullmatch(pattern, found.text)
        assert len(found.tokens) <= 48
        assert len(found.denoising_steps) >= len(found.tokens) / 8


def test_what_is_forced_ahead_is_seen_before_it_is_reached():
    """The givens of a sudoku in a pattern: the model needs those behind a cell to fill it."""
    model, tokenizer = demo()
    rng, right, passes = np.random.default_rng(4), 0, 0
    for seed in range(6):
        puzzle = sudoku.make_puzzle(rng)
        pattern = puzzle.givens.replace(".", "[1-6]").replace("\n", "\\n")
        found = generate_structured(model, tokenizer, "sudoku", regex=pattern, seed=seed)
        right, passes = right + (found.text == puzzle.solution), passes + found.passes
    assert right >= 4
    assert passes <= 6 * 8


def test_what_may_be_anything_takes_hardly_more_passes_than_without_a_grammar():
    model, tokenizer = demo()
    passes = plain = 0
    for seed in range(4):
        found = generate_structured(model, tokenizer, "sudoku", 60, regex="(?s:.*)", seed=seed)
        last = list(stream_generate(model, tokenizer, "sudoku", 60, seed=seed))[-1]
        passes, plain = passes + found.passes, plain + sum(last.denoising_steps)
    assert passes <= 1.2 * plain


def test_a_free_string_takes_hardly_more_passes_than_a_plain_answer():
    """With guesses in place of a model, which would write on for ever: a string in quotes is ended
    where its room ends. (A draft that is certain up to the last token was looked at without end.)
    """
    model, tokenizer = tiny(canvas=64)
    words = vocabulary(model, tokenizer)
    how = {"raw": True, "canvas_length": 64, "eos_token_ids": words.eos}
    passes = plain = 0
    for seed in range(12):
        steps: list[object] = []

        def stepped(step: object, steps: list[object] = steps) -> None:
            steps.append(step)
            assert len(steps) < 64, "the answer takes more passes than tokens"

        found = generate_structured(
            model, tokenizer, "x", 48, json_schema={"type": "string"}, seed=seed,
            denoiser=Guesses(model, words, seed, "word"), on_step=stepped, **how,
        )  # fmt: skip
        assert len(found.tokens) == 48 and isinstance(json.loads(found.text), str)
        last = list(
            stream_generate(
                model, tokenizer, "x", 48, seed=seed, stop_at_eos=False,
                denoiser=Guesses(model, words, seed, "word"), **how,
            )
        )[-1]  # fmt: skip
        passes, plain = passes + found.passes, plain + sum(last.denoising_steps)
    assert passes <= 1.2 * plain


def test_an_error_on_the_way_keeps_what_was_written(monkeypatch):
    model, tokenizer = tiny()
    advance, copy = GrammarMatcher.advance, GrammarMatcher.copy
    written: list[int] = []

    def failing(self, tokens):
        if not hasattr(self, "copied"):
            if len(written) > 6:
                raise DiffGemmaError("the constraint cannot be followed: too complex")
            written.extend(tokens)
        advance(self, tokens)

    def copied(self):
        other = copy(self)
        other.copied = True
        return other

    monkeypatch.setattr(GrammarMatcher, "advance", failing)
    monkeypatch.setattr(GrammarMatcher, "copy", copied)
    with pytest.raises(UnmetConstraintError, match=r"^the constraint cannot be followed") as error:
        generate_structured(
            model, tokenizer, "x", 40, raw=True, regex="<<a[0-9]{20}", seed=0,
            max_denoising_steps=3, canvas_length=8,
        )  # fmt: skip
    assert error.value.partial == vocabulary(model, tokenizer).decode(written)
    assert re.fullmatch("<<a[0-9]+", error.value.partial)


def test_choices_and_json_values():
    model, tokenizer = tiny()
    words = ["yes", "no", "not sure (yet)", "🦊"]
    found = generate_structured(
        model, tokenizer, "x", raw=True, choices=words, seed=1, max_denoising_steps=3
    )
    assert found.text in words
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
    listed = generate_structured(
        model, tokenizer, "x", 64, raw=True, json_schema=schema, seed=1, max_denoising_steps=3
    )
    assert len(listed.value) == 2


def test_room_for_the_end_is_kept():
    """Recursion and unbounded strings would go on for ever; the budget ends them validly."""
    model, tokenizer = tiny()
    node = {"type": "object", "properties": {"s": {"type": "string"}, "c": {"$ref": "#"}}}
    for seed in range(6):
        for most in (2, 9, 21, 50):
            found = generate_structured(
                model, tokenizer, "x", most, raw=True, json_schema=node, seed=seed,
                max_denoising_steps=2, canvas_length=10,
            )  # fmt: skip
            jsonschema.validate(json.loads(found.text), node)
            assert len(found.tokens) <= most


def test_errors_come_before_the_model_runs():
    model, tokenizer = tiny()

    def error(**constraint):
        with pytest.raises(UsageError) as raised:
            generate_structured(
                model, tokenizer, "x", constraint.pop("most", 40), raw=True, **constraint
            )
        return str(raised.value)

    assert error() == "give one of json_schema, regex and choices."
    assert error(regex="a", choices=["b"]) == "give one of json_schema, regex and choices."
    assert error(choices=["a", ""]) == "give at least one choice, and none of them empty."
    assert error(regex="a(").startswith("the regular expression cannot be used: ")
    impossible = {"type": "string", "minLength": 5, "maxLength": 2}
    assert error(json_schema=impossible) == (
        "the JSON schema cannot be used: Unsatisfiable schema: minLength (5) is greater than "
        "maxLength (2)"
    )
    assert error(regex="[a-f]{50}", most=20) == (
        "max_tokens is 20, and the shortest output found that matches takes 50 tokens; raise "
        "max_tokens or loosen the constraint."
    )
    with pytest.raises(ClosingError) as raised:
        generate_structured(model, tokenizer, "x", 20, raw=True, regex="[a-f]{50}")
    assert raised.value.shortest == 50


def test_the_same_seed_gives_the_same_answer():
    model, tokenizer = tiny()
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 9}}}
    first, again = (
        generate_structured(
            model, tokenizer, "x", 60, raw=True, json_schema=schema, seed=4, max_denoising_steps=3
        )
        for _ in range(2)
    )
    assert first == again

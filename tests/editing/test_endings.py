"""Ways out of grammars: every ending matches, what can be satisfied has one, no search is long."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from big_vocabulary import EOS, SIZE, big
from json_schemas import random_schema
from small_models import demo, tiny, vocabulary

from mlx_diffgemma.diffusion.lookahead import tokens_in
from mlx_diffgemma.editing import endings as module
from mlx_diffgemma.editing.grammar import GrammarMatcher, json_schema_matcher, regex_matcher
from mlx_diffgemma.editing.structured import generate_structured
from mlx_diffgemma.editing.vocabulary import Vocabulary

REGEXES = [
    r".+,.+",
    r"\S+ \S+ \S+",
    r".*hello.*",
    r"(.*\n)*END",
    r"[a-z]{1000}",
    r"[a-z]cole",
    r"\wcole",
    r"[0-9]{40}x",
    r"(ab|cd){3,5}z{2}q?",
    r"[A-F0-9]{8}(-[A-F0-9]{4}){3}",
    r"[^@\s]+@[^@\s]+\.[^@\s]+",
    r"(https?://)?[a-z.]+/[0-9]+\?q=.*;",
]
PATTERNS = [
    "hello",
    r"@example\.com$",
    r"^[^@\s]+@[^@\s]+\.[^@\s]+$",
    "[a-z]cole",
    r"\wcole",
    r"^\+?[0-9]{3}-[0-9]{4}$",
    "é+x",
    'say "yes"',
]


def text(**keywords: Any) -> dict[str, Any]:
    return {"type": "string", **keywords}


SCHEMAS: list[dict[str, Any]] = [
    *(text(pattern=pattern) for pattern in PATTERNS),
    *(text(format=name) for name in ("email", "date-time", "uuid", "uri", "ipv4", "duration")),
    text(minLength=300),
    {"allOf": [text(pattern="[A-Z]"), text(pattern="[0-9]"), text(pattern="[!@#]", minLength=8)]},
    {"type": "integer", "multipleOf": 7, "minimum": 100},
    {
        "type": "object",
        "properties": {
            "a": text(pattern="hello", minLength=40),
            "b": {"type": "array", "items": text(format="email"), "minItems": 3},
        },
        "required": ["a", "b"],
    },
    {
        "type": "object",
        "patternProperties": {"^x[a-z]cole": {"type": "integer"}},
        "additionalProperties": False,
        "minProperties": 1,
    },
]


def small() -> Vocabulary:
    return vocabulary(*tiny())


def large() -> Vocabulary:
    return Vocabulary(big(), SIZE, EOS)


def completed(words: Vocabulary, matcher: GrammarMatcher) -> str:
    ending = matcher.way_out(4096, thorough=True)
    assert ending is not None
    after = matcher.copy()
    after.advance(ending)
    assert after.may_end
    return words.decode(ending)


@pytest.mark.parametrize("load", [small, large])
@pytest.mark.parametrize("pattern", REGEXES)
def test_a_regex_has_a_way_out(load, pattern):
    words = load()
    assert re.fullmatch(pattern, completed(words, regex_matcher(words, pattern)))


@pytest.mark.parametrize("load", [small, large])
@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_a_schema_has_a_way_out(load, schema):
    words = load()
    value = json.loads(completed(words, json_schema_matcher(words, schema)))
    jsonschema.validate(value, schema)


def test_random_schemas_have_ways_out_from_anywhere():
    """From wherever a random draft leads to; what was afforded once stays affordable."""
    words, rng = small(), np.random.default_rng(5)
    for _ in range(60):
        schema = random_schema(rng)
        matcher = json_schema_matcher(words, schema)
        completed(words, matcher)
        written: list[int] = []
        for _ in range(int(rng.integers(0, 12))):
            step = matcher.forced()
            if not step:
                open_tokens = [i for i in tokens_in(matcher.allowed()) if words.pieces[i]]
                if not open_tokens:
                    break
                step = [int(rng.choice(open_tokens))]
            after = matcher.copy()
            after.advance(step)
            if after.way_out(4096) is None:
                continue
            matcher, written = after, written + step
            most = len(after.way_out(4096))
            for _ in range(3):
                assert len(matcher.way_out(most)) <= most
        value = words.decode(written) + completed(words, matcher)
        jsonschema.validate(json.loads(value), schema)


def test_endings_are_written_in_the_tokens_of_the_tokenizer():
    """300 characters are far fewer tokens than that."""
    words = large()
    ending = json_schema_matcher(words, text(minLength=300)).way_out(4096, thorough=True)
    assert ending is not None and len(ending) < 200
    (only,) = regex_matcher(words, r"  ").way_out(1)
    assert words.pieces[only] == b"  "


@pytest.mark.parametrize("pattern", [r".*hello.*", r"(a|b)*c{40}", r"\w+@\w+"])
def test_work_is_bounded_and_what_was_found_is_remembered(pattern, monkeypatch):
    words = small()
    matcher = regex_matcher(words, pattern)
    first = matcher.way_out(4096, thorough=True)

    def forbidden(*_: Any) -> None:
        raise AssertionError("an ending is known")

    monkeypatch.setattr(module, "straight", forbidden)
    monkeypatch.setattr(module.Endings, "_search", forbidden)
    assert matcher.way_out(4096) == first
    after = matcher.copy()
    after.advance(first[:2])
    assert len(after.way_out(4096)) <= len(first) - 2


def test_what_has_no_way_out_says_so_soon(monkeypatch):
    steps = 0
    inner = module.straight

    def counted(*arguments: Any) -> Any:
        nonlocal steps
        walk = inner(*arguments)
        steps += walk.steps
        return walk

    monkeypatch.setattr(module, "straight", counted)
    matcher = regex_matcher(small(), "(.*[a-f]{3000}.*)+")
    assert matcher.way_out(20) is None
    assert steps <= 2500


def test_ways_out_keep_to_what_the_vocabulary_writes():
    model, tokenizer = demo()
    words = vocabulary(model, tokenizer)
    assert regex_matcher(words, "größe").way_out(99, thorough=True) is None
    assert completed(words, regex_matcher(words, "größe|ab")) == "ab"
    assert completed(words, regex_matcher(words, "[äö]*[a-z]+")).isascii()
    for pattern in ("grö.*|b", "(ä|b)+c"):
        found = generate_structured(
            model, tokenizer, "x", 12, regex=pattern, seed=1, max_denoising_steps=3
        )
        assert re.fullmatch(pattern, found.text)

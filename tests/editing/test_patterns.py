"""Patterns of daily use as JSON Schema reads them: what can be satisfied has an answer."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

import jsonschema
import pytest
from big_vocabulary import EOS, SIZE, big
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import demo, tiny, vocabulary

from mlx_diffgemma.diffusion.closing import ClosingError
from mlx_diffgemma.editing import endings as module
from mlx_diffgemma.editing.examples import example
from mlx_diffgemma.editing.grammar import closer, json_schema_matcher, regex_matcher
from mlx_diffgemma.editing.structured import generate_structured
from mlx_diffgemma.editing.validated import validator
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.errors import UsageError

LONG = ["a{1000}", "[a-z]{1000}", "[a-z]{3}[0-9]{3}[a-z]{300}z", "((ab|cd){5}x?){120}"]
DAILY = [
    r"\d{3}-\d{4}", r"\(\d{3}\) \d{3}-\d{4}", r"\+\d{1,3}( \d{2,4}){3}", r"0\d{2,4}/\d{5,8}",
    r"\d{4}-\d{2}-\d{2}", r"\d{1,2}\.\d{1,2}\.\d{4}", r"\d{2}/\d{2}/\d{2}", r"\d{4}-W[0-5]\d",
    r"\d{2}:\d{2}(:\d{2})?", r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z", r"Q[1-4] 20\d{2}",
    r"[0-9a-f]{8}", r"#[0-9A-Fa-f]{6}", r"0x[0-9a-fA-F]{4,}", r"[0-9a-f]{40}", r"[0-9a-f]{64}",
    r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", r"[0-9A-HJKMNP-TV-Z]{26}",
    r"sha256:[a-f0-9]{64}", r"\d+\.\d+\.\d+",
    r"v(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?", r">=\d+\.\d+",
    r"[A-Z]{1,3}-[A-Z]{1,2} \d{1,4}", r"[A-Z]{2}\d{2} [A-Z]{3}", r"\d[A-Z]{3}\d{3}",
    r"[A-Z]{2}\d{2}( ?[A-Z0-9]{4}){3,7}", r"[A-Z]{6}[A-Z0-9]{2}", r"(\d{4}[ -]?){3}\d{4}",
    r"\d{3}-\d{2}-\d{4}", r"97[89]-\d-\d{4}-\d{4}-\d", r"10\.\d{4,9}/\S+",
    r"[A-Z]\d[A-Z] \d[A-Z]\d", r"\d{5}(-\d{4})?", r"INV-\d{6}", r"[A-Z]+-\d+", r"R\d{4}/[a-z]{2}",
    r"SKU[_-]?[A-Z0-9]{8}", "a\\tb", "\\w+\\t\\w+\\t\\d+", "[^\\t]+\\t[^\\t]+", "\\d+;\\d+;\\d+",
    r"key=\w+;", "one\\ntwo", r"[^@\s]+@[^@\s]+\.[a-z]{2,}", r"https?://[\w.-]+/\w+",
    r"\d{1,3}(\.\d{1,3}){3}:\d+", r"([0-9A-F]{2}:){5}[0-9A-F]{2}", r"/[a-z]+/[0-9]+\.json",
    r"[A-Z]:\\\w+", r"\.(png|jpe?g)", r"[A-Z][a-z]+ [A-Z][a-z]+", r"\w+, \w+", r"[.!?] ",
    r"\s\S+\s", r"\"\w+\"", r"<(b|i)>\w+</(b|i)>", r"[+--]{2}=", r"\$\d+\.\d{2}",
    r"\d+(,\d{3})* ?EUR", r"[+-]?\d+\.\d+[eE][+-]?\d{2}", r"-?\d{1,3}\.\d+, -?\d+\.\d+",
    r"[\[(]\d+, \d+[\])]", r"[a-z]{2}-[A-Z]{2}", r"(?:foo|ba[rz]){2,}!", r"[[:alpha:]]+",
    r"[a&&b]{3}%", r"\u0041\x42[^a-z]{3}", r"x{3}|y{2}z", r"(a|b)*c{40}", "", "é{3}ß",
]  # fmt: skip


def as_name(pattern: str) -> dict[str, Any]:
    kinds = {pattern: {"type": "integer"}}
    closed = {"type": "object", "additionalProperties": False, "minProperties": 1}
    return {**closed, "patternProperties": kinds}


def answer(words: Vocabulary, schema: dict[str, Any]) -> Any:
    matcher = json_schema_matcher(words, schema)
    ending = matcher.way_out(4096, thorough=True)
    assert ending is not None, schema
    assert matcher.matching([*ending, words.eos[0]]) == len(ending) + 1
    return json.loads(words.decode(ending))


def check(words: Vocabulary, pattern: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of `re`, about classes within classes
        for schema in ({"type": "string", "pattern": pattern}, as_name(pattern)):
            assert not validator(schema)(answer(words, schema)), schema


@pytest.mark.parametrize("pattern", DAILY + LONG)
def test_a_pattern_has_an_answer(pattern):
    check(vocabulary(*tiny()), pattern)


def test_patterns_have_answers_in_the_words_of_a_large_vocabulary():
    words = Vocabulary(big(), SIZE, EOS)
    for pattern in DAILY[::6] + LONG:
        check(words, pattern)


def test_several_patterns_have_one_answer():
    words = vocabulary(*tiny())
    kinds = [{"pattern": r"\d{3}-\d{4}"}, {"pattern": "[A-Z]{3}"}, {"pattern": "x#y"}]
    schema = {"type": "string", "allOf": kinds, "minLength": 30, "maxLength": 90}
    jsonschema.validate(answer(words, schema), schema)
    fields = {f"f{n}": {"type": "string", "pattern": each} for n, each in enumerate(DAILY)}
    schema = {"type": "object", "properties": fields, "required": list(fields)}
    jsonschema.validate(answer(words, schema), schema)


@pytest.mark.parametrize("pattern", [DAILY[0], DAILY[21], r"\w+\t\d{3}"])
def test_a_pattern_is_answered_by_a_model(pattern):
    schema = {"type": "string", "pattern": pattern}
    given = {"seed": 0, "max_denoising_steps": 2, "raw": True}
    for model in (demo(), tiny()):
        found = generate_structured(*model, "x", 40, json_schema=schema, **given)
        jsonschema.validate(found.value, schema)


def test_what_is_too_long_says_so():
    words = vocabulary(*tiny())
    with pytest.raises(ClosingError, match=r"the shortest output found that matches takes 10,002"):
        matcher = json_schema_matcher(words, {"type": "string", "pattern": "^(a{100}){100}$"})
        closer(words).require(matcher, 256)
    for schema in ({"type": "string", "pattern": "(a{100}){100}"}, as_name("(a{100}){100}")):
        with pytest.raises(UsageError, match=r"takes 10,000 characters, which are too complex"):
            json_schema_matcher(words, schema)


def test_the_shortest_that_is_too_long_is_found_once(monkeypatch):
    names = [f"p{number}" for number in range(300)]
    kinds = {name: {"type": "integer"} for name in names}
    matcher = json_schema_matcher(
        vocabulary(*tiny()), {"type": "object", "properties": kinds, "required": names}
    )
    assert matcher.way_out(99, thorough=True) is None

    def forbidden(*_: Any) -> None:
        raise AssertionError("an ending is known")

    monkeypatch.setattr(module, "straight", forbidden)
    assert len(matcher.way_out(4096, thorough=True)) > 99


def test_a_trial_leaves_the_matcher_as_it_was():
    """A lexer that grows too complex fails in all copies of its matcher."""
    matcher = regex_matcher(vocabulary(*tiny()), ".*(a{100}){100}.*")
    assert matcher.way_out(4096, thorough=True) is None
    assert not matcher._spelled.is_error() and matcher.allowed().any()


ATOMS = st.sampled_from(
    ["a", "Z7", "-", r"\d", r"\w", r"\s", r"\.", r"\t", "[a-c]", "[^a]", r"[\]x]", "[0-9A-F_]", "."]
)  # fmt: skip
REGEXES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda each: f"({'|'.join(each)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{3}", "{2,}", "{1,4}", "+?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(REGEXES)
def test_an_example_matches(pattern):
    found = example(pattern)
    assert found is not None and re.fullmatch(pattern, found)


@settings(max_examples=40, deadline=None)
@given(REGEXES)
def test_any_pattern_has_an_answer(pattern):
    schema = {"type": "string", "pattern": pattern}
    jsonschema.validate(answer(vocabulary(*tiny()), schema), schema)


@pytest.mark.parametrize(
    "pattern", ["(", "[", "\\", "a)", "(((", "{", "x{9}" * 3 + "{99999}" * 9, "(?"]
)
def test_no_pattern_breaks_the_reader(pattern):
    assert len(example(pattern) or "") <= 2**15

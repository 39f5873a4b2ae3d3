"""Schemas of many fields, each with a pattern of its own: the work for a field does not grow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest
from small_models import tiny, vocabulary

from mlx_diffgemma.editing.grammar import GrammarMatcher, closer, json_schema_matcher
from mlx_diffgemma.editing.structured import generate_structured

WORDS = vocabulary(*tiny())
FURTHEST = 32_768


class Counted:
    """A matcher of bytes that counts in `calls` what it and its copies are asked."""

    def __init__(self, inner: Any, calls: list[str]) -> None:
        self._inner, self.calls = inner, calls

    def deep_copy(self) -> Counted:
        self.calls.append("deep_copy")
        return Counted(self._inner.deep_copy(), self.calls)

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return getattr(self._inner, name)


def pattern(number: int) -> str:
    return (
        f"[a-z]cole{number}",
        rf"x{number}\d{{3}}-\d{{4}}",
        f"(ab{number}|c{number}d)z{{2}}q?",
        f"[A-F]+{number}(-[0-9]{{2}}){{2}}",
        f"[0-9]{{2}}[A-F]{number}[^a-z]",
    )[number % 5]


def matching(number: int) -> str:
    return (
        f"zcole{number}",
        f"x{number}123-4567",
        f"c{number}dzz",
        f"BAD{number}-11-22",
        f"00B{number}!",
    )[number % 5]


def form(kinds: list[dict[str, Any]]) -> dict[str, Any]:
    fields = {f"f{number}": {"type": "string", **kind} for number, kind in enumerate(kinds)}
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }


def patterns(count: int, *, anchored: bool = False) -> list[dict[str, Any]]:
    found = map(pattern, range(count))
    return [{"pattern": f"^(?:{each})$" if anchored else each} for each in found]


def counted(schema: Mapping[str, Any], begun: str = "") -> tuple[GrammarMatcher, list[str]]:
    """A matcher of `schema` that has taken in `begun`, and the list of the calls of its byte
    matcher."""
    matcher, calls = json_schema_matcher(WORDS, schema), list[str]()
    tokens = [WORDS.single_bytes[byte] for byte in begun.encode()]
    assert matcher.matching(tokens) == len(tokens)
    matcher.advance(tokens)
    matcher._spelled = Counted(matcher._spelled, calls)
    return matcher, calls


def work(calls: list[str]) -> float:
    """What calls cost, in walked steps: to validate a word is quick, since most fail early."""
    return sum(1 / 16 if call == "validate_tokens" else 1 for call in calls)


def closed(schema: Mapping[str, Any], begun: str = "", *, thorough: bool = True) -> float:
    """The work that an ending behind `begun` takes; what it completes validates."""
    matcher, calls = counted(schema, begun)
    ending = matcher.way_out(FURTHEST, thorough=thorough)
    assert ending is not None
    jsonschema.validate(json.loads(begun + WORDS.decode(ending)), schema)
    return work(calls)


@pytest.mark.parametrize("anchored", [False, True])
def test_work_for_a_field_does_not_grow(anchored):
    few, many = (closed(form(patterns(count, anchored=anchored))) for count in (50, 200))
    assert few <= 50 * 20 and many / 200 <= few / 50 * 1.05


def test_the_order_of_the_patterns_may_be_another():
    """The first ending looks for each example; the next one knows which comes after which."""
    kinds = {f"f{number}": kind for number, kind in enumerate(patterns(200))}
    schema = form([{"$ref": f"#/$defs/{name}"} for name in kinds])
    matcher, calls = counted({"$defs": dict(reversed(kinds.items())), **schema})
    assert matcher.way_out(FURTHEST, thorough=True) is not None
    first = work(calls)
    calls.clear()
    matcher._endings._found.clear()
    assert matcher.way_out(FURTHEST) is not None
    assert work(calls) <= 200 * 20 and first <= 200 * 35


def test_several_patterns_or_a_length_for_each_field_grow_no_work():
    several = [{"allOf": [{"pattern": f"[A-Z]{n}"}, {"pattern": f"[!@]{n}x"}]} for n in range(64)]
    few, many = (closed(form(several[:count])) for count in (32, 64))
    assert few <= 32 * 25 and many / 64 <= few / 32 * 1.05
    longer = [{**kind, "minLength": 40} for kind in patterns(80)]
    few, many = (closed(form(longer[:count])) for count in (40, 80))
    assert many / 80 <= few / 40 * 1.05


@pytest.mark.parametrize("inside", ["", ', "f100": "and then' + " text" * 30])
def test_the_rest_is_closed_from_the_middle(inside):
    """Behind values of the model's own, with no ending remembered and no thorough search."""
    written = (f'"f{number}": "{"so " * 12}{matching(number)} on"' for number in range(100))
    taken = closed(form(patterns(200)), "{" + ", ".join(written) + inside, thorough=False)
    assert taken <= 100 * 20


def test_a_model_writes_many_fields():
    model, tokenizer = tiny()
    schema = form(patterns(16))
    closer(WORDS).require(json_schema_matcher(WORDS, schema), 400)
    found = generate_structured(
        model, tokenizer, "x", 400, json_schema=schema, raw=True, seed=0, max_denoising_steps=1
    )
    jsonschema.validate(found.value, schema)

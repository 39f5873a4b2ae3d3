"""What a JSON schema says is enforced exactly, refused in a line, or validated afterwards."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from small_models import tiny, vocabulary

from mlx_diffgemma.editing.grammar import GrammarMatcher, json_schema_matcher
from mlx_diffgemma.editing.structured import UnmetConstraintError, generate_structured
from mlx_diffgemma.editing.validated import validator
from mlx_diffgemma.errors import UsageError

KIND = {"properties": {"kind": {"const": "card"}}, "required": ["kind"]}
A_OR_B = {"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
CLOSED = A_OR_B | {"type": "object", "additionalProperties": False}


def listed(*values: Any, **keywords: Any) -> dict[str, Any]:
    return {"type": "array", "items": {"enum": list(values)}, "uniqueItems": True, **keywords}


EXACT: list[tuple[Any, list[Any], list[Any]]] = [
    (listed("a", "b", "c"), [[], ["b"], ["c", "a", "b"]], [["a", "a"], ["d"]]),
    (listed(1, 2, 1.0, minItems=2), [[2, 1]], [[1], [1, 1], [1, 2, 1]]),
    ({"not": {"enum": ["a", "ab", 1, None]}}, ["", "b", "abc", 2, 0.5, True, {}], ["a", "ab", 1]),
    ({"type": "integer", "not": {"enum": [1, 3]}}, [0, 2, 4], [1, 3, "a"]),
    ({"enum": ["a", "b", 1], "not": {"const": "b"}}, ["a", 1], ["b"]),
    ({"type": "object", "not": {"required": ["a"]}}, [{}, {"b": 1}], [{"a": 1}]),
    (
        {
            "type": "object",
            "properties": {"kind": {"enum": ["card", "cash"]}, "code": {"type": "integer"}},
            "required": ["kind"],
            "additionalProperties": False,
            "if": KIND,
            "then": {"required": ["code"]},
            "else": {"properties": {"code": False}},
        },
        [{"kind": "card", "code": 1}, {"kind": "cash"}],
        [{"kind": "card"}, {"kind": "cash", "code": 1}],
    ),
    (CLOSED | {"dependentRequired": {"a": ["b"]}}, [{}, {"b": 1}, {"a": 1, "b": 2}], [{"a": 1}]),
    (CLOSED | {"dependencies": {"a": ["b"]}}, [{"b": 1}], [{"a": 1}]),
    (CLOSED | {"dependentSchemas": {"a": {"required": ["b"]}}}, [{"b": 1}], [{"a": 1}]),
    (CLOSED | {"minProperties": 1}, [{"a": 1}, {"a": 1, "b": 1}], [{}]),
    (CLOSED | {"minProperties": 2}, [{"a": 1, "b": 1}], [{}, {"b": 1}]),
    (CLOSED | {"maxProperties": 1}, [{}, {"b": 1}], [{"a": 1, "b": 1}]),
    (A_OR_B | {"type": "object", "minProperties": 1}, [{"a": 1}, {"x": ""}], [{}]),
    (
        A_OR_B | {"type": "object", "maxProperties": 1},
        [{}, {"a": 1}, {"x": ""}],
        [{"a": 1, "x": ""}, {"x": 1, "y": 1}],
    ),
    (
        {"type": "object", "propertyNames": {"pattern": "^[a-z]{1,3}$"}}
        | {"additionalProperties": {"type": "integer"}},
        [{}, {"abc": 1}],
        [{"abcd": 1}, {"A": 1}],
    ),
    ({"type": "object", "propertyNames": {"enum": ["a", "b"]}}, [{"b": 1}], [{"c": 1}]),
    (
        {"type": "array", "items": {"type": "integer"}, "contains": {"const": 7}, "maxItems": 3},
        [[7], [1, 7], [1, 2, 7]],
        [[], [1], [1, 2, 3]],
    ),
    (
        {
            "$defs": {
                name: {
                    "type": "object",
                    "properties": {"kind": {"const": name}, name: {"type": "boolean"}},
                    "required": ["kind"],
                    "additionalProperties": False,
                }
                for name in ("cat", "dog")
            },
            "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
        },
        [{"kind": "cat", "cat": True}, {"kind": "dog"}],
        [{"kind": "cat", "dog": True}, {"kind": "cow"}],
    ),
    ({"oneOf": [{"minimum": 2}, {"maximum": 3}], "type": "integer"}, [1, 4], [2, 3]),
    ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, [2**63 - 1, 0], [2**63]),
    ({"type": "integer", "maximum": 2**53 + 1}, [2**53], [2**53 + 2]),
    ({"type": "number", "minimum": 0, "maximum": 1e300}, [0.5, 12], [-1]),
    ({"const": 2**53 - 1}, [2**53 - 1], [2**53 - 2]),
    ({"const": 2**63 - 1}, [2**63 - 1], [2**63]),
    (
        {"type": "string", "format": "date"},
        ["2024-02-29", "2000-02-29", "2023-12-31"],
        ["2023-02-29", "1900-02-29", "2024-13-01", "0000-01-01"],
    ),
    ({"type": "string", "format": "time"}, ["22:59:59Z"], ["22:59:60Z", "24:00:00Z"]),
    (
        {"type": "string", "format": "date-time"},
        ["2024-02-29T00:00:00.5+01:00"],
        ["2023-02-29T00:00:00Z", "2024-01-01T00:00:60Z"],
    ),
    ({"type": "string", "pattern": "^[[:alpha:]]+$"}, [":]", "a]]"], ["a", "b]", "[:a"]),
    ({"type": "string", "pattern": "^[a&&b]+$"}, ["a&b"], ["c"]),
    ({"type": "string", "pattern": r"^[+--][\--a]$"}, [",Z"], ["aZ", ",z"]),
    *(
        ({"type": "string", "format": name}, ["any"], [1])
        for name in ("password", "binary", "byte", "uuid4", "path")
    ),
    ({"type": "array", "uniqueItems": False, "maxItems": 2.0}, [["a", "a"]], [[1, 2, 3]]),
    ({"if": {"const": 1}, "then": True}, [1, 2], []),
    ({"then": {"const": 1}, "minContains": 2}, [2], []),
    (True, [1, "a", {}], []),
    (
        {"$ref": "#/components/schemas/x", "components": {"schemas": {"x": {"not": {"const": 1}}}}},
        [2],
        [1],
    ),
    (CLOSED | {"x-guidance": {"lenient": True}}, [{"a": 1}], [{"c": 1}]),
    (
        {"type": "object", "properties": {"x-guidance": {"type": "integer"}}},
        [{"x-guidance": 1}],
        [{"x-guidance": "a"}],
    ),
    (A_OR_B | {"type": "object", "unevaluatedProperties": False}, [{"a": 1}], [{"c": 1}]),
]  # fmt: skip


def accepts(matcher: GrammarMatcher, value: Any) -> bool:
    tokens = vocabulary(*tiny()).encode(json.dumps(value, ensure_ascii=False))
    after = matcher.copy()
    if after.matching(tokens) < len(tokens):
        return False
    after.advance(tokens)
    return after.may_end


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")  # of classes within classes, by `re`
@pytest.mark.parametrize(("schema", "right", "wrong"), EXACT, ids=str)
def test_what_is_rewritten_allows_the_same(schema, right, wrong):
    matcher = json_schema_matcher(vocabulary(*tiny()), schema)
    for value in right:
        jsonschema.validate(value, schema)
        assert accepts(matcher, value), value
    for value in wrong:
        assert not accepts(matcher, value), value


def chain(length: int) -> dict[str, Any]:
    steps = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(length)}
    return {"$defs": steps | {f"d{length}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


def nested(keyword: str, depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {keyword: [schema] if keyword == "allOf" else schema}
    return schema


REFUSED: list[tuple[Any, str]] = [
    ({"const": 1234567890123456789}, "at /const, 1234567890123456789 would be written rounded"),
    ({"properties": {"a": {"enum": [1, -(2**63)]}}}, "at /properties/a/enum, -9223372036854775808"),
    ({"type": "integer", "minimum": 10**30}, f"at /minimum, the bound {10**30} leaves no number"),
    ({"const": 10**400}, "it holds a number of more than 300 digits"),
    (chain(1000), "its references lead more than 256 schemas deep"),
    (nested("items", 5000), "it is nested deeper than 100 levels"),
    (nested("allOf", 5000), "it is nested deeper than 100 levels"),
    ({"const": nested("a", 5000)}, "it is nested deeper than 100 levels"),
    ({"enum": [0] * 300_000}, "it holds more than 200,000 values"),
    ({"type": "array", "minItems": 10**6}, "at /minItems, 1000000 are more than the 4096"),
    ({"const": float("nan")}, "it holds nan, which is no number in JSON"),
    ({"items": {"x-guidance": {"lenient": True}, "$dynamicRef": "#a"}}, "at /items/$dynamicRef, "),
    (False, "it is false, so it allows nothing"),
    ([1], "a schema is an object, true or false, not [1]"),
    ({"properties": {"a": {"type": "sting"}}}, "at /properties/a/type, must be one of null,"),
    ({"items": {"pattern": "(?=a)b"}}, "at /items/pattern, look-around, including look-ahead and "),
    ({"pattern": r"(a)\1"}, "at /pattern, backreferences are not supported"),
    ({"patternProperties": {"[[]": True, r"[\[]": {}}}, "at /patternProperties, two of its"),
    ({"patternProperties": {"[": True}}, "at /patternProperties, unclosed character class"),
    ({"type": "object", "minProperties": 2}, "at /minProperties, two properties or more"),
    ({"type": "array", "uniqueItems": True}, "at /uniqueItems, 'uniqueItems' can be enforced for"),
    ({"type": "array", "contains": {"const": 1}}, "at /contains, 'contains' can be enforced in"),
    ({"not": {"pattern": "a"}}, "at /not, that 'pattern' does not hold cannot be enforced"),
    ({"allOf": [{"multipleOf": 65537}, {"multipleOf": 65539}]}, "has too many digits"),
    ({"format": "iri"}, "at /format, the format 'iri' cannot be enforced"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_the_rest_is_refused_in_a_line(schema, reason):
    with pytest.raises(UsageError) as error:
        json_schema_matcher(vocabulary(*tiny()), schema)
    message = str(error.value)
    assert message.startswith("the JSON schema cannot be used: ") and "\n" not in message
    assert reason in message


def test_what_is_refused_can_be_validated_instead():
    model, tokenizer = tiny()
    schema = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 9},
        "minItems": 2,
        "maxItems": 2,
        "uniqueItems": True,
    }
    settings = {"raw": True, "max_denoising_steps": 2, "json_schema": schema}
    seeds = set()
    for seed in range(4):
        found = generate_structured(model, tokenizer, "x", 20, validate=20, seed=seed, **settings)
        jsonschema.validate(found.value, schema)
        seeds.add(found.seed - seed)
    assert len(seeds) > 1  # some needed another try
    with pytest.raises(UsageError, match="uniqueItems"):
        generate_structured(model, tokenizer, "x", 20, seed=0, **settings)
    settings["json_schema"] = {"const": 3, "not": {"pattern": "", "const": 3}}
    with pytest.raises(UnmetConstraintError, match=r"not validate in 2 tries: .*; allow") as error:
        generate_structured(model, tokenizer, "x", 20, validate=2, seed=0, **settings)
    assert error.value.partial == "3"


def test_a_validator_fetches_nothing_and_says_why_in_a_line():
    assert validator({"properties": {"a": {"type": "null"}}})({"a": 1}) == (
        "1 is not of type 'null' at /a"
    )
    with pytest.raises(UsageError, match=r"its reference 'http://x\.y/z' is unknown"):
        validator({"$ref": "http://x.y/z"})(1)
    with pytest.raises(UsageError, match=re.escape("'sting' is not valid")):
        validator({"type": "sting"})

"""Schemas of what a JSON schema does not allow, and a test whether two schemas share no value."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

TYPES = ("null", "boolean", "number", "string", "array", "object")
_REFERENCES = 32  # references that are followed one after another

Schema = Any  # a parsed schema: a dict, True or False


class BeyondError(Exception):
    """A schema has no exact form in what the grammar enforces; the message says why, if there is
    more to say."""


def resolved(reference: str, root: Schema) -> Schema | None:
    """What a reference within the document names by a JSON pointer; None where there is none."""
    if not reference.startswith("#") or reference[1:2] not in ("", "/"):
        return None
    found = root
    for part in unquote(reference[2:]).split("/") if reference[1:] else ():
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found


def negated(schema: Schema) -> Schema:
    """A schema of just the values that `schema` does not allow.

    Raises:
        BeyondError: there is no such schema in what the grammar enforces.
    """
    if isinstance(schema, bool):
        return not schema
    cases = [case for key in schema if key in CONSTRAINING for case in _negated(key, schema)]
    cases = [case for case in cases if case is not False]
    if len(cases) == 1:
        return cases[0]
    return {"anyOf": cases} if cases else False


def _negated(key: str, schema: Mapping[str, Any]) -> list[Schema]:
    """Schemas of the values that break one keyword of `schema`; together they allow all of them."""
    value = schema[key]
    if key == "const":
        return _other_values([value])
    if key == "enum":
        return _other_values(value)
    if key == "type":
        types = [value] if isinstance(value, str) else value
        if "integer" in types and "number" not in types:
            raise BeyondError("that a number is no integer cannot be enforced")
        return _typed([name for name in TYPES if name not in types])
    if key == "required":
        return [{"type": "object", "properties": {name: False}} for name in value]
    if key == "properties":
        others = {name: negated(each) for name, each in value.items()}
        return [
            {"type": "object", "properties": {name: each}, "required": [name]}
            for name, each in others.items()
            if each is not False
        ]
    if key == "allOf":
        return [negated(each) for each in value]
    if key == "anyOf":
        return [{"allOf": [negated(each) for each in value]}]
    if key in _OPPOSITE_BOUNDS:
        return [{"type": "number", _OPPOSITE_BOUNDS[key]: value}]
    if key in _OPPOSITE_COUNTS:
        kind, opposite, step = _OPPOSITE_COUNTS[key]
        return [] if value + step < 0 else [{"type": kind, opposite: value + step}]
    raise BeyondError(f"that '{key}' does not hold cannot be enforced")


_OPPOSITE_BOUNDS = {
    "minimum": "exclusiveMaximum",
    "maximum": "exclusiveMinimum",
    "exclusiveMinimum": "maximum",
    "exclusiveMaximum": "minimum",
}
_OPPOSITE_COUNTS = {
    "minLength": ("string", "maxLength", -1),
    "maxLength": ("string", "minLength", 1),
    "minItems": ("array", "maxItems", -1),
    "maxItems": ("array", "minItems", 1),
}
CONSTRAINING = {
    "type", "const", "enum", "required", "properties", "allOf", "anyOf", "oneOf", "not", "if",
    "dependentRequired", "dependentSchemas", "dependencies", "minimum", "maximum", "multipleOf",
    "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "pattern", "format",
    "minItems", "maxItems", "items", "prefixItems", "additionalItems", "contains", "uniqueItems",
    "minProperties", "maxProperties", "additionalProperties", "patternProperties", "$ref",
    "propertyNames", "unevaluatedItems", "unevaluatedProperties",
}  # fmt: skip


def _typed(types: list[str]) -> list[Schema]:
    return [{"type": types}] if types else []


def _other_values(values: list[Any]) -> list[Schema]:
    """Schemas that together allow all values but these."""
    if any(isinstance(value, (list, Mapping)) for value in values):
        raise BeyondError("that a value is not one array or object cannot be enforced")
    strings = [value for value in values if isinstance(value, str)]
    switches = [value for value in values if isinstance(value, bool)]
    numbers = sorted({v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)})
    touched = {"null"} if None in values else set[str]()
    cases: list[Schema] = []
    if strings:
        touched.add("string")
        cases.append({"type": "string", "pattern": f"^(?:{_but(strings)})$"})
    if switches:
        touched.add("boolean")
        cases += [{"const": value} for value in (True, False) if value not in switches]
    if numbers:
        touched.add("number")
        bounds = [None, *numbers, None]
        for low, high in pairwise(bounds):
            edges = {"exclusiveMinimum": low, "exclusiveMaximum": high}
            cases.append({"type": "number"} | {k: v for k, v in edges.items() if v is not None})
    return _typed([name for name in TYPES if name not in touched]) + cases


def _but(strings: Iterable[str]) -> str:
    """A regular expression of all strings but these: it follows them character by character, and
    may leave them at any place."""
    following: dict[str, set[str]] = {}
    for string in strings:
        if string:
            following.setdefault(string[0], set()).add(string[1:])
    first = "".join(map(literal, following))
    ways = [f"{literal(character)}(?:{_but(rest)})" for character, rest in following.items()]
    ways.append(f"[^{first}](?s:.*)" if first else "(?s:.+)")
    if "" not in strings:
        ways.append("")
    return "|".join(ways)


def literal(text: str) -> str:
    """A regular expression, in Rust's syntax, of a text, also within a class."""
    return "".join(c if c.isalnum() and c.isascii() else f"\\x{{{ord(c):X}}}" for c in text)


def disjoint(one: Schema, other: Schema, root: Schema, left: int = _REFERENCES) -> bool:
    """Whether it is easily seen that no value satisfies both schemas. References are followed in
    `root`, at most `left` one after another."""
    if one is False or other is False:
        return True
    if one is True or other is True or not left:
        return False
    for first, second in ((one, other), (other, one)):
        target = first.get("$ref")
        if isinstance(target, str):
            named = resolved(target, root)
            if isinstance(named, (dict, bool)) and disjoint(named, second, root, left - 1):
                return True
        for whole in first.get("allOf", ()):
            if disjoint(whole, second, root, left - 1):
                return True
        ways = first.get("anyOf")
        if ways and all(disjoint(way, second, root, left - 1) for way in ways):
            return True
    values, others = listed(one), listed(other)
    if values is not None and others is not None:
        return not {key_of(value) for value in values} & {key_of(value) for value in others}
    if not _types_of(one) & _types_of(other):
        return True
    if _types_of(one) & _types_of(other) != {"object"}:
        return False
    here, there = one.get("properties", {}), other.get("properties", {})
    return any(
        disjoint(here.get(name, True), there.get(name, True), root, left - 1)
        for name in {*one.get("required", ()), *other.get("required", ())}
    )


def _types_of(schema: Mapping[str, Any]) -> set[str]:
    """The types that a schema may allow, integers as numbers."""
    values = listed(schema)
    if values is not None:
        return {_type_of(value) for value in values}
    types = schema.get("type", TYPES)
    named = {types} if isinstance(types, str) else set(types)
    return {"number" if name == "integer" else name for name in named}


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "string"
    return "object" if isinstance(value, Mapping) else "array"


def listed(schema: Schema) -> list[Any] | None:
    """The values that a schema lists; None where it lists none."""
    if isinstance(schema, bool):
        return None
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is None and schema.get("type") in ("boolean", "null"):
        return [True, False] if schema["type"] == "boolean" else [None]
    return values


def key_of(value: Any) -> str:
    """A text that is the same for values that JSON Schema takes for equal."""

    def plain(item: Any) -> Any:
        if isinstance(item, float) and item.is_integer():
            return int(item)
        if isinstance(item, Mapping):
            return {key: plain(each) for key, each in item.items()}
        return [plain(each) for each in item] if isinstance(item, (list, tuple)) else item

    return json.dumps(plain(value), sort_keys=True)

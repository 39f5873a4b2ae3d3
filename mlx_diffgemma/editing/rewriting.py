"""Keywords of JSON Schema that the grammar does not know, said exactly in those that it knows.

Each rule takes its keyword out of a schema and returns schemas that must hold besides: in place of
`not`, of conditions, dependencies, `oneOf`, `contains`, unique items, names and numbers of
properties. What has no such form raises `BeyondError`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations, pairwise, permutations
from math import comb, perm
from typing import Any
from urllib.parse import unquote

TYPES = ("null", "boolean", "number", "string", "array", "object")
_BRANCHES = 128  # of a rewriting by cases
_ARRAYS = 400  # that are listed in place of an array with unique items
_POSITIONS = 16  # where an item that an array must contain may stand
_REFERENCES = 32  # that are followed one after another

Schema = Any  # a parsed schema: a dict, True or False


class BeyondError(Exception):
    """There is no exact form; the message says why, if there is more to say."""


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
        BeyondError: it cannot be said.
    """
    if isinstance(schema, bool):
        return not schema
    cases = [case for key in schema if key in _CONSTRAINING for case in _negated(key, schema)]
    cases = [case for case in cases if case is not False]
    if len(cases) == 1:
        return cases[0]
    return {"anyOf": cases} if cases else False


def _negated(key: str, schema: Mapping[str, Any]) -> list[Schema]:
    """What breaks one keyword, in any of several ways."""
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
_CONSTRAINING = {
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
    """All values but these."""
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
    """A regular expression of all strings but these: along them, and off at any place."""
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


def _disjoint(one: Schema, other: Schema, root: Schema, left: int = _REFERENCES) -> bool:
    """Whether it is easily seen that no value satisfies both."""
    if one is False or other is False:
        return True
    if one is True or other is True or not left:
        return False
    for first, second in ((one, other), (other, one)):
        target = first.get("$ref")
        if isinstance(target, str):
            named = resolved(target, root)
            if isinstance(named, (dict, bool)) and _disjoint(named, second, root, left - 1):
                return True
        for whole in first.get("allOf", ()):
            if _disjoint(whole, second, root, left - 1):
                return True
        ways = first.get("anyOf")
        if ways and all(_disjoint(way, second, root, left - 1) for way in ways):
            return True
    values, others = _listed(one), _listed(other)
    if values is not None and others is not None:
        return not {_key(value) for value in values} & {_key(value) for value in others}
    if not _types_of(one) & _types_of(other):
        return True
    if _types_of(one) & _types_of(other) != {"object"}:
        return False
    properties = one.get("properties", {}), other.get("properties", {})
    return any(
        _disjoint(*(each.get(name, True) for each in properties), root, left - 1)
        for name in {*one.get("required", ()), *other.get("required", ())}
    )


def _types_of(schema: Mapping[str, Any]) -> set[str]:
    """The types that a schema may allow, integers as numbers."""
    values = _listed(schema)
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


def _listed(schema: Schema) -> list[Any] | None:
    """The values that a schema lists."""
    if isinstance(schema, bool):
        return None
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is None and schema.get("type") in ("boolean", "null"):
        return [True, False] if schema["type"] == "boolean" else [None]
    return values


def _key(value: Any) -> str:
    """The same for values that JSON Schema takes for equal."""

    def plain(item: Any) -> Any:
        if isinstance(item, float) and item.is_integer():
            return int(item)
        if isinstance(item, Mapping):
            return {key: plain(each) for key, each in item.items()}
        return [plain(each) for each in item] if isinstance(item, (list, tuple)) else item

    return json.dumps(plain(value), sort_keys=True)


def _any(cases: list[Schema]) -> Schema:
    return cases[0] if len(cases) == 1 else {"anyOf": cases}


def _unless(kind: str, cases: list[Schema]) -> list[Schema]:
    """One of the cases, for values of one type only."""
    return [{"anyOf": [{"type": [name for name in TYPES if name != kind]}, *cases]}]


def _not(schema: dict[str, Any], root: Schema) -> list[Schema]:
    values, refused = _listed(schema), _listed(schema["not"])
    if values is None or refused is None or len(schema["not"]) > 1:
        opposite = negated(schema["not"])
        del schema["not"]
        return [opposite]
    else:
        del schema["not"]
        gone = {_key(value) for value in refused}
        schema.pop("const", None)
        schema["enum"] = [value for value in values if _key(value) not in gone]
        return []


def _condition(schema: dict[str, Any], root: Schema) -> list[Schema]:
    condition = schema["if"]
    then, otherwise = schema.get("then", True), schema.get("else", True)
    cases: list[Schema] = []
    if then is not True or otherwise is not True:
        cases = [
            {"allOf": [condition, then]},
            {"allOf": [negated(condition), otherwise]},
        ]
        cases = [case for case in cases if False not in case["allOf"]]
    for key in ("if", "then", "else"):
        schema.pop(key, None)
    return [_any(cases)] if cases else []


def _without_condition(schema: dict[str, Any], root: Schema) -> list[Schema]:
    for key in ("then", "else"):
        schema.pop(key, None)
    return []


def _dependencies(key: str) -> Callable[[dict[str, Any], Schema], list[Schema]]:
    def rule(schema: dict[str, Any], root: Schema) -> list[Schema]:
        extra: list[Schema] = []
        for name, needed in schema.pop(key).items():
            needs = {"required": needed} if isinstance(needed, list) else needed
            if needs is not True and needed != []:
                extra.append({"anyOf": [{"properties": {name: False}}, needs]})
        return extra

    return rule


def _one_of(schema: dict[str, Any], root: Schema) -> list[Schema]:
    ways = schema["oneOf"]
    if any(not _disjoint(one, other, root) for one, other in combinations(ways, 2)):
        if len(ways) ** 2 > _BRANCHES:
            raise BeyondError("'oneOf' has too many ways that may hold together")
        ways = [
            {"allOf": [way, *map(negated, ways[:place] + ways[place + 1 :])]}
            for place, way in enumerate(ways)
            if way is not False
        ]
    del schema["oneOf"]
    return [{"anyOf": ways}]


def _contains(schema: dict[str, Any], root: Schema) -> list[Schema]:
    item, least = schema["contains"], schema.get("minContains", 1)
    if least != 0 or "maxContains" in schema:
        if least > 1 or "maxContains" in schema:
            raise BeyondError("how many items 'contains' counts cannot be enforced")
        most = schema.get("maxItems")
        if most is None or most > _POSITIONS:
            raise BeyondError(
                f"'contains' can be enforced in arrays whose maxItems is at most {_POSITIONS}"
            )
        cases = [{"type": "array", "items": [True] * n + [item]} for n in range(most)]
        extra = _unless("array", [case | {"minItems": len(case["items"])} for case in cases])
    else:
        extra = []
    for key in ("contains", "minContains", "maxContains"):
        schema.pop(key, None)
    return extra


def _without_contains(schema: dict[str, Any], root: Schema) -> list[Schema]:
    for key in ("minContains", "maxContains"):
        schema.pop(key, None)
    return []


def _unique(schema: dict[str, Any], root: Schema) -> list[Schema]:
    most = schema.get("maxItems")
    if schema["uniqueItems"] is False or (most is not None and most < 2):
        del schema["uniqueItems"]
        return []
    items = schema.get("items")
    target = items.get("$ref") if isinstance(items, Mapping) else None
    if isinstance(target, str) and len(items) == 1:
        items = resolved(target, root)
    values = _listed(items) if isinstance(items, (Mapping, bool)) else None
    if values is None or "prefixItems" in schema:
        raise BeyondError("'uniqueItems' can be enforced for items of an enum alone")
    different = list({_key(value): value for value in values}.values())
    least = schema.get("minItems", 0)
    most = len(different) if most is None else min(most, len(different))
    counts = range(least, most + 1)
    if sum(perm(len(different), count) for count in counts) > _ARRAYS:
        raise BeyondError(f"'uniqueItems' leaves more than the {_ARRAYS} arrays that can be listed")
    del schema["uniqueItems"]
    arrays = [list(each) for count in counts for each in permutations(different, count)]
    return _unless("array", [{"enum": arrays}])


def _names(schema: dict[str, Any], root: Schema) -> list[Schema]:
    names = schema["propertyNames"]
    if names is False:
        del schema["propertyNames"]
        return _unless("object", [{"type": "object", "maxProperties": 0}])
    patterns = [] if names is True else _name_patterns(names)
    del schema["propertyNames"]
    return [
        {"patternProperties": {pattern: True}, "additionalProperties": False}
        for pattern in patterns
    ]


def _name_patterns(names: Mapping[str, Any]) -> list[str]:
    """Regular expressions that all have to match a name."""
    patterns: list[str] = []
    values = _listed(names)
    if values is not None:
        strings = [literal(value) for value in values if isinstance(value, str)]
        patterns.append(f"^(?:{'|'.join(strings)})$" if strings else "[^\\s\\S]")
    for key in names:
        if key == "pattern":
            patterns.append(names[key])
        elif key == "allOf":
            patterns += [each for one in names[key] for each in _name_patterns(one)]
        elif key == "type" and "string" not in names[key]:
            raise BeyondError("'propertyNames' allows no string")
        elif key in _CONSTRAINING - {"const", "enum", "type", "minLength", "maxLength"}:
            raise BeyondError(f"'{key}' of names cannot be enforced")
    least, most = names.get("minLength", 0), names.get("maxLength")
    if least or most is not None:
        patterns.append(f"^(?s:.{{{least},{'' if most is None else most}}})$")
    return patterns


def _property_count(schema: dict[str, Any], root: Schema) -> list[Schema]:
    """All numbers of properties by cases, where all their names are known."""
    least, most = schema.get("minProperties", 0), schema.get("maxProperties")
    properties = schema.get("properties", {})
    required = set(schema.get("required", ()))
    optional = [n for n, each in properties.items() if n not in required and each is not False]
    closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    if not closed:
        return _open_property_count(schema, optional, least, most)
    few = max(0, least - len(required))
    many = len(optional) if most is None else min(len(optional), most - len(required))
    if few > len(optional) or many < 0:
        return [False]
    only_least = many == len(optional)
    counts = [few] if only_least else range(few, many + 1) if few else [many]
    if sum(comb(len(optional), count) for count in counts) > _BRANCHES:
        raise BeyondError("the number of properties leaves too many ways")
    for key in ("minProperties", "maxProperties"):
        schema.pop(key, None)
    cases = []
    for count in counts:
        for chosen in combinations(optional, count):
            others = {} if only_least else {n: False for n in optional if n not in chosen}
            needed = list(chosen) if few else []
            cases.append({"type": "object", "required": needed, "properties": others})
    return _unless("object", cases) if few or not only_least else []


def _open_property_count(
    schema: dict[str, Any], optional: list[str], least: int, most: int | None
) -> list[Schema]:
    """The same where other names are allowed; these are counted by the grammar, which does not
    compare them with each other: of two, both may be the same."""
    required = len(set(schema.get("required", ())))
    if least - required > 1:
        raise BeyondError("two properties or more can be asked for where all are named only")
    if not optional or (most is None and least <= required):
        return []
    many = 1 if most is None else min(len(optional), most - required)
    counts = range(1 if most is None else 0, many + 1)
    if sum(comb(len(optional), count) for count in counts) > _BRANCHES:
        raise BeyondError("the number of properties leaves too many ways")
    limits = {key: schema.pop(key) for key in ("minProperties", "maxProperties") if key in schema}
    cases: list[Schema] = []
    for count in counts:
        for chosen in combinations(optional, count):
            others = {} if most is None else {n: False for n in optional if n not in chosen}
            cases.append({"required": list(chosen), "properties": others})
    if most is None:
        # One of the named ones, or none of them and so another.
        cases.append({"properties": dict.fromkeys(optional, False), **limits})
    else:
        cases = [case | limits for case in cases]
    return _unless("object", [{"type": "object", **case} for case in cases])


def _unevaluated(key: str, keyword: str) -> Callable[[dict[str, Any], Schema], list[Schema]]:
    def rule(schema: dict[str, Any], root: Schema) -> list[Schema]:
        elsewhere = {"allOf", "anyOf", "oneOf", "$ref", "if", "contains", "dependentSchemas"}
        if schema[key] is not True and (elsewhere | {"$dynamicRef", "then"}) & schema.keys():
            raise BeyondError(f"'{key}' cannot be enforced beside references and combinations")
        value = schema.pop(key)
        older = key == "unevaluatedItems" and isinstance(schema.get("items"), list)
        if value is not True:
            schema.setdefault("additionalItems" if older else keyword, value)
        return []

    return rule


# In this order: what others look at comes first.
RULES: dict[str, Callable[[dict[str, Any], Schema], list[Schema]]] = {
    "unevaluatedProperties": _unevaluated("unevaluatedProperties", "additionalProperties"),
    "unevaluatedItems": _unevaluated("unevaluatedItems", "items"),
    "contains": _contains,
    "minContains": _without_contains,
    "maxContains": _without_contains,
    "uniqueItems": _unique,
    "minProperties": _property_count,
    "maxProperties": _property_count,
    "propertyNames": _names,
    "dependentRequired": _dependencies("dependentRequired"),
    "dependentSchemas": _dependencies("dependentSchemas"),
    "dependencies": _dependencies("dependencies"),
    "if": _condition,
    "then": _without_condition,
    "else": _without_condition,
    "not": _not,
    "oneOf": _one_of,
}

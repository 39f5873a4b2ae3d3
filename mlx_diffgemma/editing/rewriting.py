"""Exact forms of keywords of JSON Schema that the grammar does not know, in those that it knows.

Each rule takes its keyword out of a schema and returns schemas that must hold besides: in place of
`not`, of conditions, dependencies, `oneOf`, `contains`, unique items, names and numbers of
properties. What has no such form raises `BeyondError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate, combinations, permutations
from math import comb, perm
from typing import Any

from mlx_diffgemma.editing.negation import (
    CONSTRAINING,
    TYPES,
    BeyondError,
    Schema,
    disjoint,
    key_of,
    listed,
    literal,
    negated,
    resolved,
)

_BRANCHES = 128  # most cases of a rewriting by cases
_ARRAYS = 400  # most arrays that are listed in place of one with unique items
_POSITIONS = 16  # most positions where an item that an array must contain may stand


def _exceed(amounts: Iterable[int], most: int) -> bool:
    """Whether the sum is above `most`; no amount is taken after the one that shows it."""
    return any(total > most for total in accumulate(amounts))


def _unless(kind: str, cases: list[Schema]) -> list[Schema]:
    """Schemas by which a value of the type `kind` satisfies one of the cases; others are free."""
    return [{"anyOf": [{"type": [name for name in TYPES if name != kind]}, *cases]}]


def _not(schema: dict[str, Any], root: Schema) -> list[Schema]:
    values, refused = listed(schema), listed(schema["not"])
    both = "const" in schema and "enum" in schema
    if values is None or refused is None or both or len(schema["not"]) > 1:
        opposite = negated(schema["not"])
        del schema["not"]
        return [opposite]
    gone = {key_of(value) for value in refused}
    for key in ("not", "const"):
        schema.pop(key, None)
    schema["enum"] = [value for value in values if key_of(value) not in gone]
    return []


def _condition(schema: dict[str, Any], root: Schema) -> list[Schema]:
    condition = schema["if"]
    then, otherwise = schema.get("then", True), schema.get("else", True)
    trivial = then is True and otherwise is True
    cases = [] if trivial else [[condition, then], [negated(condition), otherwise]]
    for key in ("if", "then", "else"):
        schema.pop(key, None)
    if trivial:
        return []
    possible = [{"allOf": case} for case in cases if False not in case]
    return [{"anyOf": possible}] if possible else [False]


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
    if any(not disjoint(one, other, root) for one, other in combinations(ways, 2)):
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
    items: Any = schema.get("items")
    target = items.get("$ref") if isinstance(items, Mapping) else None
    if isinstance(target, str) and len(items) == 1:
        items = resolved(target, root)
    values = listed(items) if isinstance(items, (Mapping, bool)) else None
    if values is None or "prefixItems" in schema:
        raise BeyondError("'uniqueItems' can be enforced for items of an enum alone")
    different = list({key_of(value): value for value in values}.values())
    least = schema.get("minItems", 0)
    most = len(different) if most is None else min(most, len(different))
    counts = range(least, most + 1)
    if _exceed((perm(len(different), count) for count in counts), _ARRAYS):
        raise BeyondError(f"'uniqueItems' leaves more than the {_ARRAYS} arrays that can be listed")
    del schema["uniqueItems"]
    arrays = [list(each) for count in counts for each in permutations(different, count)]
    return _unless("array", [{"enum": arrays}])


def _names(schema: dict[str, Any], root: Schema) -> list[Schema]:
    names = schema["propertyNames"]
    if names is False:
        del schema["propertyNames"]
        return _unless("object", [{"type": "object", "maxProperties": 0}])
    patterns = _name_patterns(names)
    del schema["propertyNames"]
    return [
        {"patternProperties": {pattern: True}, "additionalProperties": False}
        for pattern in patterns
    ]


def _name_patterns(names: Schema) -> list[str]:
    """Regular expressions that all have to match a name."""
    if isinstance(names, bool):
        return [] if names else ["[^\\s\\S]"]
    patterns: list[str] = []
    values = listed(names)
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
        elif key in CONSTRAINING - {"const", "enum", "type", "minLength", "maxLength"}:
            raise BeyondError(f"'{key}' of names cannot be enforced")
    least, most = names.get("minLength", 0), names.get("maxLength")
    if least or most is not None:
        patterns.append(f"^(?s:.{{{least},{'' if most is None else most}}})$")
    return patterns


def _property_count(schema: dict[str, Any], root: Schema) -> list[Schema]:
    """The numbers of properties that `minProperties` and `maxProperties` allow, by cases."""
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
    if _exceed((comb(len(optional), count) for count in counts), _BRANCHES):
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
    """The numbers of properties that are allowed, by cases, where properties may have names that
    the schema does not list. The grammar counts these but does not compare their names with each
    other, so two of them may be the same."""
    required = len(set(schema.get("required", ())))
    if least - required > 1:
        raise BeyondError("two properties or more can be asked for where all are named only")
    if not optional or (most is None and least <= required):
        return []
    many = 1 if most is None else min(len(optional), most - required)
    counts = range(1 if most is None else 0, many + 1)
    if _exceed((comb(len(optional), count) for count in counts), _BRANCHES):
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


# The order matters: a rule comes before the rules that look at what it leaves.
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

"""JSON schemas in the keywords that the grammar enforces.

A schema comes from a request, so its size, its depth, the shape of every keyword and numbers that a
double cannot hold are checked before anything is built from it. Keywords that restrict nothing are
left out. Keywords that have an exact form in others are rewritten (`rewriting.py`). All other
keywords that the grammar does not enforce are refused, or ignored where the finished answer is
validated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from mlx_diffgemma.editing.ecma import without_nesting
from mlx_diffgemma.editing.negation import TYPES, BeyondError, resolved
from mlx_diffgemma.editing.rewriting import RULES
from mlx_diffgemma.editing.schema_limits import (
    check_levels,
    has_inner_ids,
    look_at,
    refusal,
)

_MOST = 4096  # most items or properties that a schema may ask for
_EXACT = 2**53  # beyond, not every integer is a double
_WIDEST = 2**63
_LARGEST_WHOLE = _WIDEST - 1

_SCHEMA = (
    "additionalProperties", "additionalItems", "contains", "propertyNames", "not", "if", "then",
    "else", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_COUNTS = (
    "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties",
    "minContains", "maxContains",
)  # fmt: skip
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_TYPES = (*TYPES, "integer")
_SILENT = (
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly",
    "$comment", "$vocabulary", "contentMediaType", "contentEncoding", "contentSchema",
    "$recursiveAnchor", "x-guidance",
)  # fmt: skip

_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-"
    f"(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5]"
    "[0-9])"
)
# These are written here: llguidance knows neither leap years nor minutes without a 60th second.
_FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "json-pointer": "^(?:/(?:[^~/]|~[01])*)*$",
}
_ENFORCED = ("duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")
_NOT_ENFORCED = (
    "idn-email", "idn-hostname", "iri", "iri-reference", "regex", "relative-json-pointer",
    "uri-reference", "uri-template",
)  # fmt: skip


@dataclass(frozen=True)
class Enforceable:
    """A schema that llguidance can be given.

    Attributes:
        schema: the schema in keywords that llguidance enforces.
        ignored: keywords that were left out, each with its place; empty unless the schema was read
            leniently.
    """

    schema: dict[str, Any]
    ignored: tuple[str, ...]


def enforceable(
    schema: Any, fault: Callable[[str], str | None], *, lenient: bool = False
) -> Enforceable:
    """`schema` in keywords that are enforced exactly; if `lenient`, the others are ignored.

    Args:
        fault: says why a regular expression cannot be used, or gives None.

    Raises:
        UsageError: the schema is malformed, too large, allows nothing or, unless `lenient`, uses
            what cannot be enforced.
    """
    look_at(schema)
    root = json.loads(json.dumps(schema, default=dict))
    if root is False:
        raise refusal("", "it is false, so it allows nothing")
    check_levels(root)
    reader = _Reader(root, fault, lenient)
    read = reader.read(root, "")
    if read is True:
        return Enforceable({}, ())
    reader.read_referenced(read)
    look_at(read, rewritten=True)
    return Enforceable(read, tuple(reader.ignored))


class _Reader:
    """Reads one schema.

    Attributes:
        ignored: keywords that were left out so far, each with its place.
    """

    def __init__(self, root: Any, fault: Callable[[str], str | None], lenient: bool) -> None:
        self.ignored: list[str] = []
        self._root, self._lenient = root, lenient
        self._fault = lru_cache(None)(fault)
        # Where a part of the schema has a name of its own, pointers may start there.
        self._known = {} if has_inner_ids(root) else root
        self._places, self._targets = set[str](), dict[str, None]()
        self._loose = set[str]()  # where something was ignored that must not be negated
        self._factors = set[Decimal]()

    def read(self, schema: Any, place: str) -> Any:
        """The schema that stands at `place`, an object, true or false, in enforced keywords."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise refusal(place, f"a schema is an object, true or false, not {_shown(schema)}")
        self._places.add(place)
        found: dict[str, Any] = {}
        for key, value in schema.items():
            if key not in _SILENT:
                inner, before = f"{place}/{_escaped(key)}", len(self.ignored)
                found[key] = self._keyword(key, value, inner)
                if len(self.ignored) > before:
                    self._loose.add(inner)
        self._patterns(found, place)
        for keyword in ("$dynamicRef", "$recursiveRef"):
            if keyword in found:
                self._refuse(found, keyword, place, f"'{keyword}' cannot be enforced")
        self._numbers(found, place)
        self._format(found, place)
        for keyword, rewrite in RULES.items():
            if keyword in found:
                self._rewrite(found, keyword, rewrite, place)
        return found

    def read_referenced(self, read: dict[str, Any]) -> None:
        """Read, in place, the parts of a schema that references name and that `read` passed by,
        since no schema stands there."""
        while self._targets:
            target, _ = self._targets.popitem()
            place = unquote(target[1:])
            if place in self._places:
                continue
            value = resolved(target, read) if self._known else None
            if value is None:
                why = "names nothing" if self._known else "cannot be followed beside an inner '$id'"
                raise refusal("", f"its reference '{target}' {why}")
            outer, _, last = place.rpartition("/")
            parent: Any = resolved("#" + outer, read)
            key: Any = last.replace("~1", "/").replace("~0", "~")
            parent[int(key) if isinstance(parent, list) else key] = self.read(value, place)

    def _rewrite(self, found: dict[str, Any], keyword: str, rewrite: Any, place: str) -> None:
        try:
            if keyword in ("not", "if", "oneOf") and f"{place}/{keyword}" in self._loose:
                raise BeyondError(f"'{keyword}' cannot be enforced")
            extra = rewrite(found, self._known)
        except BeyondError as beyond:
            self._refuse(found, keyword, place, str(beyond) or f"'{keyword}' cannot be enforced")
            return
        if extra:
            found["allOf"] = [*found.get("allOf", ()), *extra]

    def _refuse(self, found: dict[str, Any], keyword: str, place: str, reason: str) -> None:
        """Leave out a keyword if the reading is lenient, since the answer is then validated.

        Raises:
            UsageError: the reading is not lenient.
        """
        if not self._lenient:
            raise refusal(f"{place}/{_escaped(keyword)}", reason)
        self.ignored.append(f"{keyword} at {place or '/'}")
        value = found.pop(keyword)
        if keyword == "oneOf":
            found["allOf"] = [*found.get("allOf", ()), {"anyOf": value}]

    def _keyword(self, key: str, value: Any, place: str) -> Any:
        """The value of a keyword, with the schemas in it read."""
        if key in _SCHEMA or (key == "items" and not isinstance(value, list)):
            return self.read(value, place)
        if key in _LISTS or key == "items":
            _must(isinstance(value, list), place, "a list of schemas", value)
            return [self.read(each, f"{place}/{number}") for number, each in enumerate(value)]
        if key in _MAPS:
            _must(isinstance(value, Mapping), place, "an object with schemas", value)
            return {k: self.read(v, f"{place}/{_escaped(k)}") for k, v in value.items()}
        if key in ("dependencies", "dependentRequired"):
            _must(isinstance(value, Mapping), place, "an object", value)
            return {
                k: v if isinstance(v, list) else self.read(v, f"{place}/{_escaped(k)}")
                for k, v in value.items()
            }
        if key in _COUNTS:
            return _count(key, value, place)
        if key == "type":
            for name in value if isinstance(value, list) else [value]:
                _must(name in _TYPES, place, f"one of {', '.join(_TYPES)}", name)
        elif key in ("pattern", "format", "$ref"):
            _must(isinstance(value, str), place, "a string", value)
            if key == "$ref" and value[:2] in ("#", "#/"):
                self._targets[value] = None
        elif key in ("enum", "required"):
            _must(isinstance(value, list), place, "a list", value)
            if key == "required":
                for name in value:
                    _must(isinstance(name, str), place, "a list of strings", name)
        elif key == "uniqueItems":
            _must(isinstance(value, bool), place, "true or false", value)
        elif key == "multipleOf":
            _must(_is_number(value) and value > 0, place, "a number above 0", value)
        elif key in _BOUNDS:
            switch = key.startswith("exclusive") and isinstance(value, bool)
            _must(switch or _is_number(value), place, "a number", value)
        return value

    def _numbers(self, found: dict[str, Any], place: str) -> None:
        """Refuse numbers of `const` and `enum` that would be rounded and a `multipleOf` with too
        many digits, and move bounds that would be rounded inwards."""
        for keyword in ("const", "enum"):
            inexact = next((n for n in _numbers_in(found.get(keyword)) if not _is_exact(n)), None)
            if inexact is not None:
                reason = f"{inexact} would be written rounded to a double; let it be a string"
                self._refuse(found, keyword, place, reason)
        for switch, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            if found.get(switch) is False or (found.get(switch) is True and bound not in found):
                del found[switch]  # as draft 4 writes it
            elif found.get(switch) is True:
                found[switch] = found.pop(bound)
        for keyword in _BOUNDS:
            if keyword in found:
                self._bound(found, keyword, place)
        factor = found.get("multipleOf")
        if factor is not None:
            self._factors.add(Decimal(str(factor)))
            # llguidance multiplies them with each other in 32 bits.
            least = min(each.as_tuple().exponent for each in self._factors)
            if math.prod(each.scaleb(-min(0, int(least))) for each in self._factors) >= 2**32:
                reason = f"{factor} has too many digits to be enforced"
                self._refuse(found, "multipleOf", place, reason)

    def _patterns(self, found: dict[str, Any], place: str) -> None:
        if "pattern" in found:
            found["pattern"] = pattern = without_nesting(found["pattern"])
            if fault := self._fault(pattern):
                self._refuse(found, "pattern", place, fault)
        named = found.get("patternProperties", {})
        if named:
            found["patternProperties"] = {without_nesting(k): v for k, v in named.items()}
        same = len(found.get("patternProperties", ())) < len(named)
        for name in found.get("patternProperties", ()):
            fault = "two of its patterns mean the same" if same else self._fault(name)
            if fault:
                self._refuse(found, "patternProperties", place, fault)
                break

    def _bound(self, found: dict[str, Any], keyword: str, place: str) -> None:
        value, lower = found[keyword], keyword.endswith("inimum")
        if -_EXACT <= value <= _EXACT:
            return
        if value == _LARGEST_WHOLE and keyword == "maximum" and found.get("type") == "integer":
            return  # llguidance holds whole numbers to 64 bits
        if (value >= _WIDEST if lower else value <= -_WIDEST) or abs(value) == math.inf:
            reason = f"the bound {value} leaves no number that can be enforced"
            self._refuse(found, keyword, place, reason)
            return
        # A bound that is no double moves to the next one inwards: less is allowed, never more.
        widest = float(_WIDEST - 1024)
        near = float(max(-widest, min(widest, value)))
        if near < value and lower:
            near = math.nextafter(near, math.inf)
        elif near > value and not lower:
            near = math.nextafter(near, -math.inf)
        found[keyword] = int(near)

    def _format(self, found: dict[str, Any], place: str) -> None:
        name = found.get("format")
        if name in _FORMATS:
            del found["format"]
            found["allOf"] = [*found.get("allOf", ()), {"pattern": _FORMATS[name]}]
        elif name in _NOT_ENFORCED:
            self._refuse(found, "format", place, f"the format '{name}' cannot be enforced")
        elif name is not None and name not in _ENFORCED:
            del found["format"]  # a name that JSON Schema does not know says nothing


def _count(key: str, value: Any, place: str) -> int:
    whole = isinstance(value, float) and value.is_integer()
    right = not isinstance(value, bool) and (isinstance(value, int) or whole) and value >= 0
    _must(right, place, "a whole number from 0", value)
    count = int(value)
    if key in ("minItems", "minProperties") and count > _MOST:
        raise refusal(place, f"{count} are more than the {_MOST} that an answer may hold")
    return min(count, 2**31 - 1) if key.startswith("max") else count


def _must(holds: bool, place: str, right: str, value: Any) -> None:
    if not holds:
        raise refusal(place, f"must be {right}, not {_shown(value)}")


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def _escaped(key: str) -> str:
    """A key as JSON pointers write it."""
    return key.replace("~", "~0").replace("/", "~1")


def _numbers_in(value: Any) -> list[int | float]:
    waiting, found = [value], list[int | float]()
    while waiting:
        each = waiting.pop()
        if isinstance(each, Mapping):
            waiting += each.values()
        elif isinstance(each, (list, tuple)):
            waiting += each
        elif _is_number(each):
            found.append(each)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_exact(number: int | float) -> bool:
    """Whether the digits that llguidance writes, those of a double, have the same value."""
    if isinstance(number, int):
        whole = abs(number) < _WIDEST and int(float(number)) == number
        return abs(number) <= _EXACT or whole or number == _LARGEST_WHOLE
    return abs(number) <= _EXACT or Decimal(repr(number)) == Decimal(number)

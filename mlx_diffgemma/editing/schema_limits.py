"""How large and how deep a JSON schema may be, which is checked before anything is built from
it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlx_diffgemma.editing.negation import resolved
from mlx_diffgemma.errors import UsageError

_DEEPEST = 100  # levels of JSON
_LARGEST = 200_000  # values
_GROWN = 120, 1_000_000  # levels and values when rewritten; llguidance reads at most 128 levels
_NAMED = 64  # references that are no pointers, whose depth is not known
_LEVELS = 256  # schemas within schemas, also by reference: each takes some 5 kB of stack


def refusal(place: str, reason: str) -> UsageError:
    """The error about the value that the JSON pointer `place` names."""
    where = f"at {place}, " if place else ""
    return UsageError(f"the JSON schema cannot be used: {where}{reason}.")


def look_at(schema: Any, *, rewritten: bool = False) -> None:
    """Refuse what is no JSON, too deep or too large, without recursion. A `rewritten` schema may be
    larger and deeper.

    Raises:
        UsageError: the schema is no JSON, too deep or too large.
    """
    deepest, most = _GROWN if rewritten else (_DEEPEST, _LARGEST)
    waiting, seen = [(schema, 1)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if depth > deepest:
            raise refusal("", f"it is nested deeper than {deepest} levels")
        if seen > most:
            raise refusal("", f"it holds more than {most:,} values")
        if isinstance(value, Mapping):
            if not all(isinstance(key, str) for key in value):
                raise refusal("", "the keys of its objects must be strings")
            waiting += [(each, depth + 1) for each in value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += [(each, depth + 1) for each in value]
        elif isinstance(value, float) and not math.isfinite(value):
            raise refusal("", f"it holds {value}, which is no number in JSON")
        elif isinstance(value, int) and value.bit_length() > 1024:
            raise refusal("", "it holds a number of more than 300 digits")
        elif value is not None and not isinstance(value, (bool, int, float, str)):
            raise refusal("", f"it holds a {type(value).__name__}, which is no value in JSON")


def check_levels(root: Any) -> None:
    """Refuse what llguidance would follow too deep: it calls itself at every schema in a schema,
    and at every reference that it has not seen.

    Raises:
        UsageError: the schema leads too deep, or has too many references by name.
    """
    referenced: set[str] = set()
    inner_ids = has_inner_ids(root)

    def follow(value: Any, level: int) -> None:
        if level > _LEVELS:
            raise refusal("", f"its references lead more than {_LEVELS} schemas deep")
        if isinstance(value, Mapping):
            target = value.get("$ref")
            if isinstance(target, str) and target not in referenced:
                referenced.add(target)
                follow(None if inner_ids else resolved(target, root), level + 1)
            for key, each in value.items():
                if key not in ("$defs", "definitions", "const", "enum"):
                    follow(each, level + 1)
        elif isinstance(value, (list, tuple)):
            for each in value:
                follow(each, level)

    follow(root, 0)
    named = [each for each in referenced if inner_ids or each[:2] not in ("#", "#/")]
    if len(named) > _NAMED:
        raise refusal("", f"it has more than {_NAMED} references by name")


def has_inner_ids(root: Any) -> bool:
    """Whether a part of a schema has a name of its own, from which pointers in it would start."""
    old = isinstance(root, Mapping) and "draft-04" in str(root.get("$schema"))
    waiting = list(root.values()) if isinstance(root, Mapping) else []
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            if isinstance(value.get("id" if old else "$id"), str):
                return True
            quoted = ("const", "enum", "default", "examples")
            waiting += [each for key, each in value.items() if key not in quoted]
        elif isinstance(value, list):
            waiting += value
    return False

"""Regular expressions as JSON Schema writes them, in the syntax of the grammar."""

from __future__ import annotations

import re

_PART = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_IN_CLASS = re.compile(r"\\.|\[|&(?=&)|~(?=~)|(?<=[^-\\]-)-|^-(?=-)", re.DOTALL)


def without_nesting(pattern: str) -> str:
    """`pattern` so that its classes mean the same in Rust's syntax as in JSON Schema's, which knows
    no classes within classes: `[[:alpha:]]` is one of `[:alph`, and then a `]`."""
    return _PART.sub(_class, pattern)


def _class(found: re.Match[str]) -> str:
    if found[0][0] == "\\":
        return found[0]
    opening = "[^" if found[0].startswith("[^") else "["
    members = found[0][len(opening) : -1]
    return opening + _IN_CLASS.sub(_escaped, members) + "]"


def _escaped(found: re.Match[str]) -> str:
    return found[0] if len(found[0]) > 1 else "\\" + found[0]

"""Short texts that regular expressions match.

A pattern is read roughly: what is made here is only ever tried, and the grammar decides whether it
matches. So parts that are not understood may be read wrong, and nothing here raises an error.
"""

from __future__ import annotations

import re
import string

from mlx_diffgemma.editing.ecma import without_nesting

_LONGEST = 2**15  # characters beyond which no example is made
_DEEPEST = 64  # groups within groups
_TRIED = "a0A-_.,:/@ " + string.ascii_letters + string.digits + string.punctuation + "é\t\n"
_WRITTEN = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
_EMPTY = "^$"
_ASSERTIONS = "bBAzZ"

_COUNT = re.compile(r"\{\s*(\d+)\s*(?:,\s*\d*\s*)?\}")
_HEX = re.compile(r"x\{([0-9a-fA-F]+)\}|x([0-9a-fA-F]{2})|[uU]\{?([0-9a-fA-F]{4,8})\}?")
_PROPERTY = re.compile(r"[pP](?:\{\^?(\w*)[^}]*\}|\w)")
_OPENING = re.compile(r"\?(?:P?<\w+>|[a-zA-Z-]*:|[a-zA-Z-]+(?=\)))")


def example(pattern: str) -> str | None:
    """A text that `pattern` matches as a whole, as short as the pattern allows; None where there is
    none of a length that can be written. Anchors are passed over."""
    reader = _Reader(pattern)
    found = reader.alternatives(0)
    return found if reader.place == len(pattern) else None


class _Reader:
    """Reads one pattern from left to right.

    Attributes:
        place: where the next character to read stands.
    """

    def __init__(self, pattern: str) -> None:
        self.place = 0
        self._pattern = pattern

    def alternatives(self, depth: int) -> str | None:
        """The shortest example of what stands up to the end of this group."""
        found = [self._sequence(depth)]
        while self._takes("|"):
            found.append(self._sequence(depth))
        return min((each for each in found if each is not None), key=len, default=None)

    def _sequence(self, depth: int) -> str | None:
        whole: str | None = ""
        while self.place < len(self._pattern) and self._pattern[self.place] not in "|)":
            each = self._atom(depth)
            least = self._repeats()
            if whole is None or (each is None and least):
                whole = None
            elif least and each:
                whole = whole + each * least if len(whole) + len(each) * least <= _LONGEST else None
        return whole

    def _atom(self, depth: int) -> str | None:
        first = self._next()
        if first == "(":
            if depth == _DEEPEST:
                self.place = len(self._pattern) + 1
                return None
            self._skips(_OPENING)
            inner = self.alternatives(depth + 1)
            self._takes(")")
            return inner
        if first == "[":
            return self._member()
        if first == "\\":
            return self._escaped()
        if first == ".":
            return "a"
        return "" if first in _EMPTY else first

    def _member(self) -> str | None:
        """A character of the class whose `[` was read."""
        start = self.place
        self._takes("^")
        self._takes("]")
        while self.place < len(self._pattern) and self._pattern[self.place] != "]":
            self.place += 2 if self._pattern[self.place] == "\\" else 1
        self.place += 1
        return _one_of(without_nesting(f"[{self._pattern[start : self.place]}"))

    def _escaped(self) -> str | None:
        if found := self._skips(_HEX):
            return chr(min(int(next(filter(None, found.groups())), 16), 0x10FFFF))
        if found := self._skips(_PROPERTY):
            named = found[1] or found[0][1:]
            return "0" if named[:1] == "N" else "A" if named == "Lu" else "a"
        letter = self._next()
        if letter in "dDwWsS":
            return _one_of("\\" + letter)
        return "" if letter in _ASSERTIONS else _WRITTEN.get(letter, letter)

    def _repeats(self) -> int:
        """How often at least what was read before stands there."""
        least = 1
        while self.place < len(self._pattern):
            if counted := self._skips(_COUNT):
                least = min(least * int(counted[1]), _LONGEST + 1)
            elif self._takes("*") or self._takes("?"):
                least = 0
            elif not self._takes("+"):
                break
            self._takes("?")  # as few as possible: the same texts match
        return least

    def _next(self) -> str:
        self.place += 1
        return self._pattern[self.place - 1 : self.place]

    def _takes(self, expected: str) -> bool:
        there = self._pattern.startswith(expected, self.place)
        self.place += len(expected) if there else 0
        return there

    def _skips(self, expected: re.Pattern[str]) -> re.Match[str] | None:
        found = expected.match(self._pattern, self.place)
        self.place = found.end() if found else self.place
        return found


def _one_of(kind: str) -> str | None:
    """A character of a class, by preference one that is often written."""
    try:
        found = re.compile(kind)
    except re.error:
        return "a"
    return next((each for each in _TRIED + kind if found.fullmatch(each)), None)

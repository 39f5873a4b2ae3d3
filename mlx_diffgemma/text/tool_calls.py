"""Tool calls: from the tokens between a call's markers to names and arguments.

A call reads `call:NAME{key:value,...}`. A value is a string between two quote tokens (`<|"|>`), an
object, a list, a number, `true`, `false`, `null`, or a bare word. What stands between two quote
tokens is never read for its braces, commas or markers, so this works on tokens, not on text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Decode = Callable[[Sequence[int]], str]
"""The text of tokens, special ones spelt out."""

_DEEPEST = 64  # objects and lists within each other
_ENDS = frozenset(",}]")
_CALL = "call:"
_NAME = re.compile(r"[^\s{}\[\]:,]+")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_WORDS = {"true": True, "false": False, "null": None}
_CUT = "a tool call was cut off"


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for.

    Attributes:
        name: the function's name; "" where it cannot be read.
        arguments: the arguments by their names, as JSON values; empty where they cannot be read.
        raw: the call as the model wrote it, without the markers around it.
        error: what is wrong with the call, or None where it can be made.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    raw: str = ""
    error: str | None = None


def parse_calls(
    tokens: Sequence[int], quote: int | None, decode: Decode, *, cut: bool = False
) -> list[ToolCall]:
    """The calls that `tokens` hold; one with an `error` where they cannot be read.

    Args:
        tokens: what stands between a call's markers.
        quote: the token on both sides of a string, or None where the tokenizer has none.
        cut: whether the answer ended before the call did.
    """
    raw = decode(tokens)
    symbols, closed = _symbols(tokens, quote, decode)
    reader = _Reader(symbols)
    try:
        calls = reader.calls()
        if not closed:
            raise _MalformedError("a string is not closed")
    except _MalformedError as error:
        why = _CUT if cut else f"a tool call is malformed: {error}"
        return [ToolCall(reader.name, raw=raw, error=why)]
    return [ToolCall(name, arguments, raw) for name, arguments in calls]


def parse_with(
    parser: Callable[[str, Any], Any], tokens: Sequence[int], decode: Decode, *, cut: bool = False
) -> list[ToolCall]:
    """The calls that one of mlx-lm's parsers reads in `tokens`; one with an `error` where it
    fails."""
    raw = decode(tokens)
    try:
        found = parser(raw, None)
        calls = [
            ToolCall(str(call["name"]), _object(call["arguments"]), raw)
            for call in (found if isinstance(found, list) else [found])
        ]
        if not calls:
            raise ValueError("it holds no call")
        return calls
    except Exception as error:  # the parsers raise whatever their reading ran into
        why = " ".join(str(error).split()) or type(error).__name__
        return [ToolCall("", raw=raw, error=_CUT if cut else f"a tool call is malformed: {why}")]


def _object(arguments: Any) -> dict[str, Any]:
    read = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(read, dict):
        raise ValueError("its arguments are no object")
    return read


class _MalformedError(Exception):
    """Says what is wrong with a call."""


@dataclass(frozen=True)
class _Quoted:
    text: str


def _symbols(
    tokens: Sequence[int], quote: int | None, decode: Decode
) -> tuple[list[str | _Quoted], bool]:
    """The call as characters and quoted strings, and whether the last string is closed."""
    runs: list[list[int]] = [[]]
    for token in tokens:
        if token == quote:
            runs.append([])
        else:
            runs[-1].append(token)
    symbols: list[str | _Quoted] = []
    for place, run in enumerate(runs):
        text = decode(run)
        if place % 2:
            symbols.append(_Quoted(text))
        else:
            symbols += text
    return symbols, len(runs) % 2 == 1


class _Reader:
    """Reads calls from characters and quoted strings.

    Attributes:
        name: the name of the call that is being read.
    """

    def __init__(self, symbols: list[str | _Quoted]) -> None:
        self._symbols = symbols
        self._at = 0
        self.name = ""

    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        found = [self._call()]
        while self._next() is not None:
            found.append(self._call())
        return found

    def _call(self) -> tuple[str, dict[str, Any]]:
        self.name = ""
        head = self._word(frozenset("{"))
        if self._next() != "{":
            raise _MalformedError("its arguments do not begin with a brace")
        name = head.removeprefix(_CALL).strip()
        if not head.startswith(_CALL) or not _NAME.fullmatch(name):
            raise _MalformedError(f"it does not begin with {_CALL}NAME")
        self.name = name
        return name, self._pairs(depth=1)

    def _pairs(self, depth: int) -> dict[str, Any]:
        """An object, from its opening brace to its closing one."""
        pairs: dict[str, Any] = {}
        for _ in self._items("}", depth):
            key = self._key()
            self._take()  # the colon
            pairs[key] = self._value(depth)
        return pairs

    def _list(self, depth: int) -> list[Any]:
        return [self._value(depth) for _ in self._items("]", depth)]

    def _items(self, end: str, depth: int) -> Iterator[None]:
        """Stops at every item of an object or a list, and goes past its `end`."""
        if depth > _DEEPEST:
            raise _MalformedError(f"its arguments are nested more than {_DEEPEST} deep")
        self._take()
        if self._next() == end:
            self._take()
            return
        while True:
            yield
            symbol = self._next()
            if symbol not in (",", end):
                raise _MalformedError(f"{end if symbol is None else 'a comma'} is missing")
            self._take()
            if symbol == end:
                return

    def _key(self) -> str:
        symbol = self._next()
        if isinstance(symbol, _Quoted):
            self._take()
            key = symbol.text
        else:
            key = self._word(_ENDS | frozenset(":{["))
            if len(key) > 1 and key[0] == key[-1] == '"':
                key = key[1:-1]
        if not key or self._next() != ":":
            raise _MalformedError("a key is missing")
        return key

    def _value(self, depth: int) -> Any:
        symbol = self._next()
        if isinstance(symbol, _Quoted):
            self._take()
            return symbol.text
        if symbol == "{":
            return self._pairs(depth + 1)
        if symbol == "[":
            return self._list(depth + 1)
        if symbol == '"' and (string := self._plain_string()) is not None:
            return string
        word = self._word(_ENDS)
        if not word:
            raise _MalformedError("a value is missing")
        return _scalar(word)

    def _plain_string(self) -> str | None:
        """A string between plain quotes, as JSON has it, or None where there is none."""
        end = self._at
        while end < len(self._symbols) and isinstance(self._symbols[end], str):
            end += 1
        text = "".join(map(str, self._symbols[self._at : end]))
        try:
            string, length = json.JSONDecoder(strict=False).raw_decode(text)
        except ValueError:
            return None
        self._at += length
        return str(string)

    def _word(self, ends: frozenset[str]) -> str:
        """The characters up to one of `ends`, a quoted string or the end, trimmed."""
        start = self._at
        while self._at < len(self._symbols):
            symbol = self._symbols[self._at]
            if isinstance(symbol, _Quoted) or symbol in ends:
                break
            self._at += 1
        return "".join(map(str, self._symbols[start : self._at])).strip()

    def _next(self) -> str | _Quoted | None:
        """The next symbol that is no white space, which stays to be read."""
        while self._at < len(self._symbols):
            symbol = self._symbols[self._at]
            if isinstance(symbol, _Quoted) or not symbol.isspace():
                return symbol
            self._at += 1
        return None

    def _take(self) -> None:
        self._next()
        self._at += 1


def _scalar(word: str) -> Any:
    """A number, a truth value, null, or the word as text."""
    if word in _WORDS:
        return _WORDS[word]
    if match := _NUMBER.fullmatch(word):
        if match[2] is None and match[3] is None:
            return int(word) if len(word) < 1000 else word
        number = float(word)
        return number if math.isfinite(number) else word
    return word

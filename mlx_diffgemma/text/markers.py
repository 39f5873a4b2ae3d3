"""The markers that a model writes around its thoughts and the calls of tools, by their ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from mlx_diffgemma.text.tokenizer import hf_tokenizer

CHANNEL = ("<|channel>", "<channel|>")
THINK = (  # the pairs that mlx-lm knows
    ("<think>", "</think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
)
_SPELLED = ("<|open|>think<|sep|>", "<|close|>think<|sep|>")  # a pair of several tokens each
_CALL = ("<|tool_call>", "<tool_call|>")
_QUOTE = '<|"|>'


@dataclass(frozen=True)
class Markers:
    """The ids of the markers that a tokenizer knows; None for those that it lacks.

    A mark that takes several tokens has an id below 0, which stands for all of them.

    Attributes:
        opened, closed: the markers around a channel or a thought.
        named: whether a channel begins with a line that names it.
        call, called: the markers around a tool call.
        quote: the marker on both sides of a string in a tool call.
        parser: what reads the text of a call, or None for the form `call:NAME{...}`.
        spelled: the tokens of each mark that takes several, by its id.
    """

    opened: int | None = None
    closed: int | None = None
    named: bool = False
    call: int | None = None
    called: int | None = None
    quote: int | None = None
    parser: Callable[[str, Any], Any] | None = None
    spelled: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def ids(self) -> frozenset[int]:
        """The ids of all markers that there are."""
        every = (self.opened, self.closed, self.call, self.called, self.quote)
        return frozenset(token for token in every if token is not None)


_KNOWN: WeakKeyDictionary[Any, Markers] = WeakKeyDictionary()


def markers_of(tokenizer: Any) -> Markers:
    """The markers of a tokenizer (mlx-lm's wrapper or a Hugging Face tokenizer), looked up once."""
    known = _KNOWN.get(tokenizer)
    if known is None:
        known = _KNOWN[tokenizer] = _look_up(tokenizer)
    return known


def _look_up(tokenizer: Any) -> Markers:
    own = hf_tokenizer(tokenizer)

    def pair(names: tuple[Any, Any]) -> tuple[int, int] | None:
        first, second = (_id(own, name) for name in names)
        return None if first is None or second is None else (first, second)

    channel = pair(CHANNEL)
    opened, closed = channel or next(filter(None, map(pair, THINK)), (None, None))
    spelled: dict[int, tuple[int, ...]] = {}
    if opened is None and None not in map(partial(_id, own), ("<|open|>", "<|close|>", "<|sep|>")):
        opened, closed = -1, -2
        for mark, text in zip((opened, closed), _SPELLED, strict=True):
            spelled[mark] = tuple(own.encode(text, add_special_tokens=False))
    calls, quote, parser = pair(_CALL), _id(own, _QUOTE), None
    if calls is None and own is not tokenizer and tokenizer.has_tool_calling:
        calls = pair((tokenizer.tool_call_start, tokenizer.tool_call_end))
        parser = tokenizer.tool_parser
    call, called = calls or (None, None)
    return Markers(opened, closed, channel is not None, call, called, quote, parser, spelled)


def _id(tokenizer: Any, name: Any) -> int | None:
    """The id of the token that is spelt `name`, or None."""
    if not name:
        return None
    token = tokenizer.convert_tokens_to_ids(name)
    if not isinstance(token, int) or tokenizer.convert_ids_to_tokens(token) != name:
        return None
    return token

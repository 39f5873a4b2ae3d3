"""An answer while it is written: its parts, up to the first stop string of its text."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.reading import shown
from mlx_diffgemma.text.parts import End, Part, Parts, Text, Thought
from mlx_diffgemma.text.tool_calls import ToolCall


@dataclass(frozen=True)
class Said:
    """What some tokens add to an answer.

    Attributes:
        text: what the answer says.
        thought: what was thought.
        tool_calls: the calls that can be made.
        failed_calls: the calls that are malformed or cut off.
        tokens: how many tokens of the whole answer are part of it so far. Tokens that may turn out
            to begin a stop string are not, nor are those from a stop string on; a token that holds
            characters before a stop string is.
        end: the end of the answer, or None where it goes on.
        stop_string: the stop string that ended it, or None.
    """

    text: str
    thought: str
    tool_calls: tuple[ToolCall, ...]
    failed_calls: tuple[ToolCall, ...]
    tokens: int
    end: End | None = None
    stop_string: str | None = None


class Answer:
    """Reads one answer, canvas by canvas.

    Args:
        tokenizer: mlx-lm's wrapper or a Hugging Face tokenizer.
        stop: texts that end the answer where its text first completes one of them. What is thought
            and what stands in tool calls ends nothing.
        thinking: whether thinking was asked for.
        prompt: the token ids before the answer.

    Raises:
        UsageError: a stop string is empty, or no text.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop: str | Sequence[str] | None = None,
        thinking: bool = False,
        prompt: Sequence[int] = (),
    ) -> None:
        self._stops = stop_strings(stop)
        self._parts = Parts(tokenizer, thinking=thinking, prompt=prompt)
        self._called = False
        self._pending = ""  # text that may begin a stop string
        # To find the token at which a stop string begins: the parts when nothing was last held
        # back, how many tokens there were by then, the tokens since, and the characters given out
        # since.
        self._before = self._parts.fork()
        self._settled = 0
        self._since: tuple[int, ...] = ()
        self._given = ""

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return self._stops

    def add(
        self,
        tokens: Sequence[int],
        reason: Literal["stop", "length"] | None = None,
        stop_token: int | None = None,
    ) -> Said:
        """Commit `tokens`, and return what became certain. With a `reason` the answer ends behind
        them."""
        parts = self._parts.add(tokens)
        if reason is not None:
            parts += self._parts.finish(reason, stop_token)
        return self._say(tokens, parts)

    def peek(self, tokens: Sequence[int]) -> Said:
        """What `tokens` would add if the answer ended behind them; nothing is committed."""
        return self._fork().add(tokens, "length")

    def would_stop(self, tokens: Sequence[int]) -> bool:
        """Whether committing `tokens` would complete a stop string."""
        return bool(self._stops) and self._fork().add(tokens).stop_string is not None

    def parts(self) -> Parts:
        """A copy of the parts committed so far, by which drafts can be read."""
        return self._parts.fork()

    def _fork(self) -> Answer:
        other = copy(self)
        other._parts = self._parts.fork()
        return other

    def _say(self, tokens: Sequence[int], parts: Sequence[Part]) -> Said:
        self._since += tuple(tokens)
        text = thought = ""
        calls: list[ToolCall] = []
        end: End | None = None
        stopped: str | None = None

        def give(length: int) -> str:
            given, self._pending = self._pending[:length], self._pending[length:]
            self._given += given
            return given

        for part in parts:
            if isinstance(part, Text):
                self._pending += part.text
                found = _first_stop(self._pending, self._stops)
                if found is not None:
                    place, stopped = found
                    text += give(place)
                    break
                text += give(len(self._pending) - _held(self._pending, self._stops))
            elif isinstance(part, Thought):
                thought += part.text
            elif isinstance(part, ToolCall):
                calls.append(part)
            else:
                end = part
                text += give(len(self._pending))
        made = tuple(call for call in calls if call.error is None)
        failed = tuple(call for call in calls if call.error is not None)
        self._called |= bool(made)
        if stopped is not None:
            end = End("tool_calls" if self._called else "stop")
        return Said(text, thought, made, failed, self._kept(stopped is not None), end, stopped)

    def _kept(self, stopped: bool) -> int:
        """How many tokens are part of the answer so far."""
        if self._stops and (stopped or self._pending or self._parts.holds):
            return self._settled + self._reach()
        self._settled += len(self._since)
        self._since, self._given = (), ""
        if self._stops:
            self._before = self._parts.fork()
        return self._settled

    def _reach(self) -> int:
        """How many of the tokens since `_before` make the characters given out since. Tokens
        without text that follow those are counted with them."""
        start = self._before.fork()
        start.decide_like(self._parts)
        parts, tokens = start.fork(), self._since
        count = length = 0
        while length < len(self._given) and count < len(tokens):
            length += len(_text(parts.add(tokens[count : count + 1])))
            count += 1
        # Characters may become certain with a token behind theirs.
        while count and _text(start.peek(tokens[: count - 1])).startswith(self._given):
            count -= 1
        parts = start.fork()
        length = len(_text(parts.add(tokens[:count])))
        while count < len(tokens):
            token = tokens[count : count + 1]
            if length + len(_text(parts.peek(token))) > len(self._given):
                break
            length += len(_text(parts.add(token)))
            count += 1
        return count


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The texts that are to end an answer.

    Raises:
        UsageError: one of them is empty, or no text.
    """
    if stop is not None and not isinstance(stop, Sequence):
        raise UsageError(f"stop must be a text or a list of texts, not {shown(stop)}.")
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for each in stops:
        if not isinstance(each, str) or not each:
            raise UsageError(
                f"a stop string must be a text of at least one character, not {shown(each)}."
            )
    return stops


def _text(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Text))


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the stop string begins that is complete first, and which it is; of several that end
    together the longest. The result is the same however the text is cut into pieces."""
    found = [(place + len(stop), place, stop) for stop in stops if (place := text.find(stop)) >= 0]
    return min(found)[1:] if found else None


def _held(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may begin a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0

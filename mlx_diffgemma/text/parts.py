"""An answer in parts: its text, its thoughts, the tools that it calls, and its end.

Parts are told from each other by the ids of the markers that the model writes between them. Text
that merely spells a marker stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Literal, NamedTuple, TypeAlias

from mlx_diffgemma.text.detokenize import StreamingText
from mlx_diffgemma.text.markers import markers_of
from mlx_diffgemma.text.tokenizer import hf_tokenizer
from mlx_diffgemma.text.tool_calls import ToolCall, parse_calls, parse_with

EndReason: TypeAlias = Literal["stop", "length", "tool_calls"]

_THOUGHT = "thought"  # the name of the channel that holds thoughts
_LONGEST_NAME = 40  # characters; a longer line is no channel's name


@dataclass(frozen=True)
class Text:
    """A piece of what the answer says."""

    text: str


@dataclass(frozen=True)
class Thought:
    """A piece of what was thought. Pieces joined are all thoughts, one below the other, without
    the white space around each."""

    text: str


@dataclass(frozen=True)
class End:
    """The end of an answer.

    Attributes:
        reason: "tool_calls" where the model stopped and waits for the results of its calls, else
            "stop" or "length".
        token: the token that ended the answer, or None.
    """

    reason: EndReason
    token: int | None = None


Part: TypeAlias = "Text | Thought | ToolCall | End"


class Piece(NamedTuple):
    """The characters of one token of a draft, and what they are part of."""

    kind: Literal["text", "thought", "call"]
    text: str


class _Within(Enum):
    """Where in an answer a token stands."""

    TEXT = auto()
    UNDECIDED = auto()  # text, or a thought whose beginning was not marked
    NAME = auto()  # the line that names a channel
    CHANNEL = auto()  # a channel that is no thought
    THOUGHT = auto()
    CALL = auto()


class Parts:
    """Reads the parts of one answer, canvas by canvas.

    All that `add` and `finish` return, with neighbours of one kind joined, is the same however the
    tokens are cut into canvases.

    Args:
        tokenizer: mlx-lm's wrapper or a Hugging Face tokenizer.
        thinking: whether thinking was asked for. Where a thought is then closed that was never
            opened, it began with the answer; so text is held back until that is decided.
        prompt: the token ids before the answer; they may end within a thought.
    """

    def __init__(
        self, tokenizer: Any, *, thinking: bool = False, prompt: Sequence[int] = ()
    ) -> None:
        self._tokenizer = hf_tokenizer(tokenizer)
        self._markers = markers_of(tokenizer)
        self._ids = self._markers.ids
        self._blank = StreamingText(tokenizer)
        self._text = copy(self._blank)
        self._stream = self._text
        undecided = thinking and self._markers.closed is not None
        self._within = _Within.UNDECIDED if undecided else _Within.TEXT
        self._undecided = ""
        self._name = ""
        self._space = ""  # white space that is part of a thought if more of it follows
        self._thinks = False  # whether the current thought has said something
        self._thought = False  # whether any thought has said something
        self._began: _Within | None = None  # what an undecided beginning turned out to be
        self._call: tuple[int, ...] = ()
        self._quoted = False
        self._calls = 0
        self._out: list[Part] = []
        self._waiting: tuple[int, ...] = ()  # the beginning of a mark of several tokens
        self.add(self._opened_in(self._folded(prompt)))

    @property
    def holds(self) -> bool:
        """Whether characters are held back that may become text."""
        return (
            self._within is _Within.UNDECIDED
            or (self._within is _Within.NAME and bool(self._name))
            or self._stream.holds
            or bool(self._waiting)
        )

    def add(self, tokens: Sequence[int]) -> list[Part]:
        """Commit `tokens`, and return the parts that became certain."""
        self._take(self._folded(tokens))
        return self._taken()

    def _folded(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that waited and `tokens`, with each mark of several tokens as its id. Tokens
        at the end that may begin such a mark wait."""
        spelled = self._markers.spelled
        if not spelled:
            return list(map(int, tokens))
        left, found = [*self._waiting, *map(int, tokens)], list[int]()
        self._waiting = ()
        while left:
            for mark, ids in spelled.items():
                if tuple(left[: len(ids)]) == ids:
                    found.append(mark)
                    left = left[len(ids) :]
                    break
                if tuple(left) == ids[: len(left)]:
                    self._waiting = tuple(left)
                    return found
            else:
                found.append(left.pop(0))
        return found

    def _take(self, tokens: Sequence[int]) -> None:
        markers = self._markers
        run: list[int] = []
        for token in tokens:
            if self._within is _Within.CALL:
                self._in_call(token)
            elif token not in self._ids:
                run.append(token)
            elif token in (markers.opened, markers.call) or (
                token == markers.closed and self._within is not _Within.TEXT
            ):
                self._say(self._stream.add(run))
                run = []
                self._at_marker(token)
            # Other markers are out of place; they are left out and part nothing.
        self._say(self._stream.add(run))

    def finish(
        self, reason: Literal["stop", "length"], stop_token: int | None = None
    ) -> list[Part]:
        """End the answer, and return what was held back and the end."""
        waited, self._waiting = self._waiting, ()
        self._take(waited)
        while self._within is _Within.CALL:
            behind: tuple[int, ...] = ()
            if self._quoted and self._markers.called in self._call:
                # A string that is never closed ends with its call, and the rest is read again.
                place = self._call.index(self._markers.called)
                self._call, behind = self._call[:place], self._call[place + 1 :]
                self._end_call(cut=False)
            else:
                self._end_call(cut=True)
            self._within = _Within.TEXT
            self._take(behind)
        self._leave(cut=True)
        self._within = _Within.TEXT
        ends: EndReason = "tool_calls" if reason == "stop" and self._calls else reason
        self._out.append(End(ends, stop_token))
        return self._taken()

    def peek(self, tokens: Sequence[int]) -> list[Part]:
        """The parts that `tokens` would add if the answer ended behind them, without its end;
        nothing is committed."""
        draft = self.fork()
        parts = draft.add(tokens)
        return _joined(parts + draft.finish("length")[:-1])

    def pieces(self, tokens: Sequence[int]) -> list[Piece]:
        """What was held back so far, then what each of `tokens` adds if the answer ends behind
        them: one piece more than there are tokens. Nothing is committed. Characters of several
        tokens belong to the last of them; markers and the name of a channel have ""."""
        whole = self.fork()
        whole.add(tokens)
        whole.finish("length")
        draft = self.fork()
        draft.decide_like(whole)
        pieces = [_piece(draft._taken())]
        for token in tokens:
            called = draft._within is _Within.CALL
            piece = _piece(draft.add([token]))
            if called and draft._within is _Within.CALL:
                piece = Piece("call", draft._blank.peek([token]))
            pieces.append(piece)
        rest = _piece(draft.finish("length"))
        if rest.text:
            pieces[-1] = Piece(rest.kind, pieces[-1].text + rest.text)
        return pieces

    def fork(self) -> Parts:
        """An independent copy of the answer so far."""
        other = copy(self)
        other._text = copy(self._text)
        other._stream = other._text if self._stream is self._text else copy(self._stream)
        other._out = list(self._out)
        return other

    def decide_like(self, later: Parts) -> None:
        """Where it is undecided here what the answer begins with, take it as `later` does."""
        if self._within is _Within.UNDECIDED and later._began is not None:
            self._within, said, self._undecided = later._began, self._undecided, ""
            self._say(said)

    def _opened_in(self, prompt: Sequence[int]) -> Sequence[int]:
        """The end of the prompt from where it opens a channel that it leaves open."""
        for place in range(len(prompt) - 1, -1, -1):
            if prompt[place] == self._markers.opened:
                return prompt[place:]
            if prompt[place] in self._ids or self._blank.skips(prompt[place]):
                break
        return ()

    def _taken(self) -> list[Part]:
        parts, self._out = _joined(self._out), []
        return parts

    def _at_marker(self, token: int) -> None:
        """Leave what the answer is in, and enter what `token` opens."""
        markers = self._markers
        if token == markers.closed and self._within is _Within.UNDECIDED:
            self._say(self._stream.finish())
            said, self._undecided = self._undecided, ""
            self._within = self._began = _Within.THOUGHT
            self._say(said.removeprefix(f"{_THOUGHT}\n") if markers.named else said)
        self._leave(cut=False)
        self._stream = self._text
        if token == markers.opened:
            self._stream = copy(self._blank)
            self._within = _Within.NAME if markers.named else _Within.THOUGHT
        elif token == markers.call:
            self._within, self._call, self._quoted = _Within.CALL, (), False
        else:
            self._within = _Within.TEXT

    def _leave(self, *, cut: bool) -> None:
        """Give out what was held back of the part that the answer is in. `cut` says whether the
        answer ends here."""
        self._say(self._stream.finish())
        if self._within is _Within.UNDECIDED:
            self._out.append(Text(self._undecided))
            self._undecided, self._began = "", _Within.TEXT
        elif self._within is _Within.NAME and not (
            _THOUGHT.startswith(self._name) if cut else self._name == _THOUGHT
        ):
            self._out.append(Text(self._name))
        self._name = self._space = ""
        self._thinks = False

    def _say(self, text: str) -> None:
        """Take in characters where the answer is now."""
        if not text:
            return
        if self._within is _Within.NAME:
            self._name += text
            text = self._named()
        if self._within is _Within.UNDECIDED:
            self._undecided += text
        elif self._within is _Within.THOUGHT:
            self._think(text)
        elif self._within in (_Within.TEXT, _Within.CHANNEL):
            self._out.append(Text(text))

    def _named(self) -> str:
        """Enter the channel if its name is complete; what stands behind the name."""
        name = self._name
        end = next((i for i, c in enumerate(name) if not (c.isalnum() or c in "_-")), None)
        if end is None and len(name) <= _LONGEST_NAME:
            return ""
        self._name = ""
        self._within = _Within.CHANNEL
        if not end or end > _LONGEST_NAME:
            return name
        if name[:end] == _THOUGHT:
            self._within = _Within.THOUGHT
            return name[end:]
        # Only what has a line of its own is a name.
        return name[end + 1 :] if name[end] == "\n" else name

    def _think(self, text: str) -> None:
        text = self._space + text if self._thinks else text.lstrip()
        said = text.rstrip()
        self._space = text[len(said) :]
        if said:
            apart = "\n" if self._thought and not self._thinks else ""
            self._out.append(Thought(apart + said))
            self._thinks = self._thought = True

    def _in_call(self, token: int) -> None:
        markers = self._markers
        if token == markers.quote:
            self._quoted = not self._quoted
        if not self._quoted and token in (markers.called, markers.call):
            self._end_call(cut=False)
            self._within = _Within.TEXT if token == markers.called else _Within.CALL
        else:
            self._call += (token,)

    def _end_call(self, *, cut: bool) -> None:
        if self._markers.parser is not None:
            calls = parse_with(self._markers.parser, self._call, self._spelt, cut=cut)
        else:
            calls = parse_calls(self._call, self._markers.quote, self._spelt, cut=cut)
        self._out += calls
        self._calls += sum(call.error is None for call in calls)
        self._call, self._quoted = (), False

    def _spelt(self, tokens: Sequence[int]) -> str:
        """The text of tokens of a call, markers spelt out. The marker put before them keeps
        decoders from trimming the first word."""
        before = [self._markers.call]
        spelled = self._markers.spelled
        tokens = [part for token in tokens for part in spelled.get(token, (token,))]

        def decode(ids: list[Any]) -> str:
            text: str = self._tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            return text

        return decode([*before, *tokens])[len(decode(before)) :]


def _piece(parts: Sequence[Part]) -> Piece:
    """The characters of some parts, and what the last of them is."""
    said = [part for part in parts if isinstance(part, (Text, Thought)) and part.text]
    thought = bool(said) and isinstance(said[-1], Thought)
    return Piece("thought" if thought else "text", "".join(part.text for part in said))


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Parts without empty texts, with neighbours of one kind joined."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, (Text, Thought)):
            if not part.text:
                continue
            last = joined[-1] if joined else None
            if isinstance(part, Text) and isinstance(last, Text):
                joined[-1] = Text(last.text + part.text)
                continue
            if isinstance(part, Thought) and isinstance(last, Thought):
                joined[-1] = Thought(last.text + part.text)
                continue
        joined.append(part)
    return joined

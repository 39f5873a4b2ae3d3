"""The way out of a grammar: text that completes what was written so far.

A way out is looked for in bytes, with a matcher of its own whose tokens are single bytes: that
takes a few microseconds a step where a mask over a whole vocabulary takes milliseconds. What was
found before is tried again first, with or without its beginning. Then a walk takes the most fitting
byte at each step. Last comes a search whose steps are a short example of each pattern and the words
that the grammar itself names, since no list of characters finds `000-0000` in `\\d{3}-\\d{4}` or
`hello` in `.*hello.*`. Every ending that is found was matched to its end, and the steps of the
walks and the search are bounded.
"""

from __future__ import annotations

import json
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from itertools import count, islice
from typing import Any

END = 256  # the token of the byte matcher that ends a text; the others are the bytes

_TYPED = b"0,:1{[-.aA" + bytes(range(0x20, 0x7F)) + b"\n\t\r"
_IN_STRUCTURE = bytes(dict.fromkeys(b'}]"' + _TYPED + bytes(range(256))))
_IN_TEXT = bytes(dict.fromkeys(b'" }]' + _TYPED + bytes(range(256))))
_QUOTE = ord('"')
_TRIED = b'"}]0a ,A1@.:-/_\nDTZ'  # bytes that a search tries after the words of the grammar
_NAMED = 32  # words of a grammar that are tried
_EXAMPLES = 1024  # patterns of which an example is tried
_ALIKE = 4  # most states that allow the same and are searched
_WORK = 2500  # steps of a search that is not thorough, some 5 to 10 µs each
_CLOSING = 600  # steps of a search for the end of a string
_FILLED = 64  # steps straight on from each state of a search for the end of a string
_THOROUGH = 40_000  # steps of a thorough search
_STRAIGHT = (32, 1024)  # steps straight on from a state of a search, first and where that failed
_LONGEST = 4096  # steps of the walk that comes before any search
_REMEMBERED = 16  # endings that are remembered
_IDLE = 4  # steps after which a walk is given up where nothing else than before may follow
_STAGES = 1024  # strings that need a search of their own, in one ending
_CUT = 64  # most bytes of its beginning that a remembered ending may have lost
_CANDIDATES = 96  # endings whose length is counted
_TOO_LONG = 12  # endings that are too long, after which a search that is not thorough gives up

_LITERAL = re.compile(r"(?:\\[^\w\s]|[^\\^$.|?*+()\[\]{}])+")
_CLASS = re.compile(r"\[\^?((?:\\.|[^\]\\])+)\]")
_REPEATED = re.compile(r"\{[\d,]*\}")
_CONTROLS = {"\\n": "\n", "\\t": "\t", "\\r": "\r"}


class Endings:
    """Finds endings in one grammar and remembers them.

    Args:
        patterns: the regular expressions that the grammar was made from, if any.
        example: makes a short text that such an expression matches, as it is written in the
            grammar, or gives None; it is asked when nothing simpler leads out.
        quoted: whether these are for what stands in quotes, as in JSON.
    """

    def __init__(
        self, patterns: Iterable[str], example: Callable[[str], bytes | None], *, quoted: bool
    ) -> None:
        self._quoted, self._example = quoted, example
        self._patterns = list(patterns)
        self._found: OrderedDict[bytes, None] = OrderedDict()
        self._work = 0  # steps that are left to a search
        self._next = 0  # place among the examples of the one that is tried first

    @cached_property
    def _examples(self) -> list[bytes]:
        """An example of each pattern, in the order of the grammar, where there is one."""
        found = {
            each: self._example(each) for each in islice(dict.fromkeys(self._patterns), _EXAMPLES)
        }
        return [each for pattern in self._patterns if (each := found.get(pattern)) is not None]

    @cached_property
    def _named(self) -> dict[bytes, None]:
        examples = filter(None, self._examples)
        return dict.fromkeys([*examples, *islice(_words(self._patterns), _NAMED)])

    def find(
        self,
        matcher: Any,
        length_of: Callable[[bytes], int | None],
        most: int,
        *,
        thorough: bool = False,
    ) -> bytes | None:
        """The first ending from the state of `matcher`, an `LLMatcher` of bytes, that takes at most
        `most` tokens; None where none is found. The ending is remembered, and so is the shortest
        that a thorough search finds where all take more.

        Args:
            length_of: counts the tokens of an ending; None for one that the tokens cannot write.
            thorough: whether to search longer, as is done before anything is written.
        """
        self._work = _THOROUGH if thorough else _WORK
        too_long: list[tuple[int, bytes]] = []
        for ending in islice(self._candidates(matcher), _CANDIDATES):
            length = length_of(ending)
            if length is None:
                continue
            if length <= most:
                self._remember(ending)
                return ending
            too_long.append((length, ending))
            if len(too_long) == _TOO_LONG and not thorough:
                return None  # the shortest come early
        if thorough and too_long:
            self._remember(min(too_long)[1])  # whoever allows more tokens next finds it at once
        return None

    def _remember(self, ending: bytes) -> None:
        self._found[ending] = None
        self._found.move_to_end(ending)
        if len(self._found) > _REMEMBERED:
            self._found.popitem(last=False)

    def _candidates(self, matcher: Any) -> Iterator[bytes]:
        yield from islice(self._remembered(matcher), _CANDIDATES // 2)
        walk = self._straight(matcher, _LONGEST, idle=_IDLE if self._quoted else _LONGEST)
        if walk.complete:
            yield walk.written
        elif self._quoted:
            yield from self._in_stages(walk)
        for most in _STRAIGHT:
            share = self._work // 2 if most == _STRAIGHT[0] else self._work
            yield from self._search(matcher, most, share)

    def _in_stages(self, walk: _Walk) -> Iterator[bytes]:
        """Go straight on until that leads nowhere, close the string there, and go on from it: this
        leads out of many strings with a pattern each."""
        written = b""
        for _ in range(_STAGES):
            if walk.complete:
                yield written + walk.written
                return
            written += walk.written[: walk.progress]
            state = walk.state()
            closed = self._closing(state)
            if closed is None:
                walk = self._straight(state, _LONGEST)
                if not walk.complete and not walk.progress:
                    return
                continue
            written += closed
            state.consume_tokens(list(closed))
            walk = self._straight(state, _STRAIGHT[-1], idle=_IDLE)

    def _closing(self, state: Any) -> bytes | None:
        """What closes the string that `state` is in, with the quote: the example of a pattern, or
        else what a search finds. The examples go round, since a grammar mostly asks for its
        patterns in their order."""
        count = len(self._examples)
        for place in range(self._next, self._next + count):
            closed = self._examples[place % count] + bytes([_QUOTE])
            self._work -= 1
            if state.validate_tokens(list(closed)) == len(closed):
                self._next = (place + 1) % count
                return closed
        found = next(self._search(state, _FILLED, _CLOSING, until=_QUOTE), None)
        return None if found is None else found + bytes([_QUOTE])

    def _remembered(self, matcher: Any) -> Iterator[bytes]:
        """The rests of remembered endings that complete the text: those of the latest ending come
        first, and of one ending the shortest."""
        for ending in reversed(list(self._found)):
            for start in range(min(len(ending) - 1, _CUT), -1, -1):
                rest = ending[start:]
                if matcher.validate_tokens([*rest, END]) > len(rest):
                    yield rest

    def _search(
        self, matcher: Any, most: int, work: int, until: int | None = None
    ) -> Iterator[bytes]:
        """Ways from the state of `matcher` that complete the text or, with `until`, after which
        that byte may follow. At most `work` steps are taken.

        Ways of fewer steps come first, and those through more words of the grammar before others. A
        few states of each kind are searched, and from the first of a kind a walk goes at most
        `most` steps straight on.
        """
        order = count()
        queue: list[tuple[int, int, Any, tuple[bytes, ...]]] = [(0, next(order), matcher, ())]
        kinds: Counter[tuple[int, bytes, bytes]] = Counter()
        left = max(0, self._work - work)
        while queue and self._work > left:
            _, _, state, steps = heappop(queue)
            for step in self._steps(state):
                after = state.deep_copy()
                self._work -= 1
                if not after.consume_tokens(list(step)):
                    continue
                path = (*steps, step)
                if _done(after, until):
                    yield b"".join(path)
                    continue
                cost = len(path) - 2 * len(self._named.keys() & set(path))
                kind = cost, after.compute_bitmask(), after.compute_ff_bytes()
                kinds[kind] += 1
                if kinds[kind] == 1:
                    walk = self._straight(after, most, until)
                    if walk.complete:
                        yield b"".join(path) + walk.written
                if kinds[kind] <= _ALIKE:
                    heappush(queue, (cost, next(order), after, path))

    def _straight(
        self, matcher: Any, most: int, until: int | None = None, idle: int = _LONGEST
    ) -> _Walk:
        # Half of what is left at most: what leads nowhere must leave some to the search.
        walk = _straight(matcher, min(most, self._work // 2), until, idle)
        self._work -= walk.steps
        return walk

    def _steps(self, state: Any) -> list[bytes]:
        if forced := state.compute_ff_bytes():
            return [forced]
        named = [word for word in self._named if state.validate_tokens(list(word)) == len(word)]
        mask = state.compute_bitmask()
        single = [bytes([byte]) for byte in _TRIED if _allows(mask, byte)]
        others = (bytes([byte]) for byte in _IN_TEXT if _allows(mask, byte))
        return list(dict.fromkeys([*named, *single, *islice(others, _ALIKE)]))


@dataclass(frozen=True)
class _Walk:
    """A walk that took the most fitting byte at each step.

    Attributes:
        written: all bytes that were taken.
        complete: whether they complete the text, or lead to the byte that was asked for.
        steps: how many steps were taken.
        progress: how many bytes were taken when something else than before could follow for the
            last time.
        start: the matcher before the first byte.
    """

    written: bytes
    complete: bool
    steps: int
    progress: int
    start: Any

    def state(self) -> Any:
        """The matcher after the first `progress` bytes."""
        # It is made when it is asked for: to copy a matcher takes as long as what it has read.
        state = self.start.deep_copy()
        state.consume_tokens(list(self.written[: self.progress]))
        return state


def _straight(matcher: Any, most: int, until: int | None = None, idle: int = _LONGEST) -> _Walk:
    """Take the most fitting byte, or what the grammar forces, at most `most` times, and at most
    `idle` times while nothing else than before may follow, until the text is complete or, with
    `until`, that byte may follow."""
    state, written, steps = matcher.deep_copy(), b"", 0
    progress, before = 0, b""
    while not _done(state, until):
        step = state.compute_ff_bytes()
        mask = state.compute_bitmask()
        if step or mask != before:
            progress, before = len(written), mask
        if not step:
            # No letter may stand between what makes up JSON, but for those of null and the like.
            in_text = _allows(mask, ord(" ")) or _allows(mask, ord("a"))
            allowed = (b for b in (_IN_TEXT if in_text else _IN_STRUCTURE) if _allows(mask, b))
            step = bytes(islice(allowed, 1))
        stuck = steps >= most or len(written) - progress > idle
        if stuck or not step or not state.consume_tokens(list(step)):
            return _Walk(written, False, steps, progress, matcher)
        steps += 1
        written += step
    return _Walk(written, True, steps, progress, matcher)


def _done(state: Any, until: int | None) -> bool:
    if until is None:
        return bool(state.is_accepting())
    return _allows(state.compute_bitmask(), until)


def _allows(mask: bytes, byte: int) -> bool:
    return bool(mask[byte >> 3] >> (byte & 7) & 1)


def _words(patterns: Iterable[str]) -> Iterator[bytes]:
    """The words that patterns name, the longest first: runs of plain characters, as they are and as
    JSON writes them, and the first character of each class."""
    found: dict[str, None] = {}
    for pattern in patterns:
        for control, meant in _CONTROLS.items():
            if control in pattern:
                found[meant] = None
        classes = [item[1] if item[0] == "\\" else item[0] for item in _CLASS.findall(pattern)]
        plain = _REPEATED.sub("|", _CLASS.sub("|", pattern))
        runs = [re.sub(r"\\(.)", r"\1", run) for run in _LITERAL.findall(plain)]
        found |= dict.fromkeys([*runs, *classes])
    spelled = [word for run in found for word in (run, json.dumps(run, ensure_ascii=False)[1:-1])]
    words = dict.fromkeys(word.encode(errors="ignore") for word in spelled)
    yield from sorted(filter(None, words), key=len, reverse=True)

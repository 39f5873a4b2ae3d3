"""The way out of a grammar: text that completes what was written so far.

A way out is looked for in bytes, with a matcher of its own whose tokens are single bytes: that
takes a few microseconds a step where a mask over a whole vocabulary takes milliseconds. What was
found before is tried again first, with or without its beginning. Then a walk takes the most fitting
byte at each step and closes each string that it opens with an example of a pattern where it can.
The example tried first is that of the pattern which came next before or, failing that, of the next
pattern in the schema, so most strings take one trial each. Last comes a search whose steps are the
examples and the words that the grammar itself names, since no list of characters finds `000-0000`
in `\\d{3}-\\d{4}` or `hello` in `.*hello.*`. Every ending that is found was matched to its end, and
the steps of the walks and the search are bounded.
"""

from __future__ import annotations

import json
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from heapq import heappop, heappush
from itertools import chain, count, islice
from typing import Any

from mlx_diffgemma.editing.walks import (
    IN_TEXT,
    LONGEST,
    QUOTE,
    Walk,
    allows,
    done,
    in_open_text,
    straight,
)

END = 256  # the token of the byte matcher that ends a text; the others are the bytes

_TRIED = b'"}]0a ,A1@.:-/_\nDTZ'  # bytes that a search tries after the words of the grammar
_NAMED = 32  # words of a grammar that are tried
_NEAR = 64  # patterns whose examples and words a search tries: the next ones in the grammar
_TOGETHER = 4  # patterns whose examples are tried in a row, for a string that must match them all
_AT_ONCE = 16  # words that are validated in the time of one step
_ALIKE = 4  # most states that allow the same and are searched
_WORK = 2500  # steps of a search that is not thorough, some 5 to 10 µs each
_CLOSING = 600  # steps of a search for the end of a string
_FILLED = 64  # steps straight on from each state of a search for the end of a string
_THOROUGH = 40_000  # steps of a thorough search
_STRAIGHT = (32, 1024)  # steps straight on from a state of a search, first and where that failed
_REMEMBERED = 16  # endings that are remembered
_IDLE = 4  # steps after which a walk is given up where nothing else than before may follow
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
        patterns: the regular expressions that the grammar was made from, if any, in the order in
            which an answer meets them.
        example: makes a short text that such an expression matches, as it is written in the
            grammar, or gives None; it is asked once for each pattern that is tried.
        quoted: whether these are for what stands in quotes, as in JSON.
    """

    def __init__(
        self, patterns: Iterable[str], example: Callable[[str], bytes | None], *, quoted: bool
    ) -> None:
        self._quoted, self._example = quoted, example
        self._patterns = list(dict.fromkeys(patterns))
        self._examples: dict[str, bytes | None] = {}
        self._found: OrderedDict[bytes, None] = OrderedDict()
        self._work = 0  # steps that are left to a search
        self._place = -1  # number of the pattern whose example closed a string last
        self._start = -1  # the place before the first example in the latest ending
        # What closed the string behind each place, and the place after it.
        self._next: dict[int, tuple[bytes, int]] = {}

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
        if self._quoted:
            yield from self._in_stages(matcher)
        elif (walk := self._straight(matcher, LONGEST)).complete:
            yield walk.written
        self._place = self._start
        for most in _STRAIGHT:
            share = self._work // 2 if most == _STRAIGHT[0] else self._work
            yield from self._search(matcher, most, share)

    def _in_stages(self, matcher: Any) -> Iterator[bytes]:
        """Go straight on from one string to the next and close each with an example where it does
        not close at once. Where that leads nowhere, search for the end of the string alone and go
        on from it: this leads out of many strings with a pattern each."""
        state, written = matcher.deep_copy(), b""
        self._place = self._start
        while self._work > 0:
            closed = self._closing(state)
            if closed is None:
                walk = self._straight(state, LONGEST, idle=_IDLE, opening=bool(self._patterns))
                if walk.complete:
                    yield written + walk.written
                    return
                written += walk.written[: walk.progress]
                state = walk.state()
                if walk.opened:
                    continue
                closed = self._closing(state) if walk.progress else None
            if closed is None:
                closed = self._searched(state)
            if closed is not None:
                written += closed
                state.consume_tokens(list(closed))
                continue
            walk = self._straight(state, LONGEST)
            if walk.complete:
                yield written + walk.written
            if walk.complete or not walk.progress:
                return
            written += walk.written[: walk.progress]
            state = walk.state()

    def _closing(self, state: Any) -> bytes | None:
        """The example of a pattern, or the examples of the next few in a row, that closes the
        string in which `state` stands, and a quote; None where there is no such example or the
        string closes at once."""
        if not in_open_text(state.compute_bitmask()):
            return None
        known = [self._next[self._place]] if self._place in self._next else []
        near, every = list(self._nearby(_TOGETHER)), self._nearby(len(self._patterns))
        for tried, (text, place) in enumerate(chain(known, near, _joined(near), every)):
            closed = text + bytes([QUOTE])
            self._work -= tried % _AT_ONCE == 0
            if state.validate_tokens(list(closed)) == len(closed):
                self._next[self._place] = text, place
                if self._place == self._start:
                    self._start = place - 1  # the next ending begins here or a little further on
                self._place = place
                return closed
        return None

    def _searched(self, state: Any) -> bytes | None:
        """What a search finds to close the string in which `state` stands, and a quote. The place
        moves on over the next patterns whose examples it holds."""
        found = next(self._search(state, _FILLED, _CLOSING, until=QUOTE), None)
        if found is None:
            return None
        before = self._place
        for text, place in list(self._nearby(_NEAR)):
            if text not in found:
                break
            self._place = place
        self._next[before] = found, self._place
        return found + bytes([QUOTE])

    def _nearby(self, most: int) -> Iterator[tuple[bytes, int]]:
        """Examples of the `most` patterns that come next, each with the pattern's number."""
        for step in range(1, min(most, len(self._patterns)) + 1):
            place = (self._place + step) % len(self._patterns)
            pattern = self._patterns[place]
            if pattern not in self._examples:
                self._examples[pattern] = self._example(pattern)
            if text := self._examples[pattern]:
                yield text, place

    def _named(self) -> dict[bytes, None]:
        """Examples and words of the patterns that come next."""
        after = self._place + 1
        near = (self._patterns[after:] + self._patterns[:after])[:_NEAR]
        examples = (text for text, _ in self._nearby(_NEAR))
        return dict.fromkeys([*examples, *islice(_words(near), _NAMED)])

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
        order, named = count(), self._named()
        queue: list[tuple[int, int, Any, tuple[bytes, ...]]] = [(0, next(order), matcher, ())]
        kinds: Counter[tuple[int, bytes, bytes]] = Counter()
        left = max(0, self._work - work)
        while queue and self._work > left:
            _, _, state, steps = heappop(queue)
            for step in self._steps(state, named):
                after = state.deep_copy()
                self._work -= 1
                if not after.consume_tokens(list(step)):
                    continue
                path = (*steps, step)
                if done(after, until):
                    yield b"".join(path)
                    continue
                cost = len(path) - 2 * len(named.keys() & set(path))
                kind = cost, after.compute_bitmask(), after.compute_ff_bytes()
                kinds[kind] += 1
                if kinds[kind] == 1:
                    walk = self._straight(after, most, until)
                    if walk.complete:
                        yield b"".join(path) + walk.written
                if kinds[kind] <= _ALIKE:
                    heappush(queue, (cost, next(order), after, path))

    def _straight(
        self,
        matcher: Any,
        most: int,
        until: int | None = None,
        idle: int = LONGEST,
        opening: bool = False,
    ) -> Walk:
        # Half of what is left at most: what leads nowhere must leave some to the search.
        walk = straight(matcher, min(most, self._work // 2), until, idle, opening)
        self._work -= walk.steps
        return walk

    def _steps(self, state: Any, words: Collection[bytes]) -> list[bytes]:
        if forced := state.compute_ff_bytes():
            return [forced]
        self._work -= len(words) // _AT_ONCE
        named = [word for word in words if state.validate_tokens(list(word)) == len(word)]
        mask = state.compute_bitmask()
        single = [bytes([byte]) for byte in _TRIED if allows(mask, byte)]
        others = (bytes([byte]) for byte in IN_TEXT if allows(mask, byte))
        return list(dict.fromkeys([*named, *single, *islice(others, _ALIKE)]))


def _joined(examples: list[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """The first two examples in a row, the first three and so on, each with its last place."""
    for most in range(2, len(examples) + 1):
        yield b"".join(text for text, _ in examples[:most]), examples[most - 1][1]


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

"""Walks through a grammar that take the most fitting byte at each step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

QUOTE = ord('"')
LONGEST = 4096  # steps of the walk that comes before any search

_TYPED = b"0,:1{[-.aA" + bytes(range(0x20, 0x7F)) + b"\n\t\r"
_IN_STRUCTURE = bytes(dict.fromkeys(b'}]"' + _TYPED + bytes(range(256))))
IN_TEXT = bytes(dict.fromkeys(b'" }]' + _TYPED + bytes(range(256))))
_BETWEEN = sum(1 << byte for byte in b",:{}[] ")  # the mask of what stands around strings


@dataclass(frozen=True)
class Walk:
    """A walk that took the most fitting byte at each step.

    Attributes:
        written: all bytes that were taken.
        complete: whether they complete the text, or lead to the byte that was asked for.
        steps: how many steps were taken.
        progress: how many bytes were taken when something else than before could follow for the
            last time.
        start: the matcher before the first byte.
        end: the matcher after the last byte.
        opened: whether the walk stopped where a string opened that cannot close at once.
    """

    written: bytes
    complete: bool
    steps: int
    progress: int
    start: Any
    end: Any
    opened: bool = False

    def state(self) -> Any:
        """The matcher after the first `progress` bytes."""
        if self.progress == len(self.written) and not self.end.is_error():
            return self.end
        # It is made when it is asked for: to copy a matcher takes as long as what it has read.
        state = self.start.deep_copy()
        state.consume_tokens(list(self.written[: self.progress]))
        return state


def straight(
    matcher: Any,
    most: int,
    until: int | None = None,
    idle: int = LONGEST,
    opening: bool = False,
) -> Walk:
    """Take the most fitting byte, or what the grammar forces, at most `most` times, and at most
    `idle` times while nothing else than before may follow, until the text is complete or, with
    `until`, that byte may follow, or, with `opening`, a string opens that cannot close at once."""
    state, written, steps = matcher.deep_copy(), b"", 0
    progress, before = 0, b""
    while not done(state, until):
        step = state.compute_ff_bytes()
        mask = state.compute_bitmask()
        if opening and written.endswith(b'"') and in_open_text(mask):
            return Walk(written, False, steps, len(written), matcher, state, opened=True)
        if step or mask != before:
            progress, before = len(written), mask
        if not step:
            # No letter may stand between what makes up JSON, but for those of null and the like.
            in_text = allows(mask, ord(" ")) or allows(mask, ord("a"))
            allowed = (b for b in (IN_TEXT if in_text else _IN_STRUCTURE) if allows(mask, b))
            step = bytes(islice(allowed, 1))
        stuck = steps >= most or len(written) - progress > idle
        if stuck or not step or not state.consume_tokens(list(step)):
            return Walk(written, False, steps, progress, matcher, state)
        steps += 1
        written += step
    return Walk(written, True, steps, progress, matcher, state)


def in_open_text(mask: bytes) -> bool:
    """Whether a state with this mask may stand in a string that cannot close at once."""
    return not allows(mask, QUOTE) and bool(int.from_bytes(mask, "little") & ~_BETWEEN)


def done(state: Any, until: int | None) -> bool:
    if until is None:
        return bool(state.is_accepting())
    return allows(state.compute_bitmask(), until)


def allows(mask: bytes, byte: int) -> bool:
    return bool(mask[byte >> 3] >> (byte & 7) & 1)

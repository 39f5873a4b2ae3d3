"""What a grammar says of the positions behind the next one: what may stand there, whatever is
chosen before.

Where only few ways lead on, all of them are followed, a position at a time, and what any of them
allows is allowed. So what the grammar forces stands in the canvas before what comes in front of it
is decided, and the model drafts with it in view. This is a hint: states that look alike are taken
for one, and what is committed is matched token by token all the same. Letters: W words of a mask.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import numpy as np

_WAYS = 32  # tokens that are followed from one state, and states that are followed at a time
_STATES = 256  # most states that are followed in all
_WORDS = 1 << 17  # most words of all their masks: 16 states at a vocabulary of 262,144


class State(Protocol):
    """The part of a matcher that looking ahead needs."""

    def advance(self, tokens: Sequence[int]) -> None: ...
    def allowed(self) -> np.ndarray: ...
    def signature(self) -> Hashable: ...
    @property
    def must_end(self) -> bool: ...
    def copy(self) -> State: ...


def look_ahead(state: State, depth: int, end: np.ndarray) -> list[np.ndarray]:
    """Masks [W] of the tokens that may stand at the next `depth` positions, or at fewer where no
    more is known; there is one at least. `end` [W] is the mask of every eos; behind an eos only an
    eos may stand."""
    masks: list[np.ndarray] = []
    front, ended, followed = [state], False, 0
    most = min(_STATES, _WORDS // len(end))
    while len(masks) < depth:
        if not front:
            return [*masks, *[end] * (depth - len(masks))]
        known = end.copy() if ended else np.zeros_like(end)
        following: dict[Hashable, State] = {}
        complete = True
        for current in front:
            allowed = current.allowed()
            known |= allowed
            ended = ended or bool((allowed & end).any())
            tokens = few_tokens_in(allowed & ~end, _WAYS) if complete else None
            if tokens is None or followed + len(tokens) > most:
                complete = False  # so this position is the last that is known
                continue
            followed += len(tokens)
            for token in tokens:
                after = current.copy()
                after.advance([token])
                if after.must_end:
                    ended = True
                    continue
                following.setdefault(after.signature(), after)
        masks.append(known)
        if not complete or len(following) > _WAYS:
            break
        front = list(following.values())
    return masks


def tokens_in(mask: np.ndarray) -> list[int]:
    """The tokens of a mask [W] uint32."""
    words = np.flatnonzero(mask)
    bits = np.unpackbits(mask[words].view(np.uint8), bitorder="little").reshape(-1, 32)
    places, within = np.nonzero(bits)
    tokens: list[int] = (words[places] * 32 + within).tolist()
    return tokens


def few_tokens_in(mask: np.ndarray, most: int) -> list[int] | None:
    """The tokens of a mask [W] uint32; None where there are more than `most`. To see that there are
    more takes a hundredth of the time of listing them all."""
    # Every word that is not zero holds a token at least.
    if np.count_nonzero(mask) > most:
        return None
    tokens = tokens_in(mask)
    return tokens if len(tokens) <= most else None

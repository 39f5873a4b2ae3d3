"""How to end a sequence that must match a grammar: short endings from any state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mlx_diffgemma.errors import UsageError

_WIDTH = 32  # states that a search follows at a time
_ALIKE = 4  # and of those that follow from one state and look alike
_FURTHEST = 4096  # tokens beyond which an ending is not looked for
_SEARCHED = 256  # the same, where the search has to branch


class ClosingError(UsageError):
    """No output that short can match; `shortest` is the length of one that can, if known."""

    def __init__(self, message: str, shortest: int | None) -> None:
        super().__init__(message)
        self.shortest = shortest


class State(Protocol):
    """The part of a matcher that endings need."""

    def advance(self, tokens: Sequence[int]) -> None: ...
    def allowed(self) -> np.ndarray: ...
    def forced(self) -> list[int]: ...
    @property
    def may_end(self) -> bool: ...
    def copy(self) -> State: ...


class Closer:
    """Finds endings.

    Args:
        preferred: tokens to end with, the best first: quotes and closing brackets, then such as
            make up short values. Together they should be able to spell anything.
    """

    def __init__(self, preferred: Sequence[int]) -> None:
        self.preferred = list(dict.fromkeys(preferred))

    def require(self, state: State, most: int) -> None:
        """Raise ClosingError where no ending of at most `most` tokens is found."""
        if self._find(state, most) is not None:
            return
        shortest = self._find(state, _FURTHEST)
        if shortest is None:
            raise ClosingError(
                f"no output of at most {_FURTHEST} tokens was found that matches; loosen the "
                "constraint.",
                None,
            )
        raise ClosingError(
            f"max_tokens is {most}, and the shortest output found that matches takes "
            f"{len(shortest)} tokens; raise max_tokens or loosen the constraint.",
            len(shortest),
        )

    def ending(self, state: State, most: int) -> list[int]:
        """Tokens that complete `state`, at most `most`; there must be some."""
        found = self._find(state, most)
        assert found is not None, "an ending was within reach before"
        return found

    def shortest(self, state: State, most: int) -> int:
        """Length of the shortest ending found; `most` where there is none within it."""
        found = self._find(state, most)
        return most if found is None else len(found)

    def affordable(self, state: State, tokens: Sequence[int], room: int) -> list[int]:
        """As many of the `tokens` as leave room for an ending within `room` tokens in all."""
        count = min(len(tokens), room)
        while count:
            after = state.copy()
            after.advance(list(tokens[:count]))
            if self._find(after, room - count) is not None:
                return list(tokens[:count])
            count //= 2
        return []

    def _find(self, state: State, most: int) -> list[int] | None:
        if state.may_end:
            return []
        return self._straight(state, most) or self._search(state, min(most, _SEARCHED))

    def _straight(self, state: State, most: int) -> list[int] | None:
        """Take the best token each time."""
        state, ending = state.copy(), list[int]()
        while len(ending) <= most:
            if state.may_end:
                return ending
            step = state.forced() or self._choices(state)[:1]
            if not step:
                return None
            state.advance(step)
            ending += step
        return None

    def _search(self, state: State, most: int) -> list[int] | None:
        """Breadth first, a few of each kind of state that follows from the same state: those after
        which the same may and must come are mostly one and the same."""
        front: list[tuple[State, list[int]]] = [(state.copy(), [])]
        while front:
            following: list[tuple[State, list[int]]] = []
            for current, ending in front:
                kinds: Counter[tuple[bytes, tuple[int, ...]]] = Counter()
                forced = current.forced()
                for step in [forced] if forced else [[token] for token in self._choices(current)]:
                    if len(ending) + len(step) > most:
                        continue
                    after = current.copy()
                    after.advance(step)
                    if after.may_end:
                        return [*ending, *step]
                    kind = after.allowed().tobytes(), tuple(after.forced())
                    kinds[kind] += 1
                    if kinds[kind] <= _ALIKE:
                        following.append((after, [*ending, *step]))
            front = following[:_WIDTH]
        return None

    def _choices(self, state: State) -> list[int]:
        allowed = state.allowed()
        return [token for token in self.preferred if allowed[token // 32] >> (token % 32) & 1]

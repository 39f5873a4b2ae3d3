"""How a sequence that must match a grammar keeps its end within reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mlx_diffgemma.errors import UsageError

_FURTHEST = 32_768  # tokens beyond which an ending is not looked for


class ClosingError(UsageError):
    """No output that is short enough was found to match; `shortest` is the length of the shortest
    one found, or None."""

    def __init__(self, message: str, shortest: int | None) -> None:
        super().__init__(message)
        self.shortest = shortest


class State(Protocol):
    """The part of a matcher that endings need."""

    def advance(self, tokens: Sequence[int]) -> None: ...
    def way_out(self, most: int, *, thorough: bool = False) -> list[int] | None: ...
    def copy(self) -> State: ...


class Closer:
    """Makes sure that an ending of the grammar fits into the tokens that are left. The grammar
    itself finds its endings (`State.way_out`)."""

    def require(self, state: State, most: int) -> None:
        """Raise ClosingError where no ending of at most `most` tokens is found."""
        if state.way_out(most, thorough=True) is not None:
            return
        shortest = state.way_out(_FURTHEST, thorough=True)
        if shortest is None:
            raise ClosingError(
                f"no output of at most {_FURTHEST:,} tokens was found that matches; loosen the "
                "constraint.",
                None,
            )
        raise ClosingError(
            f"max_tokens is {most}, and the shortest output found that matches takes "
            f"{len(shortest):,} tokens; raise max_tokens or loosen the constraint.",
            len(shortest),
        )

    def ending(self, state: State, most: int) -> list[int]:
        """At most `most` tokens that complete `state`, for which such an ending must exist."""
        found = state.way_out(most)
        if found is None:
            found = state.way_out(most, thorough=True)
        assert found is not None, "an ending was within reach before"
        return found

    def shortest(self, state: State, most: int) -> int:
        """Length of the shortest ending found; `most` where there is none within it."""
        found = state.way_out(most, thorough=True)
        return most if found is None else len(found)

    def affordable(self, state: State, tokens: Sequence[int], room: int) -> list[int]:
        """A beginning of `tokens` behind which an ending still fits, the two within `room` tokens:
        the longest of those tried. Tried are all tokens that fit, half of them, a quarter, and so
        on, and then as many as leave room for an ending as long as that of the first that fits. []
        where no ending fits behind any of them."""
        most = count = min(len(tokens), room)
        while count:
            ending = self._after(state, tokens[:count], room)
            if ending is not None:
                break
            count //= 2
        else:
            return []
        more = min(most - 1, room - len(ending))
        if more > count and self._after(state, tokens[:more], room) is not None:
            count = more
        return list(tokens[:count])

    def _after(self, state: State, tokens: Sequence[int], room: int) -> list[int] | None:
        """An ending behind `tokens` that takes what they leave of `room`, or None."""
        after = state.copy()
        after.advance(list(tokens))
        return after.way_out(room - len(tokens))

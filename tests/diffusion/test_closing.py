"""Endings of what must match, on languages small enough to list."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_diffgemma.diffusion.closing import Closer, ClosingError
from mlx_diffgemma.diffusion.constraints import token_mask


class Words:
    """The state of a finite language: `words` are its members, as tuples of tokens below 32."""

    def __init__(self, words, taken=()):
        self.words, self.taken = words, tuple(taken)

    def _rest(self):
        size = len(self.taken)
        return [word[size:] for word in self.words if word[:size] == self.taken]

    def advance(self, tokens):
        for token in tokens:
            assert any(rest and rest[0] == token for rest in self._rest())
            self.taken += (token,)

    def allowed(self):
        return token_mask({rest[0] for rest in self._rest() if rest}, 32)

    def forced(self):
        rest, forced = self._rest(), []
        while rest and all(rest) and len({word[0] for word in rest}) == 1:
            forced.append(rest[0][0])
            rest = [word[1:] for word in rest]
        return forced

    @property
    def may_end(self):
        return () in self._rest()

    def way_out(self, most, thorough=False):
        return min(
            (list(rest) for rest in self._rest() if len(rest) <= most), key=len, default=None
        )

    def copy(self):
        return Words(self.words, self.taken)


def random_words(rng):
    return [
        tuple(rng.integers(0, 4, rng.integers(1, 9)).tolist()) for _ in range(rng.integers(1, 7))
    ]


def test_an_ending_is_found_whenever_there_is_one():
    rng = np.random.default_rng(0)
    closer = Closer()
    for _ in range(400):
        words = random_words(rng)
        state = Words(words)
        most = int(rng.integers(0, 9))
        if min(map(len, words)) <= most:
            ending = closer.ending(state, most)
            assert tuple(ending) in words and len(ending) <= most
        else:
            with pytest.raises(ClosingError) as error:
                closer.require(state, most)
            assert error.value.shortest is not None
            assert str(error.value).startswith(f"max_tokens is {most}, and the shortest output")


def test_affordable_tokens_leave_an_ending_within_reach():
    rng = np.random.default_rng(1)
    closer = Closer()
    for _ in range(400):
        words = random_words(rng)
        drafted = words[int(rng.integers(len(words)))]
        room = int(rng.integers(min(map(len, words)), 9))
        kept = closer.affordable(Words(words), drafted, room)
        assert kept == list(drafted[: len(kept)])
        within = [word for word in words if word[: len(kept)] == tuple(kept) and len(word) <= room]
        assert within
        if len(drafted) <= room:
            assert kept == list(drafted)


def test_all_that_leaves_room_for_the_end_is_afforded():
    long = (0,) * 30
    endings = [(*long[:length], 1) for length in range(31)]
    for room in range(2, 31):
        assert Closer().affordable(Words(endings), long, room) == list(long[: room - 1])


def test_what_cannot_end_is_said_so():
    with pytest.raises(ClosingError) as error:
        Closer().require(Words([]), 10)
    assert error.value.shortest is None
    assert str(error.value) == (
        "no output of at most 32,768 tokens was found that matches; loosen the constraint."
    )

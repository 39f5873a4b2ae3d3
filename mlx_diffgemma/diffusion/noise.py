"""Every random draw of a sequence, from an explicit key.

A key depends on the seed, the sequence, the canvas, the step and the purpose alone. So a run can be
repeated, a sequence draws the same alone and in any company, and no draw depends on how many steps
an earlier canvas took. Letters: C canvas, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_diffgemma.checks import check_integer


class Purpose(IntEnum):
    """What a draw is for, as a part of its key."""

    INITIAL = 0
    DRAW = 1
    RENOISE = 2
    UNIFORM = 3


class Noise(Protocol):
    """The randomness of the canvases of a sequence. Tests put recorded draws in its place."""

    def initial(self, canvas: int, length: int, vocab: int) -> mx.array:
        """[C] uniform token ids to start canvas number `canvas` from."""

    def draw_key(self, canvas: int, step: int) -> mx.array:
        """[2] the key of the categorical draws of a step."""

    def renoise(self, canvas: int, step: int, length: int, vocab: int) -> mx.array:
        """[C] uniform token ids for the positions that a step does not accept."""

    def uniform(self, canvas: int, step: int, length: int) -> mx.array:
        """[C] uniform numbers in [0, 1), for samplers that toss coins."""


NoiseOf = Callable[[int], Noise]
"""The noise of each sequence of a batch, by its number."""


@dataclass(frozen=True)
class SeededNoise:
    """Noise that a seed and the number of the sequence determine."""

    seed: int
    sequence: int = 0

    def initial(self, canvas: int, length: int, vocab: int) -> mx.array:
        return _uniform_tokens(self._key(canvas, 0, Purpose.INITIAL), length, vocab)

    def draw_key(self, canvas: int, step: int) -> mx.array:
        return self._key(canvas, step, Purpose.DRAW)

    def renoise(self, canvas: int, step: int, length: int, vocab: int) -> mx.array:
        return _uniform_tokens(self._key(canvas, step, Purpose.RENOISE), length, vocab)

    def uniform(self, canvas: int, step: int, length: int) -> mx.array:
        return mx.random.uniform(shape=(length,), key=self._key(canvas, step, Purpose.UNIFORM))

    def _key(self, canvas: int, step: int, purpose: Purpose) -> mx.array:
        stream = np.random.SeedSequence(
            self.seed, spawn_key=(self.sequence, canvas, step, int(purpose))
        )
        return mx.array(stream.generate_state(2, np.uint32))


def seeded(seed: int) -> NoiseOf:
    """The noise of every sequence of a batch, from one seed."""
    return partial(SeededNoise, seed)


def checked_seed(seed: int | None) -> int:
    """The seed given, or for None a fresh one, small enough to be typed again.

    Raises:
        UsageError: the seed is no integer from 0 to 2^128 - 1.
    """
    if seed is None:
        return secrets.randbelow(2**32)
    check_integer("seed", seed, 0, (1 << 128) - 1)
    return seed


def _uniform_tokens(key: mx.array, length: int, vocab: int) -> mx.array:
    return mx.random.randint(0, vocab, (length,), mx.int32, key=key)

"""Every random draw, from an explicit key.

A key depends on the seed, the sequence, the canvas, the step and the purpose alone. So a run can be
repeated, a sequence draws the same alone and in a batch, and no draw depends on how many steps an
earlier canvas took. Letters: R rows, C canvas, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import mlx.core as mx
import numpy as np


class Purpose(IntEnum):
    INITIAL = 0
    DRAW = 1
    RENOISE = 2
    UNIFORM = 3


class Noise(Protocol):
    """Where the loop gets its randomness; tests put recorded draws in its place."""

    def initial_canvas(self, rows: Sequence[int], canvas: int, length: int, vocab: int) -> mx.array:
        """[R, C] uniform token ids to start canvas number `canvas` from."""

    def draw_keys(self, rows: Sequence[int], canvas: int, step: int) -> mx.array:
        """[R, 2] one key a row, for the categorical draws of a step."""

    def renoise(
        self, rows: Sequence[int], canvas: int, step: int, length: int, vocab: int
    ) -> mx.array:
        """[R, C] uniform token ids for the positions that a step does not accept."""

    def uniform(self, rows: Sequence[int], canvas: int, step: int, length: int) -> mx.array:
        """[R, C] uniform numbers in [0, 1), for samplers that toss coins."""


@dataclass(frozen=True)
class StepNoise:
    """The noise of one step of one canvas."""

    noise: Noise
    rows: Sequence[int]
    canvas: int
    step: int
    length: int
    vocab: int

    def keys(self) -> mx.array:
        return self.noise.draw_keys(self.rows, self.canvas, self.step)

    def tokens(self) -> mx.array:
        return self.noise.renoise(self.rows, self.canvas, self.step, self.length, self.vocab)

    def uniform(self) -> mx.array:
        return self.noise.uniform(self.rows, self.canvas, self.step, self.length)


class SeededNoise:
    """Noise that a seed determines: row `r` of the batch draws from its own streams."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def initial_canvas(self, rows: Sequence[int], canvas: int, length: int, vocab: int) -> mx.array:
        return _uniform_tokens(self._keys(rows, canvas, 0, Purpose.INITIAL), length, vocab)

    def draw_keys(self, rows: Sequence[int], canvas: int, step: int) -> mx.array:
        return self._keys(rows, canvas, step, Purpose.DRAW)

    def renoise(
        self, rows: Sequence[int], canvas: int, step: int, length: int, vocab: int
    ) -> mx.array:
        return _uniform_tokens(self._keys(rows, canvas, step, Purpose.RENOISE), length, vocab)

    def uniform(self, rows: Sequence[int], canvas: int, step: int, length: int) -> mx.array:
        keys = self._keys(rows, canvas, step, Purpose.UNIFORM)
        return mx.stack([mx.random.uniform(shape=(length,), key=key) for key in keys])

    def _keys(self, rows: Sequence[int], canvas: int, step: int, purpose: Purpose) -> mx.array:
        streams = (
            np.random.SeedSequence(self.seed, spawn_key=(row, canvas, step, purpose))
            for row in rows
        )
        return mx.array(np.stack([stream.generate_state(2, np.uint32) for stream in streams]))


def fresh_seed() -> int:
    """A seed for a run whose user gave none; small enough to be typed again."""
    return secrets.randbelow(2**32)


def draw_categorical(logits: mx.array, keys: mx.array) -> mx.array:
    """One token a position from `logits` [R, C, V], row r with `keys[r]` [2] -> [R, C] int32."""
    rows = [mx.random.categorical(row, key=key) for row, key in zip(logits, keys, strict=True)]
    return mx.stack(rows).astype(mx.int32)


def _uniform_tokens(keys: mx.array, length: int, vocab: int) -> mx.array:
    rows = [mx.random.randint(0, vocab, (length,), mx.int32, key=key) for key in keys]
    return mx.stack(rows)

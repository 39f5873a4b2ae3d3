"""What a canvas must hold: per position a fixed token, a set of allowed tokens, or anything.

A constraint is applied wherever the loop could break it: to the canvas that a step starts from and
to the distribution that the model predicts, so that draw, draft, entropy and soft embeddings all
obey it. Letters: R rows, C canvas, V vocabulary, W = ⌈V / 32⌉ words of a bit mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
import numpy as np

from mlx_diffgemma.errors import UsageError

FREE = -1


@dataclass(frozen=True)
class CanvasConstraint:
    """Attributes:
    fixed: [R, C] int32, the token that a position must hold, or `FREE`.
    allowed: [R, C, W] uint32, bit v of a position is set where token v is allowed; None where
        every free position may hold anything.
    """

    fixed: np.ndarray
    allowed: np.ndarray | None = None

    @classmethod
    def free(cls, rows: int, length: int) -> CanvasConstraint:
        return cls(np.full((rows, length), FREE, np.int32))

    @classmethod
    def of(cls, layouts: Sequence[Layout], vocab: int) -> CanvasConstraint:
        """The constraint of a batch: one layout a row, all of one length."""
        fixed = np.array([layout.tokens for layout in layouts], np.int32)
        if not any(layout.allowed for layout in layouts):
            return cls(fixed)
        allowed = np.empty((*fixed.shape, -(-vocab // 32)), np.uint32)
        allowed[:] = every_token(vocab)
        for row, layout in enumerate(layouts):
            for place, mask in layout.allowed.items():
                allowed[row, place] = mask
        return cls(fixed, allowed)

    @property
    def open(self) -> np.ndarray:
        """[R, C] which positions are not fixed."""
        return self.fixed == FREE

    def rows(self, places: Sequence[int]) -> CanvasConstraint:
        """The constraint of some rows of the batch."""
        index = list(places)
        return CanvasConstraint(
            self.fixed[index], None if self.allowed is None else self.allowed[index]
        )

    def check(self, rows: int, length: int, vocab: int) -> None:
        """Raise UsageError where the constraint does not fit the canvas or allows nothing."""
        if self.fixed.shape != (rows, length):
            raise UsageError(
                f"the constraint has shape {self.fixed.shape}; the canvas has ({rows}, {length})."
            )
        if ((self.fixed < FREE) | (self.fixed >= vocab)).any():
            raise UsageError(f"a fixed token is outside the vocabulary of {vocab}.")
        if self.allowed is not None:
            words = -(-vocab // 32)
            if self.allowed.shape != (rows, length, words):
                raise UsageError(
                    f"the allowed sets have shape {self.allowed.shape}; they need "
                    f"({rows}, {length}, {words})."
                )
            empty = ~self.allowed.any(axis=-1) & self.open
            if empty.any():
                row, place = np.argwhere(empty)[0]
                raise UsageError(f"position {place} of row {row} allows no token at all.")

    def pin(self, canvas: mx.array) -> mx.array:
        """The canvas [R, C] with every fixed position set."""
        return mx.where(self.is_open, canvas, self.fixed_tokens)

    def restrict(self, logits: mx.array) -> mx.array:
        """Logits [R, C, V] with -inf for every token that a position must not hold."""
        return mx.where(self._keep(logits.shape[-1]), logits, -mx.inf)

    def _keep(self, vocab: int) -> mx.array:
        """[R, C, V] which tokens may stand where; made once, for all the steps of a canvas."""
        if vocab not in self._kept:
            fixed = self.fixed_tokens[..., None]
            keep = fixed == mx.arange(vocab)
            anything = fixed == FREE
            if self.allowed_words is not None:
                bits = (self.allowed_words[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
                allowed = bits.astype(mx.bool_).reshape(*self.fixed.shape, -1)[..., :vocab]
                anything = anything & allowed
            self._kept[vocab] = keep | anything
        return self._kept[vocab]

    @cached_property
    def _kept(self) -> dict[int, mx.array]:
        return {}

    @cached_property
    def is_open(self) -> mx.array:
        """[R, C] which positions are not fixed, for the device."""
        return self.fixed_tokens == FREE

    @cached_property
    def fixed_tokens(self) -> mx.array:
        """`fixed`, for the device."""
        return mx.array(self.fixed)

    @cached_property
    def allowed_words(self) -> mx.array | None:
        """`allowed`, for the device."""
        return None if self.allowed is None else mx.array(self.allowed)


@dataclass(frozen=True)
class Layout:
    """One row of a constraint.

    Attributes:
        tokens: [C] the token of each position, or `FREE`.
        allowed: the bit mask [W] of the free positions that may not hold anything.
    """

    tokens: tuple[int, ...]
    allowed: Mapping[int, np.ndarray] = field(default_factory=dict)


def token_mask(tokens: Iterable[int], vocab: int) -> np.ndarray:
    """A set of token ids as a bit mask [W] uint32."""
    bits = np.zeros(-(-vocab // 32) * 32, bool)
    bits[list(tokens)] = True
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def every_token(vocab: int) -> np.ndarray:
    """The set of all token ids as a bit mask [W] uint32."""
    mask = np.full(-(-vocab // 32), 0xFFFFFFFF, np.uint32)
    if vocab % 32:
        mask[-1] = (1 << vocab % 32) - 1
    return mask

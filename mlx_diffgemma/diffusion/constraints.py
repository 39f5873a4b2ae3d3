"""What a canvas must hold: per position a fixed token, a set of allowed tokens, or anything.

A layout is applied wherever a step could break it: to the tokens that it starts from and to the
distribution that the model predicts, so that draw, draft, entropy and soft embeddings all obey it.
Letters: C canvas, V vocabulary, W = ⌈V / 32⌉ words of a bit mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import mlx.core as mx
import numpy as np

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.kernels.allowed_tokens import every_token

FREE = -1


@dataclass(frozen=True)
class Layout:
    """What each position of a canvas must or may hold.

    Attributes:
        tokens: [C] the token that each position must hold, or `FREE`.
        allowed: the bit masks [W] of the tokens that may stand at free positions, for those where
            not every token may.
        candidates: the lists of the tokens that may stand at free positions, for those where few
            may.
    """

    tokens: tuple[int, ...]
    allowed: Mapping[int, np.ndarray] = field(default_factory=dict)
    candidates: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @cached_property
    def fixed(self) -> np.ndarray:
        """`tokens` as an array [C] int32."""
        return np.array(self.tokens, np.int32)

    @cached_property
    def open(self) -> np.ndarray:
        """[C] which positions are not fixed."""
        return self.fixed == FREE

    @cached_property
    def pins(self) -> bool:
        """Whether any position is fixed."""
        return not bool(self.open.all())

    @cached_property
    def few(self) -> tuple[tuple[int, ...], ...] | None:
        """The candidates of every free position, in the order of the positions; None where a free
        position has no candidates, or no position is free."""
        places = np.flatnonzero(self.open).tolist()
        if not places or any(place not in self.candidates for place in places):
            return None
        return tuple(self.candidates[place] for place in places)

    def masks(self, vocab: int) -> Mapping[int, np.ndarray]:
        """The bit mask [W] of the tokens that may stand at a position, for each position where not
        every token may, those with candidates among them."""
        if not self.candidates:
            return self.allowed
        few = {place: token_mask(tokens, vocab) for place, tokens in self.candidates.items()}
        return {**self.allowed, **few}

    def pin(self, tokens: mx.array) -> mx.array:
        """Tokens [C] with every fixed position set."""
        if not self.pins:
            return tokens
        return mx.where(mx.array(self.open), tokens, mx.array(self.fixed))

    def check(self, length: int, vocab: int) -> None:
        """Raise UsageError where the layout does not fit a canvas or allows nothing."""
        if len(self.tokens) != length:
            raise UsageError(f"the layout has {len(self.tokens)} positions; the canvas {length}.")
        if ((self.fixed < FREE) | (self.fixed >= vocab)).any():
            raise UsageError(f"a fixed token is outside the vocabulary of {vocab}.")
        words = -(-vocab // 32)
        for place, mask in self.allowed.items():
            if not 0 <= place < length or mask.shape != (words,):
                raise UsageError(
                    f"the set allowed at position {place} has {mask.size} words; a canvas of "
                    f"{length} and a vocabulary of {vocab} need {words} at a position within it."
                )
            if self.fixed[place] == FREE and not mask.any():
                raise UsageError(f"position {place} allows no token at all.")
        for place, tokens in self.candidates.items():
            if not 0 <= place < length or not tokens:
                raise UsageError(f"position {place} has no candidates, or is outside the canvas.")
            if not all(0 <= token < vocab for token in tokens):
                raise UsageError(f"a candidate is outside the vocabulary of {vocab}.")


def not_at_first(tokens: Iterable[int], length: int, vocab: int) -> Layout:
    """The layout of a canvas [C] that may begin with any token but `tokens`."""
    mask = every_token(vocab) & ~token_mask(tokens, vocab)
    return Layout((FREE,) * length, {0: mask})


def without(
    tokens: Iterable[int], length: int, vocab: int, layout: Layout | None = None
) -> Layout | None:
    """A copy of `layout` that forbids `tokens` at every position that has neither a fixed token nor
    candidates; without a layout, one [C] that allows all else. Where there are no `tokens`,
    `layout` itself."""
    unwanted = tuple(tokens)
    if not unwanted:
        return layout
    layout = layout or Layout((FREE,) * length)
    mask = every_token(vocab) & ~token_mask(unwanted, vocab)
    free = [p for p in range(length) if layout.tokens[p] == FREE and p not in layout.candidates]
    # Positions that share a mask take the memory of one, so each mask of the layout is cut once.
    cut = {id(own): own & mask for own in layout.allowed.values()}
    allowed = {p: cut[id(layout.allowed[p])] if p in layout.allowed else mask for p in free}
    return replace(layout, allowed={**layout.allowed, **allowed})


def token_mask(tokens: Iterable[int], vocab: int) -> np.ndarray:
    """A set of token ids as a bit mask [W] uint32."""
    bits = np.zeros(-(-vocab // 32) * 32, bool)
    bits[list(tokens)] = True
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)

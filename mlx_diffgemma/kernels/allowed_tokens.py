"""Sets of allowed tokens as packed bits: bit `v % 32` of word `v // 32` says that v is allowed.

Letters: N positions, V vocabulary, W words of 32 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

WORD = 32
FORBIDDEN = -3e38  # a logit so low that its exponential is zero; finite, so that 0 · it is 0


def pack_allowed(allowed: mx.array) -> mx.array:
    """Booleans [..., V] -> uint32 [..., W]."""
    *shape, vocab = allowed.shape
    padding = [(0, 0)] * len(shape) + [(0, -vocab % WORD)]
    bits = mx.pad(allowed.astype(mx.uint32), padding).reshape(*shape, -1, WORD)
    return (bits << mx.arange(WORD, dtype=mx.uint32)).sum(axis=-1)


def unpack_allowed(words: mx.array, count: int) -> mx.array:
    """uint32 [..., W] -> the first `count` booleans [..., count]."""
    bits = (words[..., None] >> mx.arange(WORD, dtype=mx.uint32)) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :count].astype(mx.bool_)


def forbid(logits: mx.array, words: mx.array) -> mx.array:
    """Logits [..., v] with those of tokens outside `words` [..., W] made impossible."""
    return mx.where(unpack_allowed(words, logits.shape[-1]), logits, FORBIDDEN)


def words_of(allowed: Mapping[int, np.ndarray], length: int, vocab: int) -> np.ndarray:
    """Masks [length, W] uint32 of `length` positions, those of `allowed` [W] at the positions that
    it names; at the others every token is allowed."""
    words = np.tile(every_token(vocab), (length, 1))
    for place, mask in allowed.items():
        words[place] = mask
    return words


def every_token(vocab: int) -> np.ndarray:
    """The set of all token ids as a bit mask [W] uint32."""
    mask = np.full(-(-vocab // WORD), 0xFFFFFFFF, np.uint32)
    if vocab % WORD:
        mask[-1] = (1 << vocab % WORD) - 1
    return mask

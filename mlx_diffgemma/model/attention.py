"""Attention: `encode` writes the prefix cache, `decode` only reads it.

Letters: B batch, S new positions, L prefix positions, C canvas, K keys in sight, H heads,
Dh head size, D hidden.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_diffgemma.config import FULL, SLIDING, AttentionConfig, RopeConfig, TextConfig
from mlx_diffgemma.model.cache import LayerCache, PrefixCache

Mask = mx.array | str | None

_SCORE_BYTES = 64 << 20  # most bytes of attention scores to hold at once


def encoder_masks(config: TextConfig, cache: PrefixCache, new: int) -> dict[str, Mask]:
    """Who sees whom in the encoder, by kind of layer: a token sees itself and what came before,
    in sliding layers only the last `window` positions, itself included; nobody sees padding."""
    causal: Mask = "causal"
    if cache.pads is not None:
        causal = _causal_mask(cache.offset, new, 0, None, cache.pads)
    sliding, window = causal, config.sliding_window
    if cache.offset + new > window:
        first = max(0, cache.offset - (window - 1))
        sliding = _causal_mask(cache.offset, new, first, window, cache.pads)
    return {FULL: causal, SLIDING: sliding}


def decoder_masks(config: TextConfig, cache: PrefixCache, canvas: int) -> dict[str, Mask]:
    """Who sees whom in the decoder: every canvas token sees the whole canvas and all of the prefix
    that the cache holds (in sliding layers its last `window - 1` positions), but no padding."""
    if cache.pads is None:
        return {FULL: None, SLIDING: None}
    end = cache.offset + canvas
    first = {FULL: 0, SLIDING: max(0, cache.offset - (config.sliding_window - 1))}
    pads = cache.pads[:, None]
    return {
        kind: mx.array(np.arange(start, end) >= pads)[:, None, None, :]
        for kind, start in first.items()
    }


def _causal_mask(
    offset: int, new: int, first: int, window: int | None, pads: np.ndarray | None
) -> mx.array:
    """[B or 1, 1, S, K]: query `offset + s` sees key `first + k`. A padding token sees itself, for
    a softmax over nothing would be NaN and spread."""
    query = np.arange(offset, offset + new)[:, None]
    key = np.arange(first, offset + new)[None, :]
    seen = key <= query
    if window is not None:
        seen &= query - key < window
    if pads is None:
        return mx.array(seen)[None, None]
    seen = seen & (key >= pads[:, None, None]) | (key == query)
    return mx.array(seen)[:, None]


class Rope:
    """Rotary embedding that pairs (d, d + Dh/2), in float32.

    The frequencies are spelled out as the reference computes them (numpy and torch agree to the
    bit) rather than left to the kernel's own exponentials. Proportional: the first
    `partial_rotary_factor` of them rotate, with the whole head size in the exponent.
    """

    def __init__(self, head_dim: int, rope: RopeConfig) -> None:
        self.head_dim = head_dim
        rotated = int(rope.partial_rotary_factor * head_dim // 2)
        exponents = np.arange(0, 2 * rotated, 2, dtype=np.float32) / np.float32(head_dim)
        periods = np.full(head_dim // 2, np.inf, np.float32)
        periods[:rotated] = np.float32(rope.theta) ** exponents * np.float32(rope.factor)
        self.periods = mx.array(periods)

    def __call__(
        self, x: mx.array, offset: int | mx.array, places: mx.array | None = None
    ) -> mx.array:
        """[B, H, S, Dh] at the positions from `offset` on (a number, or [B]); or, where `places`
        [S] is given, at `offset + places`."""
        if places is None:
            return self._rotate(x, offset)
        # The kernel takes one offset a batch entry, so each position becomes an entry.
        batch, heads, count, size = x.shape
        apart = x.transpose(2, 0, 1, 3).reshape(count, batch * heads, 1, size)
        together = self._rotate(apart, offset + places).reshape(count, batch, heads, size)
        return together.transpose(1, 2, 0, 3)

    def _rotate(self, x: mx.array, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(
            x, self.head_dim, traditional=False, base=None, scale=1.0, offset=offset,
            freqs=self.periods,
        )  # fmt: skip


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, mask: Mask, *, bounded: bool = False
) -> mx.array:
    """Softmax attention with scale 1, [B, H, S, Dh], a block of queries at a time where the scores
    of all at once would not fit in a fixed budget.

    `bounded` evaluates each block before the next is begun: MLX takes the memory of an operation
    when it is queued, so blocks that are queued together hold it together.
    """
    batch, heads, new, _ = queries.shape
    total = keys.shape[2]
    block = max(1, _SCORE_BYTES // (4 * batch * heads * total))
    if new <= block:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask)
    outputs = []
    for start in range(0, new, block):
        stop = min(start + block, new)
        seen = total - new + stop if mask == "causal" else total
        part = (
            mask[..., start:stop, :] if isinstance(mask, mx.array) and mask.shape[2] > 1 else mask
        )
        outputs.append(
            mx.fast.scaled_dot_product_attention(
                queries[:, :, start:stop],
                keys[:, :, :seen],
                values[:, :, :seen],
                scale=1.0,
                mask=part,
            )
        )
        if bounded:
            mx.eval(outputs[-1])
    return mx.concatenate(outputs, axis=2)


class Attention(nn.Module):
    """Grouped-query attention with per-head norms. Full layers have no value projection: their
    values are the key projection before its norm and rotation."""

    def __init__(self, config: TextConfig, sizes: AttentionConfig) -> None:
        super().__init__()
        self.sizes = sizes
        dim, eps = config.hidden_size, config.rms_norm_eps
        kv_dim = sizes.num_kv_heads * sizes.head_dim
        self.q_proj = nn.Linear(dim, sizes.num_heads * sizes.head_dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_dim, bias=False)
        if sizes.is_sliding:
            self.v_proj = nn.Linear(dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(sizes.num_heads * sizes.head_dim, dim, bias=False)
        self.q_norm = nn.RMSNorm(sizes.head_dim, eps=eps)
        self.k_norm = nn.RMSNorm(sizes.head_dim, eps=eps)
        self._eps = eps
        self._rope = Rope(sizes.head_dim, sizes.rope)

    def encode(
        self, x: mx.array, mask: Mask, cache: LayerCache, offset: int | mx.array
    ) -> mx.array:
        """[B, S, D] attends to itself and the prefix, and joins the prefix."""
        queries, keys, values = self._project(x, offset)
        # A gradient is traced, and nothing can be evaluated inside it.
        bounded = not self.training
        return self._output(attend(queries, *cache.extend(keys, values), mask, bounded=bounded))

    def decode(
        self,
        x: mx.array,
        mask: Mask,
        cache: LayerCache,
        offset: int | mx.array,
        places: mx.array | None = None,
    ) -> mx.array:
        """A canvas [B, C, D] attends both ways to itself and to the prefix, which is only read.

        Where `places` [A] is given, x [B, A, D] are those positions of the canvas; the others take
        part with the keys and values of the last pass that computed them.
        """
        queries, keys, values = self._project(x, offset, places)
        return self._output(attend(queries, *cache.with_canvas(keys, values, places), mask))

    def _project(
        self, x: mx.array, offset: int | mx.array, places: mx.array | None = None
    ) -> tuple[mx.array, mx.array, mx.array]:
        batch, new, _ = x.shape
        size = self.sizes.head_dim
        queries = self.q_norm(self.q_proj(x).reshape(batch, new, -1, size))
        raw_keys = self.k_proj(x).reshape(batch, new, -1, size)
        values = self.v_proj(x).reshape(raw_keys.shape) if self.sizes.is_sliding else raw_keys
        queries, keys, values = (
            heads.transpose(0, 2, 1, 3)
            for heads in (queries, self.k_norm(raw_keys), mx.fast.rms_norm(values, None, self._eps))
        )
        return self._rope(queries, offset, places), self._rope(keys, offset, places), values

    def _output(self, heads: mx.array) -> mx.array:
        batch, _, new, _ = heads.shape
        return self.o_proj(heads.transpose(0, 2, 1, 3).reshape(batch, new, -1))

"""Attention, its rotary embedding, and who sees whom.

Letters: B batch, S new positions, C canvas, K keys in sight, H heads, Dh head size, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_diffgemma.config import FULL, SLIDING, AttentionConfig, RopeConfig, TextConfig
from mlx_diffgemma.model.cache import KeysValues

_SCORE_BYTES = 64 << 20  # most bytes of attention scores to hold at once


@dataclass(frozen=True)
class Causal:
    """The rule that a token sees itself and what came before it. The last query stands at the last
    key.

    Attributes:
        window: the number of positions that a token sees at most, itself included; None for all.
        pictures: spans of queries, each the first one and the one after the last. The tokens of a
            picture see all of that picture besides.
    """

    window: int | None = None
    pictures: tuple[tuple[int, int], ...] = ()


Mask = mx.array | Causal | None
"""What queries see: [B or 1, 1, S or 1, K] booleans, a rule, or None where each sees every key."""


def canvas_masks(
    config: TextConfig, prefix: mx.array, length: int, canvas: int
) -> dict[str, mx.array]:
    """Who sees whom in training, where the keys of a whole sequence stand before those of a canvas:
    masks [B, 1, 1, S + C] by kind of layer, for canvases of C behind sequences of S. Every canvas
    token sees the whole canvas and the first `prefix` [B] positions of its sequence, in sliding
    layers the last `window - 1` of them. It sees neither the part of the sequence that its canvas
    stands for nor what follows."""
    place = mx.arange(length + canvas)[None]
    end = prefix[:, None]
    on_canvas = place >= length
    seen = {FULL: place < end, SLIDING: place < end}
    if length >= config.sliding_window:
        seen[SLIDING] = seen[FULL] & (place >= end - (config.sliding_window - 1))
    return {kind: (mask | on_canvas)[:, None, None, :] for kind, mask in seen.items()}


def picture_masks(config: TextConfig, soft_places: mx.array, count: int) -> dict[str, mx.array]:
    """Masks [B, 1, S, S] of the encoder by kind of layer, true where a position sees another, for
    sequences with pictures of `count` soft tokens each at `soft_places` [B, S]. A position sees
    itself and what came before, in sliding layers within the window only, and all of its own
    picture."""
    place = mx.arange(soft_places.shape[1])
    apart = place[:, None] - place[None]
    picture = mx.where(soft_places < 0, -1, soft_places // count)
    own = (picture[:, :, None] == picture[:, None, :]) & (picture >= 0)[:, :, None]
    seen = {FULL: apart >= 0, SLIDING: (apart >= 0) & (apart < config.sliding_window)}
    return {kind: (mask | own)[:, None] for kind, mask in seen.items()}


class Rope:
    """Rotary embedding that pairs (d, d + Dh/2), in float32.

    The frequencies are spelled out as the reference computes them (numpy and torch agree to the
    bit) rather than left to the kernel's own exponentials. In a proportional embedding the first
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
    """Softmax attention with scale 1: queries [B, H, S, Dh], keys and values [B, KV heads, K, Dh]
    -> [B, H, S, Dh].

    It goes in even blocks of queries where the scores of all at once would take more than 64 MiB.
    No mask is larger than a block's.

    `bounded` evaluates each block before the next is begun: MLX takes the memory of an operation
    when it is queued, so blocks that are queued together hold it together.
    """
    batch, heads, new, _ = queries.shape
    total = keys.shape[2]
    in_sight = total
    if isinstance(mask, Causal) and mask.window is not None:
        in_sight = min(total, new + mask.window - 1)
    most = max(1, _SCORE_BYTES // (queries.dtype.size * batch * heads * in_sight))
    count = -(-new // most)
    block = -(-new // count)
    outputs = []
    for start in range(0, new, block):
        stop = min(start + block, new)
        first, last, part = _sight(mask, start, stop, new, total)
        outputs.append(
            mx.fast.scaled_dot_product_attention(
                queries[:, :, start:stop],
                keys[:, :, first:last],
                values[:, :, first:last],
                scale=1.0,
                mask=part,
            )
        )
        if bounded and count > 1:
            mx.eval(outputs[-1])
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def _sight(
    mask: Mask, start: int, stop: int, new: int, total: int
) -> tuple[int, int, mx.array | str | None]:
    """What the queries from `start` to `stop` of `new` see of `total` keys: from which key to which
    one, and a mask on these."""
    if mask is None:
        return 0, total, None
    if isinstance(mask, mx.array):
        return 0, total, mask[..., start:stop, :] if mask.shape[2] > 1 else mask
    own, last = total - new + start, total - new + stop
    before = total - new
    around = [(a + before, b + before) for a, b in mask.pictures if a < stop and b > start]
    if around:
        return _sight_of_pictures(mask, own, last, around)
    if mask.window is None or last <= mask.window:
        return 0, last, "causal"
    first = max(0, own - (mask.window - 1))
    apart = mx.arange(own, last)[:, None] - mx.arange(first, last)[None]
    return first, last, ((apart >= 0) & (apart < mask.window))[None, None]


def _sight_of_pictures(
    mask: Causal, own: int, last: int, pictures: Sequence[tuple[int, int]]
) -> tuple[int, int, mx.array]:
    """As `_sight`, for queries that stand from the key `own` to before `last`, some of them in
    pictures, each from a key to before another."""
    first = 0 if mask.window is None else max(0, own - (mask.window - 1))
    first = min([first, *(a for a, _ in pictures)])
    end = max([last, *(b for _, b in pictures)])
    place = np.arange(first, end)
    picture = np.full(end - first, -1)
    for number, (a, b) in enumerate(pictures):
        picture[a - first : b - first] = number
    queries = slice(own - first, last - first)
    apart = place[queries, None] - place[None]
    seen = apart >= 0
    if mask.window is not None:
        seen &= apart < mask.window
    same = picture[queries, None] == picture[None]
    return first, end, mx.array(seen | (same & (picture >= 0)))[None, None]


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
        self.causal = Causal(config.sliding_window if sizes.is_sliding else None)

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """[B, S, D] -> queries, keys and values [B, H, S, Dh], not rotated yet."""
        batch, new, _ = x.shape
        size = self.sizes.head_dim
        queries = self.q_norm(self.q_proj(x).reshape(batch, new, -1, size))
        raw_keys = self.k_proj(x).reshape(batch, new, -1, size)
        values = self.v_proj(x).reshape(raw_keys.shape) if self.sizes.is_sliding else raw_keys
        parts = (queries, self.k_norm(raw_keys), mx.fast.rms_norm(values, None, self._eps))
        queries, keys, values = (part.transpose(0, 2, 1, 3) for part in parts)
        return queries, keys, values

    def rotate(
        self,
        queries: mx.array,
        keys: mx.array,
        offset: int | mx.array,
        places: mx.array | None = None,
    ) -> KeysValues:
        """Queries and keys [B, H, S, Dh] at the positions from `offset` on (a number, or [B]), or
        at `offset + places` [S]."""
        return self._rope(queries, offset, places), self._rope(keys, offset, places)

    def output(self, heads: mx.array) -> mx.array:
        """What was attended to, [B, H, S, Dh] -> [B, S, D]."""
        batch, _, new, _ = heads.shape
        return self.o_proj(heads.transpose(0, 2, 1, 3).reshape(batch, new, -1))

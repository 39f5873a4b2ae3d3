"""What follows the product of hidden states with a tile of the embedding table.

The products become logits by softcap and temperature, and of these maximum, argmax, exponentials
and their sums are computed. Letters: M positions, v tokens of the tile, b blocks of `BLOCK` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_diffgemma.cpu.elementwise import exp_nonpositive, tanh
from mlx_diffgemma.kernels.activation import softcap
from mlx_diffgemma.kernels.allowed_tokens import FORBIDDEN
from mlx_diffgemma.kernels.draw import BLOCK


@dataclass(frozen=True)
class TileStatistics:
    """A tile as seen from the running maximum after it.

    Attributes:
        maximum: [M] the larger of the tile's maximum and the one before the tile.
        argmax: [M] int32, place in the tile of its first maximum.
        exceeds: [M] whether the tile's maximum is above the one before the tile.
        exponentials: [M, v] exp(x − maximum).
        masses: [M, b] sums of the exponentials over blocks of tokens.
        weighted: [M] Σ exp(x − maximum) · (x − maximum); NaN where a product is not finite.
    """

    maximum: mx.array
    argmax: mx.array
    exceeds: mx.array
    exponentials: mx.array
    masses: mx.array
    weighted: mx.array


def processed_logits(raw: mx.array, cap: float, scale: float | mx.array) -> mx.array:
    """[M, v] products -> [M, v] float32 logits, soft-capped, after the temperature; `scale` is
    cap / temperature, one number or [M, 1]."""
    return softcap(raw, cap, scale, tanh)


def tile_epilogue(raw: mx.array, logits: mx.array, maximum: mx.array) -> TileStatistics:
    """[M, v] products of a tile, the logits that they become, and the running maximum [M] before
    it -> its statistics.

    The running maximum is exact where a fixed shift by the softcap is not: at a temperature of 0.4
    the exponential of the smallest possible logit is e^-150 of the largest, and a row whose maximum
    is below −5 would lose all its mass in float32.
    """
    blocks = _blocks(logits, FORBIDDEN)
    count, size = blocks.shape[:2]
    block_maxima = blocks.max(axis=-1)
    # The first maximum, without a pass over the whole tile: first block, then within the block.
    best_block = mx.argmax(block_maxima, axis=-1)
    chosen = blocks.reshape(-1, BLOCK)[mx.arange(count) * size + best_block]
    tile_maximum = block_maxima.max(axis=-1)
    argmax = best_block.astype(mx.int32) * BLOCK + mx.argmax(chosen, axis=-1).astype(mx.int32)

    new_maximum = mx.maximum(maximum, tile_maximum)
    below = logits - new_maximum[:, None]
    exponentials = exp_nonpositive(below)
    # The softcap makes an infinity finite; a sum of products does not, and costs little.
    poison = raw.sum(axis=-1) * 0.0
    return TileStatistics(
        maximum=new_maximum,
        argmax=argmax,
        exceeds=tile_maximum > maximum,
        exponentials=exponentials,
        masses=_blocks(exponentials, 0.0).sum(axis=-1),
        weighted=(exponentials * below).sum(axis=-1) + poison,
    )


def _blocks(x: mx.array, filling: float) -> mx.array:
    """[M, v] -> [M, b, BLOCK], with `filling` where the last block has no tokens."""
    if missing := -x.shape[-1] % BLOCK:
        x = mx.pad(x, [(0, 0), (0, missing)], constant_values=filling)
    return x.reshape(x.shape[0], -1, BLOCK)

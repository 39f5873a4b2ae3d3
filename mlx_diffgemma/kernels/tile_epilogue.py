"""What follows the product of hidden states with a tile of the embedding table.

Softcap, temperature, maximum, argmax, exponentials and their sums. Letters: N positions, v tokens
of the tile, b blocks of `BLOCK` tokens, W words of 32 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_diffgemma.kernels.allowed_tokens import forbid
from mlx_diffgemma.kernels.elementwise import exp_nonpositive, tanh

BLOCK = 128  # tokens of which one mass is kept, for the draw


@dataclass(frozen=True)
class TileStatistics:
    """A tile as seen from the running maximum after it.

    Attributes:
        maximum: [N] the larger of the tile's maximum and the one before the tile.
        argmax: [N] int32, place in the tile of its first maximum.
        exceeds: [N] whether the tile's maximum is above the one before the tile.
        exponentials: [N, v] exp(x − maximum).
        masses: [N, b] sums of the exponentials over blocks of tokens.
        weighted: [N] Σ exp(x − maximum) · (x − maximum).
    """

    maximum: mx.array
    argmax: mx.array
    exceeds: mx.array
    exponentials: mx.array
    masses: mx.array
    weighted: mx.array


def processed_logits(
    raw: mx.array, words: mx.array | None, softcap: float, temperature: float
) -> mx.array:
    """[..., v] products -> [..., v] float32 logits, soft-capped, after the temperature; those of
    tokens outside `words` [..., W] made impossible."""
    x = tanh(raw.astype(mx.float32) * (1 / softcap)) * (softcap / temperature)
    return forbid(x, words)


def tile_epilogue(
    raw: mx.array,
    maximum: mx.array,
    words: mx.array | None,
    *,
    softcap: float,
    temperature: float,
    dtype: mx.Dtype,
) -> TileStatistics:
    """[N, v] products of a tile and the running maximum [N] before it -> its statistics.

    The running maximum is exact where a fixed shift by the softcap is not: at a temperature of 0.4
    the exponential of the smallest possible logit is e^-150 of the largest, and a row whose maximum
    is below −5 would lose all its mass in float32.
    """
    x = processed_logits(raw, words, softcap, temperature)
    blocks = _blocks(x)
    count, size = blocks.shape[:2]
    block_maxima = blocks.max(axis=-1)
    # The first maximum, without a pass over the whole tile: first block, then within the block.
    best_block = mx.argmax(block_maxima, axis=-1)
    rows = mx.arange(count)
    chosen = blocks.reshape(-1, BLOCK)[rows * size + best_block]
    tile_maximum = block_maxima.max(axis=-1)
    argmax = best_block.astype(mx.int32) * BLOCK + mx.argmax(chosen, axis=-1).astype(mx.int32)

    new_maximum = mx.maximum(maximum, tile_maximum)
    below = x - new_maximum[:, None]
    exponentials = exp_nonpositive(below)
    return TileStatistics(
        maximum=new_maximum,
        argmax=argmax,
        exceeds=tile_maximum > maximum,
        exponentials=exponentials.astype(dtype),
        masses=_blocks(exponentials, 0.0).sum(axis=-1),
        weighted=(exponentials * below).sum(axis=-1),
    )


def _blocks(x: mx.array, filling: float = -3e38) -> mx.array:
    """[N, v] -> [N, b, BLOCK]."""
    if missing := -x.shape[-1] % BLOCK:
        x = mx.pad(x, [(0, 0), (0, missing)], constant_values=filling)
    return x.reshape(x.shape[0], -1, BLOCK)

"""What follows the product of hidden states with a tile of the embedding table.

Softcap, temperature, maximum, argmax, exponentials and their sums. Letters: N positions, v tokens
of the tile, b blocks of `BLOCK` tokens, W words of 32 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_diffgemma.kernels.allowed_tokens import FORBIDDEN, forbid
from mlx_diffgemma.kernels.dispatch import Implementation, Launcher, MetalKernel, launcher_for
from mlx_diffgemma.kernels.elementwise import exp_nonpositive, tanh

BLOCK = 128  # tokens of which one mass is kept, for the draw
SIMDGROUPS = 8  # of a threadgroup of the Metal kernel


@dataclass(frozen=True)
class TileStatistics:
    """A tile as seen from the running maximum after it.

    Attributes:
        maximum: [N] the larger of the tile's maximum and the one before the tile.
        argmax: [N] int32, place in the tile of its first maximum.
        exceeds: [N] whether the tile's maximum is above the one before the tile.
        exponentials: [N, v] exp(x − maximum), or None if not asked for.
        masses: [N, b] sums of the exponentials over blocks of tokens.
        weighted: [N] Σ exp(x − maximum) · (x − maximum).
    """

    maximum: mx.array
    argmax: mx.array
    exceeds: mx.array
    exponentials: mx.array | None
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
    dtype: mx.Dtype | None,
    restricted: np.ndarray | None = None,
    implementation: Implementation | Launcher = "auto",
) -> TileStatistics:
    """[N, v] products of a tile and the running maximum [N] before it -> its statistics.

    `dtype` is that of the exponentials, or None if they are not needed. `restricted` names the rows
    that are not allowed the whole tile, where that is known.

    The running maximum is exact where a fixed shift by the softcap is not: at a temperature of 0.4
    the exponential of the smallest possible logit is e^-150 of the largest, and a row whose maximum
    is below −5 would lose all its mass in float32.
    """
    if restricted is not None and not len(restricted):
        words = None
    launch = launcher_for(implementation)
    if launch is None:
        return _in_mlx(raw, maximum, words, softcap, temperature, dtype, restricted)
    count, tokens = raw.shape
    blocks = -(-tokens // BLOCK)
    shape = raw.shape if dtype is not None else (1, 1)
    maximum, argmax, exceeds, exponentials, masses, weighted = launch(
        KERNEL,
        inputs=[
            raw,
            maximum,
            mx.zeros((1, 1), mx.uint32) if words is None else words,
            mx.array([softcap, softcap / temperature]),
        ],
        template=[
            ("T", raw.dtype),
            ("E", dtype or mx.float32),
            ("NEED_EXPONENTIALS", dtype is not None),
            ("HAS_WORDS", words is not None),
            ("BLOCKS", -(-blocks // SIMDGROUPS)),
        ],
        grid=(count * SIMDGROUPS * 32, 1, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        output_shapes=[(count,), (count,), (count,), shape, (count, blocks), (count,)],
        output_dtypes=[
            mx.float32, mx.int32, mx.bool_, dtype or mx.float32, mx.float32, mx.float32
        ],
    )  # fmt: skip
    return TileStatistics(
        maximum, argmax, exceeds, None if dtype is None else exponentials, masses, weighted
    )


# A threadgroup a position, a block a simdgroup at a time, four tokens a lane. The tile is read once
# and waits in registers until the maximum is known.
KERNEL = MetalKernel(
    "tile_epilogue",
    inputs=("raw", "before", "words", "settings"),
    outputs=("maximum", "argmax", "exceeds", "exponentials", "masses", "weighted"),
    source=f"""
    constexpr uint groups = {SIMDGROUPS};
    constexpr uint block_size = {BLOCK};
    constexpr float forbidden = {FORBIDDEN:g}f;
    threadgroup float simdgroup_best[groups];
    threadgroup int simdgroup_place[groups];
    threadgroup float simdgroup_weighted[groups];

    const uint row = threadgroup_position_in_grid.x;
    const uint own_group = simdgroup_index_in_threadgroup;
    const uint lane = thread_index_in_simdgroup;
    const uint count = raw_shape[1];
    const uint blocks = (count + block_size - 1) / block_size;
    const float softcap = settings[0];
    const float largest = settings[1];

    float x[4 * BLOCKS];
    float best = forbidden;
    int place = 0x7fffffff;
    for (uint i = 0; i < BLOCKS; i++) {{
      for (uint j = 0; j < 4; j++) {{
        const uint token = (own_group + i * groups) * block_size + lane * 4 + j;
        float value = forbidden;
        if (token < count) {{
          const float product = float(raw[size_t(row) * count + token]);
          value = metal::precise::tanh(product / softcap) * largest;
          if (HAS_WORDS) {{
            const uint word = words[size_t(row) * words_shape[1] + token / 32];
            if (((word >> (token % 32)) & 1) == 0) value = forbidden;
          }}
          // Lanes go up through the tokens, so the first of equals is kept.
          if (value > best) {{
            best = value;
            place = int(token);
          }}
        }}
        x[i * 4 + j] = value;
      }}
    }}

    const float simd_best = simd_max(best);
    const int simd_place = simd_min(best == simd_best ? place : 0x7fffffff);
    if (lane == 0) {{
      simdgroup_best[own_group] = simd_best;
      simdgroup_place[own_group] = simd_place;
    }}
    threadgroup_barrier(mem_flags::mem_threadgroup);
    best = simdgroup_best[0];
    place = simdgroup_place[0];
    for (uint i = 1; i < groups; i++) {{
      const float other = simdgroup_best[i];
      if (other > best || (other == best && simdgroup_place[i] < place)) {{
        best = other;
        place = simdgroup_place[i];
      }}
    }}
    const float top = metal::max(best, before[row]);

    float sum_weighted = 0;
    for (uint i = 0; i < BLOCKS; i++) {{
      const uint block = own_group + i * groups;
      float mass = 0;
      for (uint j = 0; j < 4; j++) {{
        const uint token = block * block_size + lane * 4 + j;
        const float below = x[i * 4 + j] - top;
        const float e = metal::precise::exp(below);
        if (token < count) {{
          mass += e;
          sum_weighted += e * below;
          if (NEED_EXPONENTIALS) exponentials[size_t(row) * count + token] = static_cast<E>(e);
        }}
      }}
      mass = simd_sum(mass);
      if (lane == 0 && block < blocks) masses[row * blocks + block] = mass;
    }}
    sum_weighted = simd_sum(sum_weighted);
    if (lane == 0) simdgroup_weighted[own_group] = sum_weighted;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_index_in_threadgroup == 0) {{
      float total = 0;
      for (uint i = 0; i < groups; i++) total += simdgroup_weighted[i];
      weighted[row] = total;
      maximum[row] = top;
      // A tile without any allowed token has no place of its own.
      argmax[row] = place == 0x7fffffff ? 0 : place;
      exceeds[row] = best > before[row];
    }}
    """,
)


def _in_mlx(
    raw: mx.array,
    maximum: mx.array,
    words: mx.array | None,
    softcap: float,
    temperature: float,
    dtype: mx.Dtype | None,
    restricted: np.ndarray | None,
) -> TileStatistics:
    if words is None or restricted is None or len(restricted) > raw.shape[0] // 2:
        x = processed_logits(raw, words, softcap, temperature)
    else:
        x = processed_logits(raw, None, softcap, temperature)
        rows = mx.array(restricted)
        x[rows] = forbid(x[rows], words[rows])
    blocks = _blocks(x, FORBIDDEN)
    count, size = blocks.shape[:2]
    block_maxima = blocks.max(axis=-1)
    # The first maximum, without a pass over the whole tile: first block, then within the block.
    best_block = mx.argmax(block_maxima, axis=-1)
    chosen = blocks.reshape(-1, BLOCK)[mx.arange(count) * size + best_block]
    tile_maximum = block_maxima.max(axis=-1)
    argmax = best_block.astype(mx.int32) * BLOCK + mx.argmax(chosen, axis=-1).astype(mx.int32)

    new_maximum = mx.maximum(maximum, tile_maximum)
    below = x - new_maximum[:, None]
    exponentials = exp_nonpositive(below)
    return TileStatistics(
        maximum=new_maximum,
        argmax=argmax,
        exceeds=tile_maximum > maximum,
        exponentials=None if dtype is None else exponentials.astype(dtype),
        masses=_blocks(exponentials, 0.0).sum(axis=-1),
        weighted=(exponentials * below).sum(axis=-1),
    )


def _blocks(x: mx.array, filling: float) -> mx.array:
    """[N, v] -> [N, b, BLOCK]."""
    if missing := -x.shape[-1] % BLOCK:
        x = mx.pad(x, [(0, 0), (0, missing)], constant_values=filling)
    return x.reshape(x.shape[0], -1, BLOCK)

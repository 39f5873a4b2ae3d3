"""One token a position, drawn from a distribution that goes by in tiles.

A weighted reservoir over blocks of tokens: a tile of mass s, after which the total is S, takes the
draw over with probability s / S, and then one of its blocks is chosen by its mass. At the end the
token is chosen in the block that remained. P(block) is its mass over the total, exactly, and each
of the three choices is an inverse CDF of its own uniform, so that the 24 bits of a float32 uniform
are not spread over the whole vocabulary.

Measured beside Gumbel-max, which draws and transforms one uniform a token: see CONTRIBUTING.md.
Letters: R rows, C canvas, N = R · C positions, b blocks of a tile, t tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_diffgemma.kernels.tile_epilogue import BLOCK


@dataclass(frozen=True)
class Uniforms:
    """The randomness of a pass: [t, N] takes over, [t, N] chooses a block, [N] a token."""

    tile: mx.array
    block: mx.array
    token: mx.array

    @classmethod
    def of(cls, keys: mx.array, canvas: int, tiles: int) -> Uniforms:
        """Row r of a batch draws from `keys[r]` [2] alone."""
        rows = [mx.random.uniform(shape=(2 * tiles + 1, canvas), key=key) for key in keys]
        drawn = mx.stack(rows, axis=1).reshape(2 * tiles + 1, -1)
        return cls(drawn[:tiles], drawn[tiles:-1], drawn[-1])

    def at(self, places: mx.array) -> Uniforms:
        """Those of some of the positions."""
        return Uniforms(self.tile[:, places], self.block[:, places], self.token[places])


@dataclass(frozen=True)
class Reservoir:
    """The block that holds the draw so far: where it starts, its products [N, BLOCK] and, under a
    constraint, its words [N, BLOCK // 32] of allowed tokens."""

    start: mx.array
    raw: mx.array
    words: mx.array | None

    @classmethod
    def empty(cls, positions: int, dtype: mx.Dtype, constrained: bool) -> Reservoir:
        words = mx.zeros((positions, BLOCK // 32), mx.uint32) if constrained else None
        return cls(mx.zeros((positions,), mx.int32), mx.zeros((positions, BLOCK), dtype), words)

    def offer(
        self,
        raw: mx.array,
        words: mx.array | None,
        masses: mx.array,
        total: mx.array,
        start: int,
        take_over: mx.array,
        choose: mx.array,
    ) -> Reservoir:
        """The tile that starts at token `start`, with its products [N, v], words and block masses
        [N, b]; `total` [N] is the mass up to and with it."""
        block = choose_by_mass(masses, choose)
        replaced = take_over * total < masses.sum(axis=-1)
        return Reservoir(
            mx.where(replaced, start + block * BLOCK, self.start),
            mx.where(replaced[:, None], _block_of(raw, block, BLOCK), self.raw),
            None
            if words is None or self.words is None
            else mx.where(replaced[:, None], _block_of(words, block, BLOCK // 32), self.words),
        )


def choose_by_mass(masses: mx.array, uniform: mx.array) -> mx.array:
    """Inverse CDF: masses [N, n] and uniforms [N] in [0, 1) -> [N] int32.

    A place without mass is never chosen while there is one with: a parallel cumulative sum need not
    be monotonous to the last bit, so the masses are asked too.
    """
    cumulative = mx.cumsum(masses, axis=-1)
    reached = cumulative > (uniform * cumulative[:, -1])[:, None]
    rank = (reached.astype(mx.int32) + 1) * (masses > 0)
    return mx.argmax(rank, axis=-1).astype(mx.int32)


def _block_of(x: mx.array, block: mx.array, width: int) -> mx.array:
    """The columns [N, width] of block `block` [N] of x [N, v]."""
    if missing := -x.shape[-1] % width:
        x = mx.pad(x, [(0, 0), (0, missing)])
    rows = x.reshape(-1, width)
    return rows[mx.arange(x.shape[0]) * (x.shape[1] // width) + block]

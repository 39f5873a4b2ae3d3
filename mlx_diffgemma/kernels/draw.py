"""One token a position, drawn from a distribution that goes by in pieces.

The draw is a weighted reservoir over blocks of tokens: a piece of mass s, after which the total is
S, takes the draw over with probability s / S. Then one of its blocks is chosen by its mass, and a
token of the block by its own. P(block) is its mass over the total, exactly, and each of the three
choices is an inverse CDF of its own uniform, so that the 24 bits of a float32 uniform are not
spread over the whole vocabulary.

docs/tried-and-left.md has the measurement beside Gumbel-max, which transforms one uniform a token.
Letters: N positions, M of them that are looked at, t pieces.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_diffgemma.kernels.rows import Positions

BLOCK = 128  # tokens of which one mass is kept


def uniforms(positions: Positions, pieces: int) -> mx.array | None:
    """The randomness of a pass in t pieces, [2 t + 1, M]; None where no row draws.

    Entry [i] says whether piece i takes over, [t + i] chooses its block, [2 t] the token. The
    uniforms of a row depend on its key, its length and t alone; in a row without a key they are
    zeros.
    """
    if not positions.has_draws:
        return None
    shapes = [(2 * pieces + 1, row.length) for row in positions.rows]
    drawn = [
        mx.zeros(shape) if row.key is None else mx.random.uniform(shape=shape, key=row.key)
        for row, shape in zip(positions.rows, shapes, strict=True)
    ]
    together = drawn[0] if len(drawn) == 1 else mx.concatenate(drawn, axis=1)
    return positions.taken(together, axis=1)


def choose_by_mass(masses: mx.array, uniform: mx.array) -> mx.array:
    """A choice by inverse CDF: masses [M, n] and uniforms [M] in [0, 1) -> places [M] int32.

    A place without mass is never chosen while another has mass: a parallel cumulative sum need not
    be monotonic to the last bit, so the masses are looked at too.
    """
    cumulative = mx.cumsum(masses, axis=-1)
    reached = cumulative > (uniform * cumulative[:, -1])[:, None]
    rank = (reached.astype(mx.int32) + 1) * (masses > 0)
    return mx.argmax(rank, axis=-1).astype(mx.int32)

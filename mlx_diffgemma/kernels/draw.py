"""One token a position, drawn from a distribution that goes by in pieces.

The draw is a race between the pieces: one of mass s runs log s plus a Gumbel number of its own, and
the piece that runs furthest wins, so P(piece) is its mass over the total. The winner of any pieces
is the winner of the winners of its parts, so pieces may go by in any order and on several machines.
Then one of the winner's blocks of tokens is chosen by its mass, and a token of the block by its
own, each by the inverse CDF of a uniform. So each choice has the 24 bits of a float32 uniform, and
they are not spread over the whole vocabulary.

docs/tried-and-left.md has the measurement beside Gumbel-max, which transforms one uniform a token.
Letters: N positions, M of them that are looked at, t pieces.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_diffgemma.kernels.allowed_tokens import FORBIDDEN
from mlx_diffgemma.kernels.rows import Positions

BLOCK = 128  # tokens of which one mass is kept
_LEAST = 2.0**-33  # stands for a uniform of 0, with which a piece of any mass would win


def chances(positions: Positions, pieces: int) -> mx.array | None:
    """The randomness of a pass in t pieces, [2 t + 1, M]; None where no row draws.

    Entry [i] is the Gumbel number of piece i, [t + i] the uniform that chooses its block, [2 t] the
    one that chooses the token. Those of a row depend on its key, its length and t alone; in a row
    without a key they are zeros.
    """
    if not positions.has_draws:
        return None
    drawn = [
        mx.zeros((2 * pieces + 1, row.length))
        if row.key is None
        else _chances(row.key, pieces, row.length)
        for row in positions.rows
    ]
    together = drawn[0] if len(drawn) == 1 else mx.concatenate(drawn, axis=1)
    return positions.taken(together, axis=1)


def _chances(key: mx.array, pieces: int, length: int) -> mx.array:
    uniforms = mx.random.uniform(shape=(2 * pieces + 1, length), key=key)
    # A uniform is finest near 0, so that is where the numbers of the winners come from.
    exponential = -mx.log1p(-mx.maximum(uniforms[:pieces], _LEAST))
    return mx.concatenate([-mx.log(exponential), uniforms[pieces:]])


def race_of(mass: mx.array, maximum: mx.array, gumbel: mx.array) -> mx.array:
    """How far a piece runs, [M]: its mass Σ exp(x − maximum), that maximum and its Gumbel number,
    [M] each. A piece without mass, or one whose mass is NaN, never wins."""
    return mx.where(mass > 0, mx.log(mass) + maximum + gumbel, FORBIDDEN)


def choose_by_mass(masses: mx.array, uniform: mx.array) -> mx.array:
    """A choice by inverse CDF: masses [M, n] and uniforms [M] in [0, 1) -> places [M] int32.

    A place without mass is never chosen while another has mass: a parallel cumulative sum need not
    be monotonic to the last bit, so the masses are looked at too.
    """
    cumulative = mx.cumsum(masses, axis=-1)
    reached = cumulative > (uniform * cumulative[:, -1])[:, None]
    rank = (reached.astype(mx.int32) + 1) * (masses > 0)
    return mx.argmax(rank, axis=-1).astype(mx.int32)

"""Σ p · embedding over a vocabulary that goes by in tiles, of all tokens or of the likely ones.

The sum of the likely tokens is most of the sum of all, for little of its cost: once a canvas begins
to settle, few tokens of the vocabulary are likely anywhere on it. Each row is summed by itself, so
that its result does not depend on the other rows. Letters: P positions of the row, D hidden, v
tokens of a tile.
"""

from __future__ import annotations

import math
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_diffgemma.kernels.dispatch import Implementation, Launcher
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.weighted_rows import weighted_rows

_DENSE_FROM = 1 / 8  # of a tile's tokens likely somewhere: then the whole product is cheaper
_FEW = 8  # likely tokens a position up to which they are gathered instead of multiplied


class SoftSum(Protocol):
    """A sum over the tiles; what it holds is relative to the running maximum."""

    def add(
        self,
        exponentials: mx.array,
        maximum: mx.array,
        shrink: mx.array,
        embeddings: mx.array,
        start: int,
    ) -> None:
        """Take in the tile that starts at token `start`, with its exponentials [P, v] from the
        running maximum [P] and its embeddings [v, D]. `shrink` [P] brings what came before it down
        to that maximum."""

    def arrays(self) -> list[mx.array]:
        """What the tiles so far have given, for `mx.eval`."""

    def finish(self, maximum: mx.array, total: mx.array) -> tuple[mx.array, mx.array]:
        """The last maximum and Σ e of all tokens, both [P] -> Σ p · embedding [P, D] in float32,
        and the probability left out [P]."""


class AllTokens:
    """A sum of every token."""

    def __init__(self, positions: int, width: int) -> None:
        self._sum = mx.zeros((positions, width))

    def add(
        self,
        exponentials: mx.array,
        maximum: mx.array,
        shrink: mx.array,
        embeddings: mx.array,
        start: int,
    ) -> None:
        self._sum = self._sum * shrink[:, None] + exponentials @ embeddings

    def arrays(self) -> list[mx.array]:
        return [self._sum]

    def finish(self, maximum: mx.array, total: mx.array) -> tuple[mx.array, mx.array]:
        return self._sum / total[:, None], mx.zeros_like(total)


class LikelyTokens:
    """A sum of the tokens whose probability is at least e^-cutoff of the likeliest one's at the
    position; what they have is scaled up to 1.

    A tile's tokens that are likely at some position are set aside with their exponentials, and
    multiplied at the end by their rows alone. A tile with many of them is multiplied at once: then
    its tokens are measured by the maximum so far, which keeps a few that the last maximum would
    not. The host reads once a tile which tokens are likely.

    `floor` [P] is what the last maximum will at least be, where something is known of it: without
    it every tile before that of a position's likeliest token seems full of likely ones.
    """

    def __init__(
        self,
        positions: int,
        table: EmbeddingTable,
        cutoff: float,
        floor: mx.array | None = None,
        implementation: Implementation | Launcher = "auto",
    ) -> None:
        self.cutoff, self.table, self.floor = cutoff, table, floor
        self.implementation = implementation
        self._sum, self._kept = mx.zeros((positions, table.hidden_size)), mx.zeros((positions,))
        self._ids: list[np.ndarray] = []
        self._exponentials: list[mx.array] = []
        self._maxima: list[mx.array] = []

    def add(
        self,
        exponentials: mx.array,
        maximum: mx.array,
        shrink: mx.array,
        embeddings: mx.array,
        start: int,
    ) -> None:
        least = mx.array(0.99 * math.exp(-self.cutoff))
        if self.floor is not None:
            least = (least * mx.exp(mx.maximum(self.floor - maximum, 0.0)))[:, None]
        likely = exponentials >= least
        somewhere = np.flatnonzero(np.array(likely.any(axis=0)))
        self._sum, self._kept = self._sum * shrink[:, None], self._kept * shrink
        if len(somewhere) > _DENSE_FROM * exponentials.shape[1]:
            kept = mx.where(likely, exponentials, 0)
            self._sum = self._sum + kept @ embeddings
            self._kept = self._kept + kept.sum(axis=-1)
        elif len(somewhere):
            chosen = exponentials[:, mx.array(somewhere)]
            mx.eval(chosen)  # else it would hold the whole tile
            self._ids.append(start + somewhere)
            self._exponentials.append(chosen)
            self._maxima.append(maximum)

    def arrays(self) -> list[mx.array]:
        return [self._sum, self._kept]

    def finish(self, maximum: mx.array, total: mx.array) -> tuple[mx.array, mx.array]:
        if self._ids:
            added, mass = self._set_aside(maximum)
            self._sum, self._kept = self._sum + added, self._kept + mass
        return self._sum / self._kept[:, None], mx.maximum(1.0 - self._kept / total, 0.0)

    def _set_aside(self, maximum: mx.array) -> tuple[mx.array, mx.array]:
        """What the tokens that were set aside add to the sum and to the mass kept, now that the
        maximum is known."""
        ids = mx.array(np.concatenate(self._ids), mx.int32)
        shrunk = [
            chosen * mx.exp(before - maximum)[:, None]
            for chosen, before in zip(self._exponentials, self._maxima, strict=True)
        ]
        weights = mx.concatenate(shrunk, axis=1)
        weights = mx.where(weights >= math.exp(-self.cutoff), weights, 0.0)
        most = np.array((weights > 0).sum(axis=-1)).max()
        if most <= _FEW < weights.shape[1]:
            best = mx.argpartition(-weights, _FEW - 1, axis=-1)[:, :_FEW]
            likeliest = mx.take_along_axis(weights, best, axis=-1)
            how = self.implementation
            added = weighted_rows(ids[best], likeliest, self.table, implementation=how)
        else:
            added = weights @ self.table.take(ids, mx.float32)
        return added, weights.sum(axis=-1)

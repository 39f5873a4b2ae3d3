"""Σ p · embedding over a vocabulary that goes by in tiles: of all tokens, or of the likely ones.

The second is most of what the first computes and little of its cost: once a canvas begins to
settle, few tokens of the vocabulary are likely anywhere on it. Letters: N positions, D hidden,
v tokens of a tile, U tokens that are likely at some position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_diffgemma.kernels.dispatch import Implementation, Launcher
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.tile_epilogue import TileStatistics
from mlx_diffgemma.kernels.weighted_rows import weighted_rows

_DENSE_FROM = 1 / 8  # of a tile's tokens likely somewhere: then the whole product is cheaper
_FEW = 8  # likely tokens a position up to which they are gathered instead of multiplied


@dataclass(frozen=True)
class SoftSum:
    """What the tiles so far have given; sums are relative to the running maximum.

    Attributes:
        sum: [N, D] float32, Σ e · embedding.
        kept: [N] float32, Σ e of the tokens in `sum`; None where that is all of them.
    """

    sum: mx.array
    kept: mx.array | None = None

    def arrays(self) -> list[mx.array]:
        return [self.sum] if self.kept is None else [self.sum, self.kept]


class Summing(Protocol):
    """How the tiles are summed."""

    def start(self, positions: int, width: int) -> SoftSum: ...

    def add(
        self,
        soft: SoftSum,
        seen: TileStatistics,
        shrink: mx.array,
        embeddings: mx.array,
        start: int,
    ) -> SoftSum:
        """With the tile that starts at token `start`; `shrink` [N] brings what came before it down
        to the new maximum."""

    def finish(
        self, soft: SoftSum, maximum: mx.array, total: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The running maximum and Σ e of all tokens, both [N] -> Σ p · embedding [N, D] in float32,
        and the probability left out [N]."""


class AllTokens:
    """Every token."""

    def start(self, positions: int, width: int) -> SoftSum:
        return SoftSum(mx.zeros((positions, width)))

    def add(
        self,
        soft: SoftSum,
        seen: TileStatistics,
        shrink: mx.array,
        embeddings: mx.array,
        start: int,
    ) -> SoftSum:
        assert seen.exponentials is not None
        return SoftSum(soft.sum * shrink[:, None] + _product(seen.exponentials, embeddings))

    def finish(
        self, soft: SoftSum, maximum: mx.array, total: mx.array
    ) -> tuple[mx.array, mx.array]:
        return soft.sum / total[:, None], mx.zeros_like(total)


class LikelyTokens:
    """Tokens whose probability is at least e^-cutoff of the likeliest one's at the position; what
    they have is scaled up to 1.

    A tile's tokens that are likely at some position are set aside with their exponentials, and
    multiplied at the end by their rows alone. A tile with many of them is multiplied at once: then
    its tokens are measured by the maximum so far, which keeps a few that the last maximum would
    not. The host reads once a tile which tokens are likely.

    `floor` [N] is what the last maximum will at least be, where something is known of it: without
    it every tile before that of a position's likeliest token seems full of likely ones.
    """

    def __init__(
        self,
        cutoff: float,
        table: EmbeddingTable,
        floor: mx.array | None = None,
        implementation: Implementation | Launcher = "auto",
    ) -> None:
        self.cutoff, self.table, self.floor = cutoff, table, floor
        self.implementation = implementation
        self._ids: list[np.ndarray] = []
        self._exponentials: list[mx.array] = []
        self._maxima: list[mx.array] = []

    def start(self, positions: int, width: int) -> SoftSum:
        return SoftSum(mx.zeros((positions, width)), mx.zeros((positions,)))

    def add(
        self,
        soft: SoftSum,
        seen: TileStatistics,
        shrink: mx.array,
        embeddings: mx.array,
        start: int,
    ) -> SoftSum:
        assert seen.exponentials is not None and soft.kept is not None
        # A little less than the cutoff, for exponentials in a narrow type.
        least = mx.array(0.99 * math.exp(-self.cutoff))
        if self.floor is not None:
            least = (least * mx.exp(mx.maximum(self.floor - seen.maximum, 0.0)))[:, None]
        likely = seen.exponentials >= least
        somewhere = np.flatnonzero(np.array(likely.any(axis=0)))
        total, mass = soft.sum * shrink[:, None], soft.kept * shrink
        if len(somewhere) > _DENSE_FROM * seen.exponentials.shape[1]:
            kept = mx.where(likely, seen.exponentials, 0)
            mass = mass + kept.astype(mx.float32).sum(axis=-1)
            return SoftSum(total + _product(kept, embeddings), mass)
        if len(somewhere):
            chosen = seen.exponentials[:, mx.array(somewhere)].astype(mx.float32)
            mx.eval(chosen)  # else it would hold the whole tile
            self._ids.append(start + somewhere)
            self._exponentials.append(chosen)
            self._maxima.append(seen.maximum)
        return SoftSum(total, mass)

    def finish(
        self, soft: SoftSum, maximum: mx.array, total: mx.array
    ) -> tuple[mx.array, mx.array]:
        assert soft.kept is not None
        if self._ids:
            soft = replace(soft, **self._set_aside(soft, maximum))
        assert soft.kept is not None
        return soft.sum / soft.kept[:, None], mx.maximum(1.0 - soft.kept / total, 0.0)

    def _set_aside(self, soft: SoftSum, maximum: mx.array) -> dict[str, mx.array]:
        """The sums with the tokens that were set aside, now that the maximum is known."""
        assert soft.kept is not None
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
            added = weighted_rows(
                ids[best],
                mx.take_along_axis(weights, best, axis=-1),
                self.table,
                implementation=self.implementation,
            )
        else:
            dtype = self.table.product_dtype
            added = _product(weights.astype(dtype), self.table.take(ids, dtype))
        return {"sum": soft.sum + added, "kept": soft.kept + weights.sum(axis=-1)}


def _product(weights: mx.array, embeddings: mx.array) -> mx.array:
    return (weights @ embeddings).astype(mx.float32)

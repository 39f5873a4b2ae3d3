"""The collectives of the ranks, in one order on all of them.

MLX computes a graph in an order of its own, and computes nothing that nobody asks for. Ranks that
began two collectives in different orders, or one that left one out, would wait for each other for
ever. So each collective depends on the one before it: whoever computes one computes all before it.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx


class Exchange:
    """What the ranks say to each other while they compute. Nothing is evaluated here.

    Args:
        group: the ranks; of a group of one, every collective returns what it was given.

    Attributes:
        rank: which of the ranks this is; rank 0 leads.
        size: how many there are.
        messages: how many collectives there were.
        bytes: bytes of their results.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.messages = 0
        self.bytes = 0
        self._last: mx.array | None = None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, x: mx.array) -> mx.array:
        """The sum of every rank's `x`, [...] of one shape and type on all of them."""
        return self._counted(mx.distributed.all_sum(self._after(x), group=self._group))

    def from_leader(self, x: mx.array) -> mx.array:
        """What rank 0 gives; the others give an array of the same shape and type, whose values do
        not count."""
        return self.sum(x if self.leads else mx.zeros_like(x))

    def gather(self, x: mx.array) -> mx.array:
        """What every rank gives, [...] -> [ranks, ...], in the order of the ranks."""
        together = mx.distributed.all_gather(self._after(x[None]), group=self._group)
        return self._counted(together)

    def pending(self) -> list[mx.array]:
        """What is to be evaluated so that every collective so far is."""
        return [] if self._last is None else [self._last]

    def _after(self, x: mx.array) -> mx.array:
        if self._last is None:
            return x
        after: mx.array = mx.depends(x, self._last)
        return after

    def _counted(self, result: mx.array) -> mx.array:
        self.messages += 1
        self.bytes += result.nbytes
        self._last = result
        return result

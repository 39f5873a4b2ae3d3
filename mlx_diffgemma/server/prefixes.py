"""Prefixes kept from one request to the next: system prompts, the turns of a chat, states."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_diffgemma.model.cache import Prefix


class KeptPrefixes:
    """Prefixes of one model, the least recently used first. Requests share them without copies: a
    prefix is a value, and a longer one that is made from it is another value.

    Args:
        most_bytes: most bytes that all kept prefixes hold.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._kept: list[Prefix] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes held; what two prefixes share counts twice."""
        return sum(prefix.nbytes for prefix in self._kept)

    def best(self, ids: Sequence[int], own: Prefix) -> Prefix:
        """The longest beginning of `ids` that `own` or a kept prefix can become without encoding
        anything."""
        best = own.back_to(ids)
        found = None
        for prefix in self._kept:
            candidate = prefix.back_to(ids)
            if len(candidate) > len(best):
                best, found = candidate, prefix
        if found is not None:
            self._kept = [*(each for each in self._kept if each is not found), found]
        return best

    def keep(self, prefix: Prefix) -> None:
        """Keep a prefix, and drop the kept ones that it continues."""
        if not len(prefix):
            return
        others = [each for each in self._kept if not prefix.continues(each)]
        self._kept = [*others, prefix]
        self.shrink(self.most_bytes)

    def shrink(self, most_bytes: int) -> int:
        """Drop the least recently used prefixes until no more than `most_bytes` are held. Returns
        how many bytes were dropped."""
        sizes = [prefix.nbytes for prefix in self._kept]
        total, gone = sum(sizes), 0
        while self._kept and total - gone > most_bytes:
            gone += sizes.pop(0)
            del self._kept[0]
        return gone

"""The embedding whose words are dealt out to the ranks, as embedding, as head and as a sum.

No rank sees the logits of another: what each finds among its own words is joined from a few numbers
a position. Letters: R ranks, M positions, V words of all ranks, D hidden, K tokens of a position, U
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import mlx.core as mx
import mlx.nn as nn

from mlx_diffgemma.distributed.exchange import Exchange
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.vocabulary_chunk import BEST, Running


def _local(ids: mx.array, words: range) -> tuple[mx.array, mx.array]:
    """Which of the rows `words` token ids [...] have, and whether they are among them."""
    local = ids.astype(mx.int32) - words.start
    is_held = (local >= 0) & (local < len(words))
    return mx.where(is_held, local, 0), is_held


class SplitEmbedding(nn.Module):
    """The rows of a rank's own words: the others give theirs. It takes the place of an embedding,
    plain or quantized, whose `__call__` it uses."""

    words: range
    exchange: Exchange

    def __call__(self, ids: mx.array) -> mx.array:
        """[...] -> [..., D]."""
        local, is_held = _local(ids, self.words)
        rows: mx.array = super().__call__(local)
        return self.exchange.sum(mx.where(is_held[..., None], rows, 0).astype(rows.dtype))


@dataclass(frozen=True)
class SplitTable(EmbeddingTable):
    """The rows [v, D] of a rank's own words, which it takes for a table of all V words.

    All ranks have to call its methods with the same arguments in the same order.

    Attributes:
        words: the words whose rows are held.
        vocab: V.
        exchange: how the ranks join what they have.
        own: the rows that are held, as a table of their own.
    """

    words: range = field(kw_only=True)
    vocab: int = field(kw_only=True)
    exchange: Exchange = field(kw_only=True)
    own: EmbeddingTable = field(kw_only=True)

    @classmethod
    def around(
        cls, own: EmbeddingTable, words: range, vocab: int, exchange: Exchange
    ) -> SplitTable:
        """A table of all words, of which `own` has the rows `words`."""
        same = {each.name: getattr(own, each.name) for each in fields(EmbeddingTable)}
        return cls(**same, words=words, vocab=vocab, exchange=exchange, own=own)

    @property
    def vocab_size(self) -> int:
        return self.vocab

    def product(self, x: mx.array) -> mx.array:
        before, behind = self.words.start, self.vocab - self.words.stop
        around = [*[(0, 0)] * (x.ndim - 1), (before, behind)]
        return self.exchange.sum(mx.pad(self.own.product(x), around))

    def expected(self, weights: mx.array) -> mx.array:
        own = weights[..., self.words.start : self.words.stop]
        return self.exchange.sum(self.own.expected(own))

    def take(self, ids: mx.array, dtype: mx.Dtype) -> mx.array:
        return self.exchange.sum(self._rows(ids, dtype))

    def scores(self, x: mx.array, ids: mx.array) -> mx.array:
        return self.exchange.sum(x.astype(mx.float32) @ self._rows(ids, mx.float32).T)

    def mixed(self, weights: mx.array, ids: mx.array) -> mx.array:
        return self.exchange.sum(weights @ self._rows(ids, mx.float32))

    def pieces(self, size: int) -> Iterator[tuple[int, EmbeddingTable]]:
        for start, piece in self.own.pieces(size):
            yield self.words.start + start, piece

    def held(self, ids: mx.array, weights: mx.array) -> tuple[mx.array, mx.array, EmbeddingTable]:
        local, is_held = _local(ids, self.words)
        return local, mx.where(is_held, weights, 0), self.own

    def summed(self, partial: mx.array) -> mx.array:
        return self.exchange.sum(partial)

    def joined(self, numbers: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
        width = numbers.shape[1]
        both = mx.concatenate([numbers.view(mx.int32), tokens], axis=1)
        every = self.exchange.gather(both)
        state = joined(every[..., :width].view(mx.float32), every[..., width:])
        return state.numbers, state.tokens

    def _rows(self, ids: mx.array, dtype: mx.Dtype) -> mx.array:
        """The rows of tokens [...], with zeros for those that other ranks hold."""
        local, is_held = _local(ids, self.words)
        return mx.where(is_held[..., None], self.own.take(local, dtype), 0).astype(dtype)


def joined(numbers: mx.array, tokens: mx.array) -> Running:
    """What all ranks have found, from the arrays of each one's `Running`, [R, M, ...] in the order
    of their words."""
    ranks = [Running(*each) for each in zip(numbers, tokens, strict=True)]
    best = mx.concatenate([rank.best for rank in ranks], axis=1)
    of_best = mx.concatenate([rank.best_tokens for rank in ranks], axis=1)
    # A stable sort, so that of equals the first comes first: lower ranks hold the lower words.
    order = mx.argsort(-best, axis=-1)[:, :BEST]
    best, of_best = (mx.take_along_axis(each, order, axis=-1) for each in (best, of_best))

    def every(name: str) -> mx.array:
        return mx.stack([getattr(rank, name) for rank in ranks])

    shift = every("best")[..., 0] - best[:, 0]
    shrink, total = mx.exp(shift), every("total")
    winner = mx.argmax(every("race"), axis=0)[None]

    def of_winner(name: str) -> mx.array:
        return mx.take_along_axis(every(name), winner, axis=0)[0]

    sums = [
        (total * shrink).sum(axis=0),
        ((every("weighted") + total * shift) * shrink).sum(axis=0),
        of_winner("draw_logit"),
        every("standing_logit").max(axis=0),
        of_winner("race"),
    ]
    return Running(
        mx.concatenate([mx.stack(sums, axis=1), best], axis=1),
        mx.concatenate([of_winner("draw")[:, None], of_best], axis=1),
    )

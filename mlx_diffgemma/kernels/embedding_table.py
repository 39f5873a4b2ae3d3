"""The tied embedding as rows: plain or quantized, read a slice or a selection at a time.

Letters: V vocabulary, D hidden, P positions, U tokens, K tokens of one position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class EmbeddingTable:
    """[V, D] embeddings, which are the head too.

    Attributes:
        weight: [V, D], or packed uint32 if quantized.
        dtype: type of the activations, and of the embeddings where they are not quantized.
        scales, biases, group_size, bits, mode: as in `mx.quantize`; `scales` is None if plain.
    """

    weight: mx.array
    dtype: mx.Dtype
    scales: mx.array | None = None
    biases: mx.array | None = None
    group_size: int | None = None
    bits: int | None = None
    mode: str = "affine"

    @classmethod
    def of(cls, module: nn.Embedding | nn.QuantizedEmbedding, dtype: mx.Dtype) -> EmbeddingTable:
        """The table that `module` holds, in a model whose activations are of type `dtype`."""
        if isinstance(module, nn.QuantizedEmbedding):
            return cls(
                module.weight,
                dtype,
                module.scales,
                module.get("biases"),
                module.group_size,
                module.bits,
                module.mode,
            )
        return cls(module.weight, dtype)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        columns = self.weight.shape[1]
        return columns * 32 // self.bits if self.bits else columns

    @property
    def scale(self) -> mx.array:
        """√D in float32, but rounded to `dtype` on the way, as the reference does."""
        return mx.array(self.hidden_size**0.5, self.dtype).astype(mx.float32)

    def product(self, x: mx.array) -> mx.array:
        """x @ table.T, [..., D] -> [..., V], with packed weights as they are."""
        if self.scales is None:
            return x @ self.weight.T
        return self._packed(x, transpose=True)

    def expected(self, weights: mx.array) -> mx.array:
        """weights @ table, [..., V] -> [..., D], with packed weights as they are."""
        if self.scales is None:
            return weights @ self.weight
        return self._packed(weights, transpose=False)

    def part(self, start: int, stop: int) -> EmbeddingTable:
        """The table of the tokens `start` to `stop` alone, without a copy."""
        where = slice(start, stop)
        return replace(
            self,
            weight=self.weight[where],
            scales=None if self.scales is None else self.scales[where],
            biases=None if self.biases is None else self.biases[where],
        )

    def rows(self, start: int, stop: int, dtype: mx.Dtype) -> mx.array:
        """Rows `start` to `stop`, dequantized: [stop - start, D]."""
        return self._read(slice(start, stop), dtype)

    def take(self, ids: mx.array, dtype: mx.Dtype) -> mx.array:
        """The rows `ids` [...], dequantized: [..., D]."""
        return self._read(ids, dtype)

    def scores(self, x: mx.array, ids: mx.array) -> mx.array:
        """The products of x [..., D] with the rows `ids` [U] alone, [..., U] in float32."""
        return x.astype(mx.float32) @ self.take(ids, mx.float32).T

    def mixed(self, weights: mx.array, ids: mx.array) -> mx.array:
        """Sums of the rows `ids` [U] with weights [P, U], [P, D] in float32."""
        return weights @ self.take(ids, mx.float32)

    def pieces(self, size: int) -> Iterator[tuple[int, EmbeddingTable]]:
        """The first token and the rows of each piece of `size` tokens that is held here."""
        for start in range(0, self.vocab_size, size):
            yield start, self.part(start, min(start + size, self.vocab_size))

    def held(self, ids: mx.array, weights: mx.array) -> tuple[mx.array, mx.array, EmbeddingTable]:
        """Tokens [P, K] and their weights [P, K] as `weighted_rows` takes them for those whose rows
        are held here, and the table of these."""
        return ids, weights, self

    def summed(self, partial: mx.array) -> mx.array:
        """A sum over all tokens, from one over those whose rows are held here."""
        return partial

    def joined(self, numbers: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """The arrays of a `Running` over all tokens, from those over the pieces held here."""
        return numbers, tokens

    def _packed(self, x: mx.array, *, transpose: bool) -> mx.array:
        assert self.scales is not None
        return mx.quantized_matmul(
            x,
            self.weight,
            self.scales,
            self.biases,
            transpose=transpose,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )

    def _read(self, where: slice | mx.array, dtype: mx.Dtype) -> mx.array:
        if self.scales is None:
            return self.weight[where].astype(dtype)
        scales, biases = self.scales[where], None
        if self.biases is not None:
            # In their own type, scale · value + bias would be rounded to that before `dtype`.
            scales, biases = scales.astype(dtype), self.biases[where].astype(dtype)
        return mx.dequantize(
            self.weight[where],
            scales,
            biases,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            dtype=dtype,
        )

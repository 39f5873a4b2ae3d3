"""The tied embedding as rows: plain or quantized, read a slice or a selection at a time.

Letters: V vocabulary, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    @property
    def product_dtype(self) -> mx.Dtype:
        """In which to multiply: the CPU has a fast product for float32 alone."""
        return mx.float32 if mx.default_device().type == mx.DeviceType.cpu else self.dtype

    def rows(self, start: int, stop: int, dtype: mx.Dtype) -> mx.array:
        """Rows `start` to `stop`, dequantized: [stop - start, D]."""
        return self._read(slice(start, stop), dtype)

    def take(self, ids: mx.array, dtype: mx.Dtype) -> mx.array:
        """The rows `ids` [...], dequantized: [..., D]."""
        return self._read(ids, dtype)

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

"""Layers for the CPU, on which only MLX's products of float32 matrices are fast.

MLX's quantized product runs at a few GFLOP/s on a CPU, and its gathered one goes token by token.
These layers dequantize, and multiply once for each expert. They hold the same weights as the layers
whose place they take, so a checkpoint loads into either.
Letters: P token-expert pairs, D input, O output, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_diffgemma.kernels.embedding_table import EmbeddingTable

_BLOCK = 1 << 20  # weights of an expert that are dequantized at a time: 4 MB stay in a cache


class DequantizedLinear(nn.QuantizedLinear):
    """A quantized layer that multiplies by its dequantized weight."""

    def __call__(self, x: mx.array) -> mx.array:
        y = x @ dequantized(self).astype(x.dtype).T
        return y + self.bias if "bias" in self else y


class GroupedSwitchLinear(SwitchLinear):
    """Experts that each multiply all of their tokens at once."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        if self.training:  # grouping reads the indices, which a gradient cannot trace
            return super().__call__(x, indices, sorted_indices)
        return _by_expert(x, indices, lambda x, e: x @ self.weight[e].astype(x.dtype).T)


class DequantizedSwitchLinear(QuantizedSwitchLinear):
    """Quantized experts, dequantized block by block as they are used."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        if self.training:
            return super().__call__(x, indices, sorted_indices)
        return _by_expert(x, indices, self._through)

    def _through(self, x: mx.array, expert: int) -> mx.array:
        """[n, D] through one expert -> [n, O]. Processes that dequantize side by side slow each
        other down where what they write goes to memory and back, so no block is larger than a
        cache."""
        rows = max(1, _BLOCK // x.shape[-1])
        outputs = [
            x @ dequantized(self, (expert, slice(start, start + rows))).astype(x.dtype).T
            for start in range(0, self.weight.shape[1], rows)
        ]
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=-1)


_Where = slice | tuple[int, slice]


def dequantized(layer: nn.Module, where: _Where = slice(None)) -> mx.array:
    """The weight of a quantized layer, or the part of it `where` along its first axes."""
    biases = layer.get("biases")
    return mx.dequantize(
        layer.weight[where],
        layer.scales[where],
        None if biases is None else biases[where],
        layer.group_size,
        layer.bits,
        layer.mode,
    )


@dataclass(frozen=True)
class DequantizedTable(EmbeddingTable):
    """A packed embedding that multiplies by its dequantized rows, which it then keeps: a pass over
    the vocabulary multiplies by each piece twice."""

    @cached_property
    def _dequantized(self) -> mx.array:
        return self.rows(0, self.weight.shape[0], mx.float32)

    def _packed(self, x: mx.array, *, transpose: bool) -> mx.array:
        rows = self._dequantized
        product = x.astype(mx.float32) @ (rows.T if transpose else rows)
        return product.astype(x.dtype)


def _by_expert(
    x: mx.array, indices: mx.array, through: Callable[[mx.array, int], mx.array]
) -> mx.array:
    """[P, 1, D] through the expert of each pair -> [P, 1, O]; `through(x, e)` is what expert e
    makes of x [n, D], [n, O]."""
    experts = np.array(indices)
    order = np.argsort(experts, kind="stable")
    sorted_already = bool((order == np.arange(len(order))).all())
    if not sorted_already:
        x = x[mx.array(order)]
    used, starts = np.unique(experts[order], return_index=True)
    ends = [*starts[1:].tolist(), len(order)]
    outputs = [
        through(x[start:end, 0], expert)
        for expert, start, end in zip(used.tolist(), starts.tolist(), ends, strict=True)
    ]
    y = mx.concatenate(outputs)[:, None]
    return y if sorted_already else y[mx.array(np.argsort(order))]

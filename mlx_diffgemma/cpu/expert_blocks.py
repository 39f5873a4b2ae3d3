"""The mixture of experts for training on a CPU: every expert's tokens in blocks of rows.

MLX's gathered product goes row by row on a CPU, and its gradient makes a matrix for each row. Here
the pairs are sorted by expert and each expert's are padded to whole blocks, so that a product is
one of matrices; how many blocks there are at most follows from the sizes alone, so nothing has to
be read back. The gradient of the weights is one product an expert.
Letters: N tokens, K experts per token, P = N · K pairs, E experts, D hidden, I expert width,
R rows of a block, M rows of all blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_diffgemma.cpu.differentiable import custom_function

_ROWS = 128


@dataclass(frozen=True)
class Layout:
    """Where each pair is among the rows of the blocks.

    Attributes:
        expert: [M / R] the expert of each block.
        token: [M] which token a row holds; an arbitrary one where the row holds none.
        weight: [M] which of the P weights is that of a row; an arbitrary one where it holds none.
        filled: [M] whether a row holds a token.
        place: [N, K] the row of each pair.
        segments: [E, 2] first row of each expert, and the one after its last.
    """

    expert: mx.array
    token: mx.array
    weight: mx.array
    filled: mx.array
    place: mx.array
    segments: mx.array


def lay_out(chosen: mx.array, experts: int, rows: int) -> Layout:
    """Arrange the pairs of tokens and their `chosen` experts [N, K], of E = `experts`, in blocks of
    R = `rows` rows."""
    top_k = chosen.shape[1]
    pairs = chosen.flatten().astype(mx.int32)
    blocks = -(-pairs.size // rows) + experts
    order = mx.argsort(pairs)
    count = (pairs[:, None] == mx.arange(experts)).sum(axis=0)
    first = mx.cumsum(count) - count
    whole = (count + rows - 1) // rows
    end = mx.cumsum(whole)
    start = (end - whole) * rows
    expert = mx.minimum((mx.arange(blocks)[:, None] >= end).sum(axis=1), experts - 1)
    rank = mx.arange(blocks * rows).reshape(blocks, rows) - start[expert][:, None]
    filled = (rank < count[expert][:, None]).flatten()
    source = mx.minimum(first[expert][:, None] + rank, pairs.size - 1).flatten()
    weight = order[source]
    place = (start - first)[pairs] + mx.argsort(order)
    return Layout(
        expert=expert.astype(mx.uint32),
        token=weight // top_k,
        weight=weight,
        filled=filled,
        place=place.reshape(chosen.shape),
        segments=mx.stack([start, start + count], axis=1).astype(mx.uint32),
    )


def mix_experts(
    x: mx.array,
    chosen: mx.array,
    weights: mx.array,
    gate_up: mx.array,
    down: mx.array,
    activation: Callable[[mx.array, mx.array], mx.array],
) -> mx.array:
    """[N, D], the experts [N, K] of each token and their weights [N, K] -> [N, D].

    `gate_up` [E, 2 I, D] and `down` [E, D, I] are the experts; `activation` joins gate and up.
    """
    layout = lay_out(chosen, gate_up.shape[0], _ROWS)
    hidden = _product(_spread(x, layout), gate_up, layout)
    gate, up = mx.split(hidden, 2, axis=-1)
    return _gather(_product(activation(gate, up), down, layout), weights, layout)


def _spread(x: mx.array, layout: Layout) -> mx.array:
    """[N, D] -> the rows of the blocks [M, D]."""

    @custom_function
    def spread(x: mx.array) -> mx.array:
        return x[layout.token]

    @spread.vjp
    def spread_vjp(x: mx.array, gradient: mx.array, _: mx.array) -> mx.array:
        return gradient[layout.place].sum(axis=1)

    return spread(x)


def _product(x: mx.array, weight: mx.array, layout: Layout) -> mx.array:
    """[M, D] through the expert of each block [E, O, D] -> [M, O]."""

    def multiply(x: mx.array, weight: mx.array) -> mx.array:
        blocks = x.reshape(layout.expert.size, -1, x.shape[-1])
        return mx.gather_mm(blocks, weight, rhs_indices=layout.expert).reshape(x.shape[0], -1)

    @custom_function
    def product(x: mx.array, weight: mx.array) -> mx.array:
        return multiply(x, weight.swapaxes(-1, -2))

    @product.vjp
    def product_vjp(
        primals: tuple[mx.array, mx.array], gradient: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array]:
        x, weight = primals
        return multiply(gradient, weight), mx.segmented_mm(gradient.T, x, layout.segments)

    return product(x, weight)


def _gather(outputs: mx.array, weights: mx.array, layout: Layout) -> mx.array:
    """The rows [M, D] and the weights [N, K] -> a weighted sum for each token [N, D]."""

    @custom_function
    def gather(outputs: mx.array, weights: mx.array) -> mx.array:
        return (outputs[layout.place] * weights[..., None]).sum(axis=1)

    @gather.vjp
    def gather_vjp(
        primals: tuple[mx.array, mx.array], gradient: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array]:
        outputs, weights = primals
        share = mx.where(layout.filled, weights.flatten()[layout.weight], 0.0)
        return (
            gradient[layout.token] * share[:, None],
            (outputs[layout.place] * gradient[:, None]).sum(axis=-1),
        )

    return gather(outputs, weights)

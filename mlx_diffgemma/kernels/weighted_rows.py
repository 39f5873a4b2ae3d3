"""Weighted sums of a few rows of the embedding table, plain or quantized.

Letters: N positions, K rows for each, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_diffgemma.kernels.dispatch import Implementation, Launcher, MetalKernel, launcher_for
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable

_ROWS_AT_A_TIME = 2048  # rows gathered by the twin; all N · K would be as much as the logits


def weighted_rows(
    ids: mx.array,
    weights: mx.array,
    table: EmbeddingTable,
    *,
    implementation: Implementation | Launcher = "auto",
) -> mx.array:
    """Tokens [N, K] and their weights [N, K] -> Σ weight · table[token], [N, D] in float32.

    A token of weight 0 is not read. Tables in a form that the Metal kernel does not know (others
    than plain and affine in 2, 4 or 8 bits) take the twin.
    """
    launch = launcher_for(implementation)
    if launch is None or not _has_kernel(table):
        return _in_mlx(ids, weights, table)
    kernel, inputs = PLAIN, [ids.astype(mx.int32), weights.astype(mx.float32), table.weight]
    template: list[tuple[str, Any]] = []
    if table.scales is not None and table.biases is not None:
        kernel, inputs = AFFINE, [*inputs, table.scales, table.biases]
        template = [("BITS", table.bits), ("GROUP_SIZE", table.group_size)]
    count, width, threads = ids.shape[0], table.hidden_size, 256
    return launch(
        kernel,
        inputs=inputs,
        template=template,
        grid=(-(-width // threads) * threads, count, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(count, width)],
        output_dtypes=[mx.float32],
    )[0]


# Each thread sums one column of one position; all columns take the same branch on the weight.
_SOURCE = """
    const uint chosen = ids_shape[1];
    const uint column = thread_position_in_grid.x;
    const uint position = thread_position_in_grid.y;
    if (column < WIDTH) {
      float sum = 0;
      for (uint k = 0; k < chosen; k++) {
        const float weight = weights[position * chosen + k];
        if (weight == 0) continue;
        const size_t token = ids[position * chosen + k];
        sum += weight * VALUE;
      }
      out[size_t(position) * (WIDTH) + column] = sum;
    }
"""


def _source(width: str, value: str) -> str:
    return _SOURCE.replace("WIDTH", width).replace("VALUE", value)


PLAIN = MetalKernel(
    "weighted_rows_plain",
    inputs=("ids", "weights", "table"),
    outputs=("out",),
    source="""
    const uint width = table_shape[1];
    """
    + _source("width", "float(table[token * width + column])"),
)

AFFINE = MetalKernel(
    "weighted_rows_affine",
    inputs=("ids", "weights", "table", "scales", "biases"),
    outputs=("out",),
    source="""
    constexpr uint per_word = 32 / BITS;
    constexpr uint mask = (1u << BITS) - 1;
    const uint words = table_shape[1];
    const uint width = words * per_word;
    const uint groups = scales_shape[1];
    const uint shift = BITS * (thread_position_in_grid.x % per_word);
    """
    + _source(
        "width",
        "(float((table[token * words + column / per_word] >> shift) & mask)"
        " * float(scales[token * groups + column / GROUP_SIZE])"
        " + float(biases[token * groups + column / GROUP_SIZE]))",
    ),
)


def _has_kernel(table: EmbeddingTable) -> bool:
    return table.scales is None or (table.mode == "affine" and table.bits in (2, 4, 8))


def _in_mlx(ids: mx.array, weights: mx.array, table: EmbeddingTable) -> mx.array:
    step = max(1, _ROWS_AT_A_TIME // ids.shape[1])
    sums = []
    for start in range(0, ids.shape[0], step):
        rows = table.take(ids[start : start + step], mx.float32)
        sums.append((weights[start : start + step, None].astype(mx.float32) @ rows)[:, 0])
    return mx.concatenate(sums)

"""The likeliest token of each position, and nothing else: all that the last step of a canvas needs
when it is known to be the last. Letters: R rows, C canvas, N = R · C positions, D hidden, V
vocabulary, W words of 32 tokens.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_diffgemma.kernels.allowed_tokens import WORD, forbid
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.vocabulary import default_tile


def vocabulary_argmax(
    hidden: mx.array,
    table: EmbeddingTable,
    *,
    allowed: mx.array | None = None,
    fixed: mx.array | None = None,
    tile: int | None = None,
) -> mx.array:
    """Hidden states [R, C, D] -> [R, C] int32, as `vocabulary_pass(...).argmax`: softcap and
    temperature do not change an order."""
    tile = default_tile(hidden.shape[-1]) if tile is None else tile
    if tile < 1 or tile % WORD:
        raise ValueError(f"tile is {tile}; it must be a multiple of {WORD}.")
    rows, canvas, width = hidden.shape
    dtype = table.product_dtype
    queries = hidden.reshape(-1, width).astype(dtype)
    words = None if allowed is None else allowed.reshape(rows * canvas, -1)
    maximum = mx.full((rows * canvas,), -mx.inf)
    argmax = mx.zeros((rows * canvas,), mx.int32)
    for start in range(0, table.vocab_size, tile):
        stop = min(start + tile, table.vocab_size)
        raw = (queries @ table.rows(start, stop, dtype).T).astype(mx.float32)
        x = forbid(raw, None if words is None else words[:, start // WORD : -(-stop // WORD)])
        best = mx.argmax(x, axis=-1)
        value = mx.take_along_axis(x, best[:, None], axis=-1)[:, 0]
        before = maximum
        argmax = mx.where(value > before, start + best.astype(mx.int32), argmax)
        maximum = mx.maximum(before, value)
        mx.async_eval(maximum, argmax)
        mx.eval(before)
    argmax = argmax.reshape(rows, canvas)
    return argmax if fixed is None else mx.where(fixed >= 0, fixed, argmax)

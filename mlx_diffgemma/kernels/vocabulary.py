"""The pass over the vocabulary that never holds the logits, in the form for a GPU.

Head, softcap, softmax statistics, argmax, categorical draw, entropy and the self-conditioning
product are attention of each canvas position over the embedding table: queries are the hidden
states, keys and values the embeddings. So they are computed as attention is, a chunk of the
vocabulary at a time with a running maximum. A chunk is one product, in the table's own packing, and
one kernel. Everything is queued on the device; the host reads nothing. What is queued holds memory
until it is done: in bfloat16, 2 · N · V bytes if the device is behind with all of it, and twice
that where soft embeddings are sums over all tokens.

`materialized.py` has the same pass in one piece, and `cpu/vocabulary.py` the form for a CPU.
Letters: N positions of all rows, M of them that no token is bound to, m whose soft embeddings are
summed over all tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_diffgemma.kernels.dispatch import Implementation, Launcher
from mlx_diffgemma.kernels.draw import BLOCK, chances
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.rows import Positions, Row, VocabularyPass, VocabularyResult
from mlx_diffgemma.kernels.vocabulary_chunk import Running, Wanted, vocabulary_chunk
from mlx_diffgemma.kernels.weighted_rows import weighted_rows

__all__ = ["CHUNK", "Row", "VocabularyPass", "VocabularyResult", "vocabulary_pass"]

CHUNK = 8192
"""Tokens of one product: enough for a GPU, with results of 4 MB for a canvas of 256 in bfloat16.
The draws depend on it, so it is the same for any number of positions."""


def vocabulary_pass(
    hidden: mx.array,
    table: EmbeddingTable,
    rows: Sequence[Row],
    *,
    softcap: float,
    standing: mx.array | None = None,
    implementation: Implementation | Launcher = "auto",
    chunk: int = CHUNK,
) -> VocabularyResult:
    """A `VocabularyPass`. Products are in the table's `dtype`. `chunk` is a multiple of 128.

    Raises:
        ValueError: `chunk` is no such multiple, the rows do not fit the hidden states, or a
            temperature is not above 0.
    """
    if chunk < 1 or chunk % BLOCK:
        raise ValueError(f"chunk is {chunk}; it must be a multiple of {BLOCK}.")
    positions = Positions.of(rows, hidden.shape[0])
    chunks = -(-table.vocab_size // chunk)
    summed = _with_all_tokens(positions)
    wanted = _wanted(positions, softcap, standing, chunks, summed)
    queries = positions.taken(hidden).astype(table.dtype)
    own, sums = Running.start(len(positions.places)), None
    for start, part in table.pieces(chunk):
        after = vocabulary_chunk(
            part.product(queries),
            own,
            wanted,
            start=start,
            place=start // chunk,
            dtype=table.dtype,
            implementation=implementation,
        )
        own = after.running
        if after.exponentials is not None and after.shrink is not None:
            product = part.expected(after.exponentials)
            if sums is None:
                sums = product.astype(mx.float32)
            else:
                sums = _rescaled_sum(sums, after.shrink, product)
        # Handed over now, a chunk is computed before the next ones take memory for their products:
        # of what it is given at once, MLX computes first what needs nothing else. The host goes on.
        mx.async_eval(own.numbers, own.tokens, [] if sums is None else sums)

    state = Running(*table.joined(own.numbers, own.tokens))
    total, maximum = state.total, state.best[:, 0]
    log_total = mx.log(total)
    log_sum = maximum + log_total
    argmax, draw, draw_log_p = state.best_tokens[:, 0], None, None
    if positions.has_draws:
        draw, draw_log_p = state.draw, mx.minimum(state.draw_logit - log_sum, 0.0)
        if any(row.key is None for row in rows):
            drawn = mx.array(positions.of_rows(lambda row: row.key is not None, np.bool_))
            draw = mx.where(drawn, draw, argmax)
            draw_log_p = mx.where(drawn, draw_log_p, -log_total)
    weights, dropped = _likeliest(state, positions)
    soft = None
    if any(row.need_soft for row in rows):
        parts = []
        if sums is not None:
            every = mx.array(summed)
            # The sums are relative to the largest logit among the pieces held here.
            scale = total * mx.exp(maximum - own.best[:, 0])
            parts.append((summed, sums / _among(scale, every, len(positions.places))[:, None]))
        few = np.flatnonzero(positions.few)
        if len(few):
            at, count = mx.array(few), len(positions.places)
            held = table.held(_among(state.best_tokens, at, count), _among(weights, at, count))
            parts.append((few, weighted_rows(*held, implementation=implementation)))
        parts = _summed(parts, table)
        soft = positions.soft_embeddings(parts, table, hidden.dtype)
    fixed = mx.array(positions.fixed)
    return VocabularyResult(
        argmax=positions.spread(argmax, fixed),
        argmax_log_probability=positions.spread(-log_total),
        draw=None if draw is None else positions.spread(draw, fixed),
        # Rounding may leave a certain position a hair below zero.
        entropy=positions.spread(mx.maximum(log_total - state.weighted / total, 0.0)),
        log_sum=positions.spread(log_sum),
        draw_log_probability=None if draw_log_p is None else positions.spread(draw_log_p),
        standing_log_probability=None
        if standing is None
        else positions.spread(mx.minimum(state.standing_logit - log_sum, 0.0)),
        soft_embeddings=soft,
        dropped_mass=positions.spread(dropped),
    )


@partial(mx.compile, shapeless=True)
def _rescaled_sum(sums: mx.array, shrink: mx.array, product: mx.array) -> mx.array:
    """The sums so far [m, D], brought down to a new maximum, with a product [m, D] in any type."""
    return sums * shrink + product.astype(mx.float32)


def _summed(
    parts: list[tuple[np.ndarray, mx.array]], table: EmbeddingTable
) -> list[tuple[np.ndarray, mx.array]]:
    """Sums of rows at some positions each, as sums over all tokens at all of these positions."""
    if not parts:
        return parts
    sums = [each for _, each in parts]
    together = sums[0] if len(sums) == 1 else mx.concatenate(sums)
    return [(np.concatenate([at for at, _ in parts]), table.summed(together))]


def _with_all_tokens(positions: Positions) -> np.ndarray:
    """Which of the M positions need a sum over all tokens, [m]."""
    needed = positions.of_rows(lambda row: row.need_soft, np.bool_)
    return np.flatnonzero(needed & ~positions.few)


def _wanted(
    positions: Positions,
    softcap: float,
    standing: mx.array | None,
    chunks: int,
    summed: np.ndarray,
) -> Wanted:
    slots = np.full(len(positions.places), -1, np.int32)
    slots[summed] = np.arange(len(summed))
    masks = positions.allowed()
    return Wanted(
        softcap=softcap,
        scale=mx.array(softcap / positions.temperatures),
        chances=chances(positions, chunks),
        standing=None if standing is None else positions.taken(standing).astype(mx.int32),
        which=None if masks is None else mx.array(masks[0]),
        masks=None if masks is None else mx.array(masks[1]),
        slots=mx.array(slots) if len(summed) else None,
        dense=len(summed),
    )


def _likeliest(state: Running, positions: Positions) -> tuple[mx.array, mx.array]:
    """The shares [M, BEST] of the likeliest tokens within the cutoff, which sum to 1, and the
    probability [M] that they leave out; 0 in rows without a cutoff."""
    below = state.best - state.best[:, :1]
    cutoffs = positions.of_rows(
        lambda row: np.inf if row.soft_cutoff is None else row.soft_cutoff, np.float32
    )
    weights = mx.where(below >= -mx.array(cutoffs)[:, None], mx.exp(below), 0.0)
    kept = weights.sum(axis=-1)
    dropped = mx.maximum(1.0 - kept / state.total, 0.0)
    if np.isinf(cutoffs).any():
        dropped = mx.where(mx.array(np.isinf(cutoffs)), 0.0, dropped)
    return weights / kept[:, None], dropped


def _among(values: mx.array, at: mx.array, count: int) -> mx.array:
    """`values` [M, ...] at some of the M = `count` positions, in ascending order."""
    return values if at.size == count else values[at]

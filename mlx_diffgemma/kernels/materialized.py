"""The pass over the vocabulary in one piece, which holds several copies of the logits [N, V].

It is the form for small vocabularies, and the slow twin against which `vocabulary.py` and
`cpu/vocabulary.py` are tested. Letters: N positions of all rows, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_diffgemma.kernels.activation import softcap as soft_cap
from mlx_diffgemma.kernels.allowed_tokens import FORBIDDEN, unpack_allowed, words_of
from mlx_diffgemma.kernels.dispatch import Implementation, Launcher
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.rows import Row, VocabularyResult, check


def whole_pass(
    hidden: mx.array,
    table: EmbeddingTable,
    rows: Sequence[Row],
    *,
    softcap: float,
    standing: mx.array | None = None,
    implementation: Implementation | Launcher = "auto",
) -> VocabularyResult:
    """A `VocabularyPass` with all logits at once. Its draws follow the same distribution as those
    of the other forms, from other random numbers. It has no kernels to choose an `implementation`
    of.

    Raises:
        ValueError: the rows do not fit the hidden states, or a temperature is not above 0.
    """
    check(rows, hidden.shape[0])
    lengths = [row.length for row in rows]
    raw = table.product(hidden)
    temperatures = np.repeat(np.array([row.temperature for row in rows], np.float32), lengths)
    x = soft_cap(raw, softcap) / mx.array(temperatures)[:, None]
    kept = _kept(rows, table.vocab_size)
    if kept is not None:
        x = mx.where(kept, x, FORBIDDEN)
    log_sum = mx.logsumexp(x, axis=-1)
    # After the softcap an infinity is finite, and so is a softmax over forbidden tokens alone.
    sound = mx.isfinite(raw).all(axis=-1) & (x.max(axis=-1) > FORBIDDEN)
    log_sum = mx.where(sound, log_sum, mx.nan)
    log_p = x - log_sum[:, None]
    p = mx.exp(log_p)
    argmax = mx.argmax(x, axis=-1).astype(mx.int32)
    draw = _draws(x, argmax, rows)
    bound = mx.array(_fixed(rows) >= 0)

    def log_probability(tokens: mx.array) -> mx.array:
        chosen = mx.take_along_axis(log_p, tokens[:, None], axis=-1)[:, 0]
        return mx.where(bound, 0.0, chosen)

    dropped = mx.zeros(hidden.shape[:1])
    least = _least(x, rows)
    if least is not None:
        mass = mx.where(x >= least, p, 0.0).sum(axis=-1)
        dropped = mx.where(bound, 0.0, mx.maximum(1.0 - mass, 0.0))
    return VocabularyResult(
        argmax=argmax,
        argmax_log_probability=mx.where(bound, 0.0, x.max(axis=-1) - log_sum),
        draw=draw,
        entropy=mx.where(bound, 0.0, -(p * log_p).sum(axis=-1)),
        log_sum=mx.where(bound, 0.0, log_sum),
        draw_log_probability=None if draw is None else log_probability(draw),
        standing_log_probability=None if standing is None else log_probability(standing),
        soft_embeddings=_soft_embeddings(x, least, table, rows, hidden.dtype),
        dropped_mass=dropped,
    )


def _fixed(rows: Sequence[Row]) -> np.ndarray:
    """[N] the token that a position is bound to, or −1."""
    none = [np.full(row.length, -1, np.int32) if row.fixed is None else row.fixed for row in rows]
    return np.concatenate(none)


def _kept(rows: Sequence[Row], vocab: int) -> mx.array | None:
    """[N, V] which tokens each position may take; None where every one may take all."""
    if all(row.fixed is None and not row.allowed for row in rows):
        return None
    kept = []
    for row in rows:
        may = mx.ones((row.length, vocab), mx.bool_)
        if row.allowed:
            may = unpack_allowed(mx.array(words_of(row.allowed, row.length, vocab)), vocab)
        if row.fixed is not None:
            fixed = mx.array(row.fixed)[:, None]
            may = mx.where(fixed < 0, may, fixed == mx.arange(vocab))
        kept.append(may)
    return mx.concatenate(kept)


def _draws(x: mx.array, argmax: mx.array, rows: Sequence[Row]) -> mx.array | None:
    """A token of each position [N], a row from its own key; the argmax in rows without one."""
    if all(row.key is None for row in rows):
        return None
    drawn, start = [], 0
    for row in rows:
        stop = start + row.length
        if row.key is None:
            drawn.append(argmax[start:stop])
        else:
            tokens = mx.random.categorical(x[start:stop], key=row.key)
            drawn.append(tokens.astype(mx.int32))
        start = stop
    return mx.concatenate(drawn)


def _least(x: mx.array, rows: Sequence[Row]) -> mx.array | None:
    """[N, 1] the least logit that enters the soft embeddings; None where all do in all rows."""
    if all(row.soft_cutoff is None for row in rows):
        return None
    cutoffs = [np.inf if row.soft_cutoff is None else row.soft_cutoff for row in rows]
    at = np.repeat(np.array(cutoffs, np.float32), [row.length for row in rows])
    return x.max(axis=-1, keepdims=True) - mx.array(at)[:, None]


def _soft_embeddings(
    x: mx.array,
    least: mx.array | None,
    table: EmbeddingTable,
    rows: Sequence[Row],
    dtype: mx.Dtype,
) -> mx.array | None:
    """[N, D], zeros in rows that need none; None if no row needs any."""
    needed = np.repeat([row.need_soft for row in rows], [row.length for row in rows])
    if not needed.any():
        return None
    cut = x if least is None else mx.where(x >= least, x, FORBIDDEN)
    weights = mx.softmax(cut, axis=-1).astype(table.dtype)
    soft = (table.expected(weights) * table.scale).astype(dtype)
    return soft if needed.all() else mx.where(mx.array(needed)[:, None], soft, 0.0).astype(dtype)

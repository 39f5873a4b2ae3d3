"""The pass over the vocabulary where every position that is not bound may take few tokens: their
rows of the table alone are read, and no other word is looked at.

Letters: N positions of all rows, M of them that no token is bound to, D hidden, U tokens that some
position may take.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_diffgemma.kernels.activation import softcap as soft_cap
from mlx_diffgemma.kernels.allowed_tokens import FORBIDDEN
from mlx_diffgemma.kernels.dispatch import Implementation, Launcher
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.rows import Positions, Row, VocabularyResult


def few_tokens_pass(
    hidden: mx.array,
    table: EmbeddingTable,
    rows: Sequence[Row],
    *,
    softcap: float,
    standing: mx.array | None = None,
    implementation: Implementation | Launcher = "auto",
) -> VocabularyResult:
    """A `VocabularyPass` for rows that all name their `candidates`. Products and sums are in
    float32, and nothing is left out of the soft embeddings, whatever the `soft_cutoff`. `standing`
    is not answered; there are no kernels to choose an `implementation` of."""
    positions = Positions.of(rows, hidden.shape[0])
    ids, may = gathered([each for row in rows for each in row.candidates or ()])
    tokens, temperatures = mx.array(ids, mx.int32), mx.array(positions.temperatures)[:, None]
    raw = table.scores(positions.taken(hidden), tokens)
    x = mx.where(mx.array(may), soft_cap(raw, softcap) / temperatures, FORBIDDEN)
    log_sum = mx.logsumexp(x, axis=-1)
    # The softcap makes an infinity finite.
    log_sum = mx.where(mx.isfinite(raw).all(axis=-1), log_sum, mx.nan)
    log_p = x - log_sum[:, None]
    p = mx.exp(log_p)
    best = mx.argmax(x, axis=-1)
    draw = draw_log_p = soft = None
    if positions.has_draws:
        drawn = [
            best[start:stop]
            if row.key is None
            else mx.random.categorical(x[start:stop], key=row.key)
            for row, (start, stop) in zip(rows, positions.spans, strict=True)
        ]
        chosen = mx.concatenate(drawn)
        draw = tokens[chosen]
        draw_log_p = mx.take_along_axis(log_p, chosen[:, None], axis=-1)[:, 0]
    if any(row.need_soft for row in rows):
        wanted = np.flatnonzero(positions.of_rows(lambda row: row.need_soft, np.bool_))
        expected = table.mixed(p[mx.array(wanted)], tokens)
        soft = positions.soft_embeddings([(wanted, expected)], table, hidden.dtype)
    fixed = mx.array(positions.fixed)
    return VocabularyResult(
        argmax=positions.spread(tokens[best], fixed),
        argmax_log_probability=positions.spread(x.max(axis=-1) - log_sum),
        draw=None if draw is None else positions.spread(draw, fixed),
        entropy=positions.spread(mx.maximum(-(p * log_p).sum(axis=-1), 0.0)),
        log_sum=positions.spread(log_sum),
        draw_log_probability=None if draw_log_p is None else positions.spread(draw_log_p),
        standing_log_probability=None,
        soft_embeddings=soft,
        dropped_mass=mx.zeros(hidden.shape[:1]),
    )


def gathered(candidates: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """All candidates of M positions in ascending order, [U], and which of them each position may
    take, [M, U]."""
    lengths = [len(each) for each in candidates]
    every = np.concatenate([list(each) for each in candidates])
    ids, inverse = np.unique(every, return_inverse=True)
    may = np.zeros((len(candidates), len(ids)), bool)
    may[np.repeat(np.arange(len(candidates)), lengths), inverse.reshape(-1)] = True
    return ids.astype(np.int32), may

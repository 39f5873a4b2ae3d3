"""The pass over the vocabulary in one piece: the slow twin of `vocabulary.py`, which is tested
against it. It holds several copies of the logits [R, C, V]."""

from __future__ import annotations

import mlx.core as mx

from mlx_diffgemma.kernels.allowed_tokens import forbid
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.vocabulary import VocabularyResult, bind


def materialized(
    hidden: mx.array,
    table: EmbeddingTable,
    *,
    softcap: float,
    temperature: float,
    keys: mx.array | None = None,
    allowed: mx.array | None = None,
    fixed: mx.array | None = None,
    need_soft: bool = True,
    soft_cutoff: float | None = None,
) -> VocabularyResult:
    """As `vocabulary_pass`, with all logits at once. Its draws follow the same distribution from
    other random numbers."""
    dtype = table.product_dtype
    embeddings = table.rows(0, table.vocab_size, dtype)
    raw = (hidden.astype(dtype) @ embeddings.T).astype(mx.float32)
    x = forbid(mx.tanh(raw / softcap) * softcap / temperature, allowed)
    log_sum = mx.logsumexp(x, axis=-1)
    log_p = x - log_sum[..., None]
    p = mx.exp(log_p)
    draw = draw_log_p = None
    if keys is not None:
        drawn = [mx.random.categorical(row, key=key) for row, key in zip(x, keys, strict=True)]
        draw = mx.stack(drawn).astype(mx.int32)
        draw_log_p = mx.take_along_axis(log_p, draw[..., None], axis=-1)[..., 0]
    soft = None
    dropped = mx.zeros(hidden.shape[:2])
    if need_soft:
        kept = p
        if soft_cutoff is not None:
            kept = mx.where(x >= x.max(axis=-1, keepdims=True) - soft_cutoff, p, 0.0)
            mass = kept.sum(axis=-1, keepdims=True)
            kept, dropped = kept / mass, mx.maximum(1.0 - mass[..., 0], 0.0)
        soft = (kept.astype(dtype) @ embeddings).astype(mx.float32) * table.scale
        soft = soft.astype(hidden.dtype)
    result = VocabularyResult(
        argmax=mx.argmax(x, axis=-1).astype(mx.int32),
        draw=draw,
        entropy=-(p * log_p).sum(axis=-1),
        soft_embeddings=soft,
        log_sum=log_sum,
        draw_log_probability=draw_log_p,
        dropped_mass=dropped,
    )
    return result if fixed is None else bind(result, fixed, table)

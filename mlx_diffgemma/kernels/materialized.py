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
    draw = None
    if keys is not None:
        drawn = [mx.random.categorical(row, key=key) for row, key in zip(x, keys, strict=True)]
        draw = mx.stack(drawn).astype(mx.int32)
    soft = None
    if need_soft:
        soft = ((p.astype(dtype) @ embeddings).astype(mx.float32) * table.scale).astype(
            hidden.dtype
        )
    result = VocabularyResult(
        argmax=mx.argmax(x, axis=-1).astype(mx.int32),
        draw=draw,
        entropy=-(p * log_p).sum(axis=-1),
        soft_embeddings=soft,
        log_sum=log_sum,
        dropped_mass=mx.zeros(hidden.shape[:2]),
    )
    return result if fixed is None else bind(result, fixed, table)

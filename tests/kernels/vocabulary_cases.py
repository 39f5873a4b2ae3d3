"""Float64's word on tables and hidden states, for the tests of the passes over the vocabulary.
Letters: N positions, V vocabulary, D hidden."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.vocabulary import VocabularyResult
from mlx_diffgemma.survey.pass_cases import SOFTCAP

FORMS = ["float32", "bfloat16", "float16", "affine-4", "affine-8", "mxfp4", "mxfp8", "nvfp4"]


@dataclass(frozen=True)
class Expected:
    """What float64 says; `logits` [N, V] are after the temperature."""

    logits: np.ndarray
    p: np.ndarray
    log_sum: np.ndarray
    entropy: np.ndarray
    soft: np.ndarray


def in_float64(
    hidden: mx.array,
    table: EmbeddingTable,
    temperature: float | np.ndarray,
    allowed: np.ndarray | None = None,
    cutoff: float | np.ndarray = np.inf,
) -> Expected:
    """`temperature` and `cutoff` are numbers, or [N]; `allowed` is [N, V]."""
    weight = np.array(table.rows(0, table.vocab_size, mx.float32)).astype(np.float64)
    raw = np.array(hidden.astype(mx.float32)).astype(np.float64) @ weight.T
    logits = SOFTCAP * np.tanh(raw / SOFTCAP) / np.reshape(temperature, (-1, 1))
    if allowed is not None:
        logits = np.where(allowed, logits, -np.inf)
    top = logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(logits - top)
    total = exponentials.sum(axis=-1, keepdims=True)
    p = exponentials / total
    log_sum = (top + np.log(total))[:, 0]
    entropy = -(p * np.where(p > 0, logits - log_sum[:, None], 0)).sum(axis=-1)
    kept = np.where(logits >= top - np.reshape(cutoff, (-1, 1)), p, 0)
    kept /= kept.sum(axis=-1, keepdims=True)
    return Expected(logits, p, log_sum, entropy, kept @ weight * float(table.scale))


def of_tokens(values: np.ndarray, tokens: mx.array | np.ndarray) -> np.ndarray:
    """Of values [N, V], those of one token a position."""
    return np.take_along_axis(values, np.array(tokens)[:, None], axis=-1)[:, 0]


def assert_close(result: VocabularyResult, expected: Expected, atol: float = 5e-5) -> None:
    np.testing.assert_allclose(result.log_sum, expected.log_sum, rtol=0, atol=atol)
    np.testing.assert_allclose(result.entropy, expected.entropy, rtol=0, atol=atol)
    np.testing.assert_allclose(result.soft_embeddings, expected.soft, rtol=0, atol=20 * atol)
    chosen = of_tokens(expected.logits, result.argmax)
    assert (expected.logits.max(axis=-1) - chosen <= atol).all()

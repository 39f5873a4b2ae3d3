"""Tables, hidden states and float64's word on them, for the tests of the passes over the
vocabulary. Letters: N positions, V vocabulary, D hidden."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_diffgemma.kernels.allowed_tokens import pack_allowed
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.vocabulary import VocabularyResult

SOFTCAP = 30.0
FORMS = ["float32", "bfloat16", "float16", "affine-4", "affine-8", "mxfp4", "mxfp8", "nvfp4"]


@dataclass(frozen=True)
class Expected:
    """What float64 says; `logits` [N, V] are after the temperature."""

    logits: np.ndarray
    p: np.ndarray
    log_sum: np.ndarray
    entropy: np.ndarray
    soft: np.ndarray


def make_table(vocab: int, width: int, form: str = "float32", gain: float = 0.6) -> EmbeddingTable:
    """Random embeddings, held in `form`; the activations are in float32 whatever it is, so that
    float64 is a fair judge of the products."""
    rng = np.random.default_rng([vocab, width])
    weight = mx.array((rng.normal(size=(vocab, width)) * gain).astype(np.float32))
    if form in ("float32", "bfloat16", "float16"):
        return EmbeddingTable(weight.astype(getattr(mx, form)), mx.float32)
    mode, _, bits = form.partition("-")
    module = nn.Embedding(vocab, width)
    module.weight = weight.astype(mx.bfloat16)
    quantized = module.to_quantized(None, int(bits) if bits else None, mode)
    table = EmbeddingTable.of(quantized, mx.float32)
    if table.biases is None:
        return table
    # In bfloat16, scale · value + bias would be rounded to that.
    scales, biases = table.scales.astype(mx.float32), table.biases.astype(mx.float32)
    return replace(table, scales=scales, biases=biases)


def make_hidden(*lengths: int, width: int = 64, seed: int = 0) -> mx.array:
    """Positions from certain to undecided, [N, D], for canvases of these lengths."""
    rng = np.random.default_rng(seed)
    gains = np.concatenate([np.linspace(0.1, 1.5, length) for length in lengths])[:, None]
    return mx.array((rng.normal(size=(sum(lengths), width)) * gains).astype(np.float32))


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


def packed(allowed: np.ndarray) -> dict[int, np.ndarray]:
    """Booleans [C, V] as a row takes them."""
    return dict(enumerate(np.array(pack_allowed(mx.array(allowed)))))


def of_tokens(values: np.ndarray, tokens: mx.array | np.ndarray) -> np.ndarray:
    """Of values [N, V], those of one token a position."""
    return np.take_along_axis(values, np.array(tokens)[:, None], axis=-1)[:, 0]


def assert_close(result: VocabularyResult, expected: Expected, atol: float = 5e-5) -> None:
    np.testing.assert_allclose(result.log_sum, expected.log_sum, rtol=0, atol=atol)
    np.testing.assert_allclose(result.entropy, expected.entropy, rtol=0, atol=atol)
    np.testing.assert_allclose(result.soft_embeddings, expected.soft, rtol=0, atol=20 * atol)
    chosen = of_tokens(expected.logits, result.argmax)
    assert (expected.logits.max(axis=-1) - chosen <= atol).all()

"""How a clean canvas becomes the one that the decoder sees. Letters: B examples, C canvas."""

from __future__ import annotations

import numpy as np


def corrupt(
    canvas: np.ndarray,
    vocab_size: int,
    rng: np.random.Generator,
    *,
    min_noise: float = 1e-4,
    span_fraction: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Replace tokens of clean canvases [B, C] by uniformly random ones.

    Each example draws t ~ U(min_noise, 1). In a share `span_fraction` of them one contiguous span
    of t · C tokens is replaced, in the others each token with probability t.

    Returns:
        The corrupted canvases [B, C] and t [B].
    """
    batch = len(canvas)
    noise = rng.uniform(min_noise, 1.0, (batch,))
    spans = rng.random((batch,)) < span_fraction
    return corrupt_at(canvas, vocab_size, rng, noise, spans), noise


def corrupt_at(
    canvas: np.ndarray,
    vocab_size: int,
    rng: np.random.Generator,
    noise: np.ndarray,
    spans: np.ndarray,
) -> np.ndarray:
    """Replace tokens of clean canvases [B, C] by uniformly random ones at the levels `noise` [B].

    Where `spans` [B] is true, one contiguous span of noise · C tokens is replaced, elsewhere each
    token with probability noise.
    """
    batch, length = canvas.shape
    size = np.rint(noise * length).astype(int)
    start = rng.integers(0, length - size + 1)[:, None]
    place = np.arange(length)
    in_span = (place >= start) & (place < start + size[:, None])
    scattered = rng.random((batch, length)) < noise[:, None]
    tokens = rng.integers(0, vocab_size, (batch, length))
    return np.where(np.where(spans[:, None], in_span, scattered), tokens, canvas)

"""The objective that training minimizes.

Letters: B examples, S sequence positions, C canvas, D hidden, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.train.cross_entropy import cross_entropy
from mlx_diffgemma.train.examples import Batch
from mlx_diffgemma.train.forward import KeysValues, decode, encode


def loss(
    model: DiffusionGemma,
    batch: Batch,
    *,
    encoder_weight: float = 1.0,
    checkpoint: bool = False,
) -> tuple[mx.array, mx.array, mx.array]:
    """The objective of a batch and its two parts, in nats a token: canvas loss + weight · encoder
    loss.

    The canvas loss is the mean cross-entropy over whole canvases, the tail of eos included; the
    encoder loss is the mean cross-entropy of the next token over the positions of `batch.counted`.
    In the first `batch.conditioned` examples the decoder sees the expected embeddings of a first
    pass, in the others zeros, as in the first denoising step. No gradient goes into the first pass;
    the embedding gets the gradient of the expectation over its rows, as in the reference.
    """
    hidden, kept = encode(model, batch, checkpoint=checkpoint)
    soft = expected_embeddings(model, batch, kept)
    seen = decode(model, batch.corrupted, kept, batch.prefix, soft, checkpoint=checkpoint)
    canvas_loss = cross_entropy(model, seen, batch.canvas).mean()
    if encoder_weight == 0:
        return canvas_loss, canvas_loss, mx.zeros(())
    next_token = encoder_loss(model, hidden, batch)
    return canvas_loss + encoder_weight * next_token, canvas_loss, next_token


def encoder_loss(model: DiffusionGemma, hidden: mx.array, batch: Batch) -> mx.array:
    """Mean cross-entropy of the next token, in nats, over the positions of `batch.counted`, given
    the encoder's states `hidden` [B, S, D]; 0 where no position counts."""
    if batch.counted.shape[1] == 0:
        return mx.zeros(())
    nats = cross_entropy(model, hidden[:, :-1], batch.sequence[:, 1:])
    counted = batch.counted.astype(mx.float32)
    return (nats * counted).sum() / mx.maximum(counted.sum(), 1.0)


def expected_embeddings(
    model: DiffusionGemma, batch: Batch, kept: list[KeysValues]
) -> mx.array | None:
    """Embeddings [B, C, D] that a first pass without self-conditioning expects at temperature 1,
    with zeros for the examples that are not conditioned; None where no example is."""
    rows = batch.conditioned
    if rows == 0:
        return None
    first = [(keys[:rows], values[:rows]) for keys, values in kept]
    hidden = decode(model, batch.corrupted[:rows], first, batch.prefix[:rows])
    soft = model.soft_embeddings(mx.stop_gradient(model.logits(hidden)))
    others = mx.zeros((batch.size - rows, *soft.shape[1:]), soft.dtype)
    return mx.concatenate([soft, others]) if batch.size > rows else soft

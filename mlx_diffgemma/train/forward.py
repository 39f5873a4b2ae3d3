"""The two passes of training: `encode` reads sequences whole, `decode` a canvas for each of them.

The layers and masks are those of `model/`; in place of the prefix cache each layer keeps the keys
and values of the whole sequence, through which gradients flow.
Letters: B examples, S sequence positions, C canvas, D hidden, H KV heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_diffgemma.model.attention import Attention, attend, canvas_masks, picture_masks
from mlx_diffgemma.model.cache import KeysValues
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.train.examples import Batch
from mlx_diffgemma.train.recompute import recomputed


def embed(model: DiffusionGemma, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
    """The embeddings [B, S, D] of the sequences with their pictures, and the `picture_masks`, of
    which there are none without pictures.

    Raises:
        PromptError: there are pictures, and the model has no vision tower.
    """
    x = model.embed(batch.sequence)
    if not batch.soft_places.size:
        return x, {}
    seen = model.see(batch.patches, batch.columns)
    soft = seen.reshape(-1, seen.shape[-1])[mx.maximum(batch.soft_places, 0)]
    x = mx.where((batch.soft_places >= 0)[..., None], soft.astype(x.dtype), x)
    return x, picture_masks(model.config.text, batch.soft_places, seen.shape[1])


def encode(
    model: DiffusionGemma, batch: Batch, *, checkpoint: bool = False
) -> tuple[mx.array, list[KeysValues]]:
    """Hidden states [B, S, D] of the sequences of a batch, and the keys and values [B, H, S, Dh] of
    every layer. With `checkpoint`, layers are computed again for the gradient."""
    x, masks = embed(model, batch)
    kept = []
    scalars = model.model.encoder.language_model.layers
    for layer, own in zip(model.layers, scalars, strict=True):
        run = recomputed(layer, _encode_layer) if checkpoint else _bound(layer, _encode_layer)
        mask = [masks[layer.self_attn.sizes.kind]] if masks else []
        x, keys, values = run(x, own.layer_scalar, *mask)
        kept.append((keys, values))
    return model.model.decoder.norm(x), kept


def decode(
    model: DiffusionGemma,
    canvas: mx.array,
    kept: Sequence[KeysValues],
    prefix: mx.array,
    soft_embeddings: mx.array | None = None,
    *,
    checkpoint: bool = False,
) -> mx.array:
    """Hidden states [B, C, D] of canvases [B, C] that follow the first `prefix` [B] positions of
    their sequences, whose keys and values are `kept`. `soft_embeddings` [B, C, D] are the expected
    embeddings of an earlier pass, zeros if None. With `checkpoint`, layers are computed again for
    the gradient."""
    x = model.embed(canvas)
    if soft_embeddings is None:
        soft_embeddings = mx.zeros_like(x)
    x = model.model.decoder.self_conditioning(x, soft_embeddings.astype(x.dtype))
    length = kept[0][0].shape[2]
    masks = canvas_masks(model.config.text, prefix, length, canvas.shape[1])
    for layer, (keys, values) in zip(model.layers, kept, strict=True):
        run = recomputed(layer, _decode_layer) if checkpoint else _bound(layer, _decode_layer)
        x = run(x, masks[layer.self_attn.sizes.kind], keys, values, prefix)
    return model.model.decoder.norm(x)


def _encode_layer(
    layer: Any, x: mx.array, layer_scalar: mx.array, mask: mx.array | None = None
) -> tuple[mx.array, mx.array, mx.array]:
    kept: list[mx.array] = []

    def look(attention: Attention, x: mx.array) -> mx.array:
        queries, keys, values = attention.project(x)
        queries, keys = attention.rotate(queries, keys, 0)
        kept.extend((keys, values))
        # Padding is on the right, where no position that counts looks.
        sight = attention.causal if mask is None else mask
        return attention.output(attend(queries, keys, values, sight))

    x = layer(x, look, layer_scalar)
    keys, values = kept
    return x, keys, values


def _decode_layer(
    layer: Any, x: mx.array, mask: mx.array, keys: mx.array, values: mx.array, prefix: mx.array
) -> mx.array:
    def look(attention: Attention, x: mx.array) -> mx.array:
        queries, own_keys, own_values = attention.project(x)
        queries, own_keys = attention.rotate(queries, own_keys, prefix)
        seen = (
            mx.concatenate([keys, own_keys], axis=2),
            mx.concatenate([values, own_values], axis=2),
        )
        return attention.output(attend(queries, *seen, mask))

    return layer(x, look, layer.layer_scalar)


def _bound(layer: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: run(layer, *arguments)

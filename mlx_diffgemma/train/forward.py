"""The two passes as training runs them: the prefix whole, then a canvas for each sequence.

The layers are those of `model/`; in place of the prefix cache each keeps the keys and values of the
whole sequence, through which gradients flow.
Letters: B examples, S sequence positions, C canvas, D hidden, H KV heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_diffgemma.config import FULL, SLIDING, TextConfig
from mlx_diffgemma.model.attention import Mask
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.train.recompute import recomputed

KeysValues = tuple[mx.array, mx.array]


@dataclass
class _Kept:
    """Stands where a layer expects its cache: [B, H, S, Dh] twice."""

    keys: mx.array | None = None
    values: mx.array | None = None

    def extend(self, keys: mx.array, values: mx.array) -> KeysValues:
        self.keys, self.values = keys, values
        return keys, values

    def with_canvas(self, keys: mx.array, values: mx.array, places: None = None) -> KeysValues:
        assert self.keys is not None and self.values is not None
        return (
            mx.concatenate([self.keys, keys], axis=2),
            mx.concatenate([self.values, values], axis=2),
        )


def causal_masks(config: TextConfig, length: int) -> dict[str, Mask]:
    """Who sees whom in the encoder: a token sees itself and what came before, in sliding layers
    the last `window` positions. Padding is on the right, where nobody looks."""
    sliding: Mask = "causal"
    if length > config.sliding_window:
        apart = mx.arange(length)[:, None] - mx.arange(length)[None]
        sliding = ((apart >= 0) & (apart < config.sliding_window))[None, None]
    return {FULL: "causal", SLIDING: sliding}


def canvas_masks(
    config: TextConfig, prefix: mx.array, length: int, canvas: int
) -> dict[str, mx.array]:
    """Who sees whom in the decoder, [B, 1, 1, S + C]: every canvas token sees the whole canvas and
    the first `prefix` [B] positions of its sequence, in sliding layers the last `window - 1` of
    them. It does not see what its own canvas says in the sequence, nor what follows."""
    place = mx.arange(length + canvas)[None]
    end = prefix[:, None]
    on_canvas = place >= length
    seen = {FULL: place < end, SLIDING: place < end}
    if length >= config.sliding_window:
        seen[SLIDING] = seen[FULL] & (place >= end - (config.sliding_window - 1))
    return {kind: (mask | on_canvas)[:, None, None, :] for kind, mask in seen.items()}


def encode(
    model: DiffusionGemma, sequence: mx.array, *, checkpoint: bool = False
) -> tuple[mx.array, list[KeysValues]]:
    """[B, S] token ids -> hidden states [B, S, D], and the keys and values of every layer."""
    x = model.embed(sequence)
    masks = causal_masks(model.config.text, sequence.shape[1])
    kept = []
    scalars = model.model.encoder.language_model.layers
    for layer, own in zip(model.layers, scalars, strict=True):
        run = recomputed(layer, _encode_layer) if checkpoint else _bound(layer, _encode_layer)
        mask = masks[layer.self_attn.sizes.kind]
        x, keys, values = run(x, mask, own.layer_scalar)
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
    their sequences; `soft_embeddings` [B, C, D] is what an earlier pass expected."""
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
    layer: Any, x: mx.array, mask: Mask, layer_scalar: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    kept = _Kept()
    x = layer.encode(x, mask, kept, 0, layer_scalar)
    assert kept.keys is not None and kept.values is not None
    return x, kept.keys, kept.values


def _decode_layer(
    layer: Any, x: mx.array, mask: Mask, keys: mx.array, values: mx.array, prefix: mx.array
) -> mx.array:
    return layer.decode(x, mask, _Kept(keys, values), prefix)


def _bound(layer: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: run(layer, *arguments)

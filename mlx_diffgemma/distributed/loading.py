"""The model of one rank: as large as its share, with the names of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from mlx_diffgemma.distributed.shares import Share, local_config
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.experts import Router


def local_model(share: Share) -> DiffusionGemma:
    """A model of a rank's share, not quantized and without weights of its own yet. Its `config` is
    that of the whole model, and its modules are as large as the share. Ranks of a pipeline that do
    not have the embedding have no `embed_tokens` and no `self_conditioning`."""
    model = DiffusionGemma(local_config(share))
    for layer in model.layers:
        layer.router = Router(share.config.text)
    if not share.has_embedding:
        del model.model.decoder.embed_tokens
        del model.model.decoder.self_conditioning
    model.config = share.config
    return model


def share_of_weights(share: Share, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """What a rank holds of a whole model's weights (plain, or packed with scales and biases), by
    the name in the rank's own model."""
    own = {}
    for name, array in weights.items():
        part = share.part(name)
        if part is not None:
            own[part.name] = array[part.slices(array.shape)]
    return own

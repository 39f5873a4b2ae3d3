"""Small models with adapters, plain and quantized, on the layers that the CPU runs."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from one_pass import decoded, encoded
from tiny_models import make_config, make_model, make_weights

from mlx_diffgemma import cpu
from mlx_diffgemma.checkpoint.names import is_quantizable
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.train.config import LoraParameters, TrainConfig

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "head_dim": 32,
    "global_head_dim": 32,
}  # fmt: skip
PLAIN = None
FORMATS = [PLAIN, ("affine", 4, 32), ("affine", 6, 32), ("mxfp4", 4, 32), ("nvfp4", 4, 16)]
"""mode, bits and group size; None is a model in float32."""

EVERYWHERE = ("attn", "mlp", "experts", "self_conditioning")


def small_model(fmt=PLAIN, seed: int = 1) -> DiffusionGemma:
    """Random weights, the same for every format. Small logits, so that no router sits on an
    edge."""
    config = ModelConfig.from_dict(make_config(seed, **SIZES))
    model = make_model(config, make_weights(config, seed, feedback=0.05))
    if fmt is not PLAIN:
        mode, bits, group = fmt
        nn.quantize(
            model,
            group,
            bits,
            mode=mode,
            class_predicate=lambda path, module: (
                hasattr(module, "to_quantized")
                and is_quantizable(f"{path}.weight", module.weight.ndim)
                and "router" not in path
            ),
        )
    cpu.use(model)
    model.eval()
    return model


def settings(kind: str = "lora", keys=None, **more) -> TrainConfig:
    return TrainConfig(
        fine_tune_type=kind, lora_parameters=LoraParameters(rank=4, scale=2.0, keys=keys), **more
    )


def train_somehow(model: DiffusionGemma, size: float = 0.05) -> None:
    """Put random numbers into the adapters, as if they had been trained."""
    new = [
        (name, value + size * mx.random.normal(value.shape, key=mx.random.key(number)))
        for number, (name, value) in enumerate(sorted(tree_flatten(model.trainable_parameters())))
    ]
    model.load_weights(new, strict=False)


def logits(model: DiffusionGemma) -> np.ndarray:
    """Of a canvas behind a prefix, with self-conditioning. [C, V]"""
    ids = range(7, 27)
    _, prefix = encoded(model, ids)
    first = model.logits(decoded(model, ids, prefix))
    return np.array(model.logits(decoded(model, ids, prefix, model.soft_embeddings(first))))


def save(model: DiffusionGemma, folder, config: TrainConfig, keys, fingerprint: str) -> None:
    """What the training command writes."""
    from mlx_diffgemma.train.adapt import adapter_config, write_adapter_config

    content = adapter_config(config, model="base", data="data", keys=keys, fingerprint=fingerprint)
    write_adapter_config(folder, content)
    weights = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)

"""Drawn pictures and random vision towers, for tests."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_diffgemma.config import VisionConfig
from mlx_diffgemma.model.vision import Vision
from mlx_diffgemma.reading import Section

PLAIN = {
    "model_type": "gemma4_vision",
    "attention_bias": False,
    "head_dim": 12,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 1024,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"},
    "standardize": False,
    "use_clipped_linears": False,
}
CLIPPED = {
    **PLAIN,
    "head_dim": 16,
    "hidden_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "standardize": True,
    "use_clipped_linears": True,
}


def vision_config(raw: dict[str, Any]) -> VisionConfig:
    return VisionConfig.read(Section(raw), 280)


def make_vision_weights(
    config: VisionConfig, text_size: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random float32 weights of a tower and its projection, by their names in a checkpoint."""
    rng = np.random.default_rng([seed, 3])
    weights = {}
    for name, array in tree_flatten(Vision(config, text_size).parameters()):
        if "norm" in name or name.endswith("std_scale"):
            value = rng.uniform(0.3, 1.2, array.shape)
        elif name.endswith("std_bias"):
            value = rng.normal(0, 1.0, array.shape)
        elif name.endswith(("_min", "_max")):  # narrow enough to clip now and then
            value = np.array((-1 if name.endswith("_min") else 1) * rng.uniform(0.7, 1.5))
        else:
            value = rng.normal(0, 1.0 / np.sqrt(array.shape[-1]), array.shape)
        weights[f"model.encoder.{name}"] = value.astype(np.float32)
    return weights


def make_vision(config: VisionConfig, text_size: int, weights: dict[str, np.ndarray]) -> Vision:
    """Our tower with these weights, in float32."""
    vision = Vision(config, text_size)
    cut = len("model.encoder.")
    vision.load_weights([(name[cut:], mx.array(value)) for name, value in weights.items()])
    mx.eval(vision.parameters())
    vision.eval()
    return vision


def drawn(height: int, width: int, seed: int = 0) -> np.ndarray:
    """[height, width, 3] uint8 with areas, edges and noise."""
    rng = np.random.default_rng([seed, height, width])
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([np.sin(rows / 7 + c) + np.cos(columns / (5 + c)) for c in range(3)], -1)
    noise = rng.normal(0, 20, (height, width, 3))
    return np.clip(127 + 60 * waves + noise, 0, 255).astype(np.uint8)

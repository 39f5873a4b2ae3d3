"""Random small DiffusionGemma configs and weights, for the fixtures in `conftest.py`.

No size equals another where a mix-up could hide, and no parameter stays at a value (one, zero) at
which leaving it out would go unnoticed.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_diffgemma.config import FULL, SLIDING, ModelConfig
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 16,
    "head_dim": 16,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 16,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"},
}


def make_config(seed: int = 0, spelling: str = "release", **text: Any) -> dict[str, Any]:
    """A parsed `config.json`; `text` replaces entries of its text config.

    `spelling` says how the attention sizes of the full layers are written: "release" or
    "per_layer" (with zero-padded keys).
    """
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(3, 7))
    kinds = [SLIDING, *rng.choice([SLIDING, FULL], layers - 2).tolist(), FULL]
    kv_heads = int(rng.choice([1, 2, 4]))
    config = {
        "attention_bias": False,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "head_dim": int(rng.choice([6, 8, 10])),
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": int(rng.choice([36, 48, 56])),
        "intermediate_size": int(rng.choice([40, 64, 72])),
        "layer_types": kinds,
        "max_position_embeddings": 4096,
        "model_type": "diffusion_gemma_text",
        "moe_intermediate_size": int(rng.choice([12, 20, 28])),
        "num_attention_heads": 4,
        "num_experts": int(rng.integers(4, 9)),
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            FULL: {
                "partial_rotary_factor": 0.25,
                "rope_theta": 10000.0,
                "rope_type": "proportional",
            },
            SLIDING: {"rope_theta": 1000.0, "rope_type": "default"},
        },
        "sliding_window": int(rng.integers(9, 17)),
        "tie_word_embeddings": True,
        "top_k_experts": int(rng.integers(2, 4)),
        "use_bidirectional_attention": "vision",
        "vocab_size": int(rng.integers(96, 401)),
        "global_head_dim": int(rng.choice([16, 24])),
        "num_global_key_value_heads": 2 if kv_heads == 1 else 1,
        **text,
    }
    if spelling == "per_layer":
        sizes = {
            "head_dim": config.pop("global_head_dim"),
            "num_key_value_heads": config.pop("num_global_key_value_heads"),
        }
        config["per_layer_config"] = {
            f"{i:02d}": sizes for i, kind in enumerate(config["layer_types"]) if kind == FULL
        }
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "boi_token_id": None,
        "canvas_length": int(rng.integers(12, 25)),
        "eoi_token_id": None,
        "eos_token_id": [1, 5],
        "image_token_id": 6,
        "model_type": "diffusion_gemma",
        "text_config": config,
        "tie_word_embeddings": True,
        "vision_config": VISION,
    }


def make_weights(
    config: ModelConfig, seed: int = 0, gain: float = 1.0, feedback: float = 1.0
) -> dict[str, np.ndarray]:
    """Random float32 weights under our names; logits grow with `gain` and reach far beyond 3.

    `feedback` scales what self-conditioning adds. At 1 a rounding error grows about tenfold a
    denoising step (the soft embeddings of an uncertain model are small, and a norm blows them up);
    at 0.05 it dies out, as in a trained model, while the effect on the logits stays plain to see.
    """
    rng = np.random.default_rng([seed, 1])
    weights = {}
    for name, array in tree_flatten(DiffusionGemma(config).parameters()):
        if name.endswith("layer_scalar"):
            value = rng.uniform(0.5, 0.9, array.shape)
            if ".encoder." in name:
                value += 0.2
        elif "norm" in name or name.endswith("scale"):
            value = rng.uniform(0.3, 1.2, array.shape)
            if name.endswith("decoder.norm.weight"):
                value *= gain
        elif name.endswith("embed_tokens.weight"):
            value = rng.normal(0, 2.0 / np.sqrt(array.shape[-1]), array.shape)
        elif name.endswith("router.proj.weight"):
            value = rng.normal(0, 1.0, array.shape)
        else:
            value = rng.normal(0, 1.0 / np.sqrt(array.shape[-1]), array.shape)
            if name.endswith("self_conditioning.down_proj.weight"):
                value *= feedback
        weights[name] = value.astype(np.float32)
    return weights


def make_model(config: ModelConfig, weights: dict[str, np.ndarray]) -> DiffusionGemma:
    """Our model with these weights, in float32."""
    model = DiffusionGemma(config)
    model.load_weights([(name, mx.array(value)) for name, value in weights.items()], strict=True)
    mx.eval(model.parameters())
    return model

"""Shapes to measure without a download: built-in ones by name, or a local `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_diffgemma.checkpoint.locate import RELEASE
from mlx_diffgemma.config import FULL, SLIDING
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.reading import read_object

SMALL, TINY = "small-262k", "tiny"

_COMMON: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 262144,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
    },
    "vocab_size": 262144,
}

_TEXT: dict[str, dict[str, Any]] = {
    # The released model.
    RELEASE: {
        **_COMMON,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "layer_types": ([SLIDING] * 5 + [FULL]) * 5,
        "moe_intermediate_size": 704,
        "num_attention_heads": 16,
        "num_experts": 128,
        "num_global_key_value_heads": 2,
        "num_hidden_layers": 30,
        "num_key_value_heads": 8,
        "sliding_window": 1024,
        "top_k_experts": 8,
    },
    # The release's vocabulary and canvas with layers so small that a CPU can run them: the pass
    # over the vocabulary takes nearly all of a step.
    SMALL: {
        **_COMMON,
        "global_head_dim": 64,
        "head_dim": 32,
        "hidden_size": 256,
        "intermediate_size": 256,
        "layer_types": [SLIDING, FULL],
        "moe_intermediate_size": 64,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "sliding_window": 1024,
        "top_k_experts": 2,
    },
}
# Shapes to try a benchmark with. The words are so many that a pass over the vocabulary never holds
# all logits, and that they are two chunks.
_TEXT[TINY] = _TEXT[SMALL] | {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 8320}

PRESETS = tuple(_TEXT)


def config_like(name: str, layers: int | None = None) -> dict[str, Any]:
    """A parsed `config.json` with the shapes of `name`: a preset, or a local folder that holds one.

    Where `layers` is given, the model keeps that many: the first ones, except that the last is
    always the model's last, so that from two layers on both kinds of attention are in it.

    Raises:
        UsageError: `name` is neither a preset nor such a folder, or the model has fewer layers.
    """
    if name in _TEXT:
        config: dict[str, Any] = {
            "canvas_length": 256,
            "eos_token_id": [1, 106],
            "model_type": "diffusion_gemma",
            "text_config": _TEXT[name],
        }
    elif (Path(name).expanduser() / "config.json").exists():
        config = dict(read_object(Path(name).expanduser() / "config.json"))
        # The weights are made here, in a format of their own.
        config = {k: v for k, v in config.items() if not k.startswith("quantization")}
    else:
        raise UsageError(
            f"--like '{name}' is no folder with a config.json and no built-in name; these are "
            f"{', '.join(PRESETS)}."
        )
    return config if layers is None else _with_layers(config, layers)


def _with_layers(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    text = dict(config["text_config"])
    kinds = list(text["layer_types"])
    if not 1 <= layers <= len(kinds):
        raise UsageError(f"--layers must be between 1 and {len(kinds)}, not {layers}.")
    kept = [*range(layers - 1), len(kinds) - 1]
    text |= {"layer_types": [kinds[index] for index in kept], "num_hidden_layers": layers}
    overrides = {int(index): sizes for index, sizes in text.get("per_layer_config", {}).items()}
    if overrides:
        text["per_layer_config"] = {
            str(place): overrides[index] for place, index in enumerate(kept) if index in overrides
        }
    return {**config, "text_config": text}

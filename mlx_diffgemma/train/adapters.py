"""The folder that training writes, in mlx-lm's format: `adapter_config.json` for the weights that
the loop saves as `adapters.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_diffgemma.checkpoint.adapters import CONFIG
from mlx_diffgemma.train.config import TrainConfig


def adapter_config(
    config: TrainConfig, *, model: str, data: str, keys: Sequence[str], fingerprint: str
) -> dict[str, Any]:
    """The content of `adapter_config.json`: every setting of the run under mlx-lm's name, and what
    tells the base from others."""
    settings = asdict(config)
    lora = dict(settings.pop("lora_parameters"))
    lora["keys"] = list(keys)
    return {
        **settings,
        "optimizer_config": dict(config.optimizer_config),
        "lora_parameters": None if config.fine_tune_type == "full" else lora,
        "model": model,
        "data": data,
        "fingerprint": fingerprint,
    }


def write_adapter_config(folder: Path, content: Mapping[str, Any]) -> None:
    """Write it, so that the file is the old or the new one whatever happens."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{CONFIG}.part"
    partial.write_text(json.dumps(dict(sorted(content.items())), indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / CONFIG)

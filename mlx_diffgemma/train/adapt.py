"""What of a model is trained: adapters on chosen modules, or the weights themselves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_diffgemma.checkpoint.adapters import (
    ADAPTABLE,
    CONFIG,
    add_adapters,
    modules_of_keys,
)
from mlx_diffgemma.checkpoint.names import module_class
from mlx_diffgemma.checkpoint.quantization import selects
from mlx_diffgemma.disk import write_atomically
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.train.config import TrainConfig

DEFAULT_TARGETS = ("attention", "mlp")
"""Modules that are trained where none are named: attention and the dense MLP of every layer, but
not the MLP of the self-conditioning."""

FROZEN = "router"
_NO_ADAPTER = (FROZEN, "embedding")
_LAYERS = "model.decoder.layers."


def prepare(model: DiffusionGemma, config: TrainConfig) -> tuple[str, ...]:
    """Freeze `model` but for what `config` asks to train, and put it into training mode.

    LoRA (https://arxiv.org/abs/2106.09685) and DoRA (https://arxiv.org/abs/2402.09353) leave the
    base frozen, quantized or not; "full" trains the weights of the chosen modules or layers, or,
    with `num_layers` -1 and no keys, every weight. The router is always frozen. MLX's global
    random state is set from `config.seed`.

    Returns:
        For adapters, the keys of mlx-lm's `lora_parameters` that name the chosen modules.

    Raises:
        UsageError: a key matches nothing, the model has fewer layers than `num_layers`, or the
            weights to train are quantized.
    """
    mx.random.seed(config.seed)
    keys = config.lora_parameters.keys
    model.freeze()
    if config.fine_tune_type == "full":
        _unfreeze(model, config.num_layers, keys)
        model.train()
        return ()
    paths = target_modules(model, keys or DEFAULT_TARGETS, config.num_layers)
    named = keys_of_modules(model, paths, config.num_layers)
    lora = config.lora_parameters
    add_adapters(
        model,
        paths,
        rank=lora.rank,
        scale=lora.scale,
        dropout=lora.dropout,
        dora=config.fine_tune_type == "dora",
    )
    model.train()
    return named


def target_modules(
    model: DiffusionGemma, selectors: Sequence[str], num_layers: int = -1
) -> list[str]:
    """The modules that take an adapter: those in the last `num_layers` layers (-1 for all), or in
    no layer, that any of the selectors names. Selectors are written as for the converter's `--set`.

    Raises:
        UsageError: a selector matches nothing, or only what stays frozen; the model has fewer
            layers than `num_layers`.
    """
    kinds = (*ADAPTABLE, nn.Embedding, nn.QuantizedEmbedding)
    known = [path for path, module in model.named_modules() if isinstance(module, kinds)]
    return chosen_paths(known, selectors, num_layers, len(model.layers))


def chosen_paths(
    known: Iterable[str], selectors: Sequence[str], num_layers: int, total: int
) -> list[str]:
    """The paths that `target_modules` chooses in a model of `total` layers whose matrices have the
    paths `known`.

    Raises:
        UsageError: as for `target_modules`.
    """
    first = _first_layer(num_layers, total)
    within = tuple(f"{_LAYERS}{index}." for index in range(first, total))
    paths = [p for p in known if p.startswith(within) or not p.startswith(_LAYERS)]
    chosen: set[str] = set()
    for selector in selectors:
        found = [path for path in paths if selects(selector, path, total)]
        trained = [p for p in found if module_class(p) not in _NO_ADAPTER]
        if not trained:
            raise UsageError(f"target '{selector}' {_why_not(found)}")
        chosen.update(trained)
    return [path for path in paths if path in chosen]


def keys_of_modules(
    model: DiffusionGemma, paths: Iterable[str], num_layers: int
) -> tuple[str, ...]:
    """The `keys` of mlx-lm's `lora_parameters` that name the modules at `paths`.

    Modules of layers are named by their paths within a layer, and the others by their paths from
    the top. Where the paths within a layer would name other modules too, all are named from the
    top.
    """
    wanted = set(paths)
    inside = (path.removeprefix(_LAYERS) for path in wanted if path.startswith(_LAYERS))
    short = sorted({path.partition(".")[2] for path in inside})
    named = set(modules_of_keys(model, short, num_layers))
    return (*short, *sorted(wanted - named)) if named <= wanted else tuple(sorted(wanted))


def trainable_count(model: nn.Module) -> int:
    """How many numbers the trainable parameters of `model` hold."""
    return sum(array.size for _, array in tree_flatten(model.trainable_parameters()))


def _why_not(found: list[str]) -> str:
    if any(module_class(path) == FROZEN for path in found):
        return "names the router, which stays frozen; leave it out."
    if found:
        return "cannot take an adapter: it is also the head; train it with --fine-tune-type full."
    return (
        "matches no module; known are attention, mlp, experts, self_conditioning, one of their "
        "projections (attention.q_proj), layers[-4:].mlp, or a path with *."
    )


def _first_layer(num_layers: int, total: int) -> int:
    if num_layers > total:
        raise UsageError(f"num_layers is {num_layers}, and the model has {total}; -1 takes all.")
    return 0 if num_layers < 0 else total - num_layers


def _unfreeze(model: DiffusionGemma, num_layers: int, keys: Sequence[str] | None) -> None:
    if any(hasattr(module, "bits") for module in model.modules()):
        raise UsageError(
            "full fine-tuning needs unquantized weights; train adapters (--fine-tune-type lora), "
            "or load the original."
        )
    first = _first_layer(num_layers, len(model.layers))
    if keys:
        for path in target_modules(model, keys, num_layers):
            dict(model.named_modules())[path].unfreeze()
    elif num_layers == -1:
        model.unfreeze()
    else:
        for layer in model.layers[first:]:
            layer.unfreeze()
    for layer in model.layers:
        layer.router.freeze()


def adapter_config(
    config: TrainConfig, *, model: str, data: str, keys: Sequence[str], fingerprint: str
) -> dict[str, Any]:
    """The content of `adapter_config.json`: every setting of the run under mlx-lm's name, and the
    fingerprint that tells the base from other models."""
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
    """Write `adapter_config.json`, which mlx-lm reads too."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(sorted(content.items())), indent=2) + "\n"
    write_atomically(folder / CONFIG, text.encode())

"""Adapters in mlx-lm's format, put onto a model: `adapter_config.json` and `adapters.safetensors`.

The layers are those of `mlx_lm.tuner`, which pass a gradient through quantized weights. Letters:
I input, O output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.reading import is_there, os_reason, read_object, shown

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
ADAPTABLE = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
"""Layers that can take an adapter. The embedding cannot: it is also the head and the table of the
self-conditioning."""

_LEAVES = ("lora_a", "lora_b", "m")
_SMALL = 2.0**-10  # below it fp16 and bf16 may store a weight differently


def load_adapters(
    model: DiffusionGemma, adapter_path: str | Path, *, base: str | None = None
) -> None:
    """Put adapters onto `model`, which is then ready to run. `base` is its fingerprint, if known.

    Raises:
        UsageError: `adapter_path` is no path.
        CheckpointError: the folder has no adapters, or they are damaged or of another base.
    """
    if not isinstance(adapter_path, (str, Path)):
        raise UsageError(f"adapter_path must be a folder, not {shown(adapter_path)}.")
    folder = Path(adapter_path).expanduser()
    config = read_adapter_config(folder)
    trained_on = config.get("fingerprint")
    if trained_on is not None and not same_base(str(trained_on), base or fingerprint(model)):
        raise CheckpointError(
            f"{folder}: these adapters are of another base model "
            f"({config.get('model') or 'not named'}); load that one, or train new ones."
        )
    if config.get("fine_tune_type", "lora") != "full":
        _add_layers(model, config, folder)
    weights = _read_weights(folder / WEIGHTS)
    _require_slots(model, weights, config, folder)
    mx.eval(weights)  # what another thread finds unevaluated belongs to a stream that it lacks
    model.load_weights(list(weights.items()), strict=False)
    model.adapted = True
    model.adaptations += 1
    model.eval()


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The content of `adapter_config.json`, in a folder that holds the weights as well.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if is_there(folder / "adapter_model.safetensors") and not is_there(folder / WEIGHTS):
        raise CheckpointError(
            f"{folder} holds adapters in the form of PEFT, which this program does not read; train "
            "them with `mlx-diffgemma train`."
        )
    for file in (CONFIG, WEIGHTS):
        if not is_there(folder / file):
            raise CheckpointError(f"{folder} has no {file}; name the folder that training wrote.")
    return read_object(folder / CONFIG, mend="copy it again")


def add_adapters(
    model: nn.Module,
    paths: Iterable[str],
    *,
    rank: int,
    scale: float,
    dropout: float = 0.0,
    dora: bool = False,
) -> None:
    """Put a LoRA or DoRA layer in the place of each module in `paths`, which it keeps inside.

    As long as the B of such a layer is zero, the layer computes what the module computes.

    Raises:
        UsageError: a module cannot take such an adapter.
    """
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

    modules = dict(model.named_modules())
    replaced = []
    for path in paths:
        layer = modules[path]
        settings = {"r": rank, "dropout": dropout, "scale": scale}
        if isinstance(layer, (SwitchLinear, QuantizedSwitchLinear)):
            if dora:
                raise UsageError(f"{path}: experts take no DoRA; use LoRA or leave them out.")
            adapter = LoRASwitchLinear.from_base(layer, **settings)
        elif isinstance(layer, (nn.Linear, nn.QuantizedLinear)):
            # mlx-lm's DoRA takes a wrong width where 32 is no multiple of the bits.
            adapter = (DoRALinear if dora else LoRALinear)(*widths(layer), **settings)
            if dora:
                adapter.set_linear(layer)
            else:
                adapter.linear = layer
        else:
            raise UsageError(f"{path} cannot take an adapter; it is no matrix.")
        replaced.append((path, adapter))
    model.update_modules(tree_unflatten(replaced))


def widths(layer: nn.Module) -> tuple[int, int]:
    """I and O of a linear layer, quantized or not."""
    outputs, inputs = layer.weight.shape
    if isinstance(layer, nn.QuantizedLinear):
        inputs = inputs * 32 // layer.bits
    return inputs, outputs


def adapted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The LoRA and DoRA layers of a model, by path."""
    return {path: module for path, module in model.named_modules() if "lora_a" in module}


def fingerprint(model: DiffusionGemma, *, release: bool = False) -> str:
    """A text that tells the base of adapters from others: three short hashes, `norms-formats-rows`.

    Norms and scalars are stored alike in every format, so the first is the same for a model in 4
    and in 16 bits, and an adapter may go from one to the other. The last is of one row of every
    matrix, as packed: it tells a model from one fine-tuned from it, if both are in one format.
    `release` lets go of every weight once it is read: a model that was loaded lazily is then never
    in memory as a whole, and is of no use afterwards.
    """
    norms, formats, rows = sha256(), sha256(), sha256()
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name in sorted(parameters):
        array = parameters.pop(name)
        if array.ndim < 2:
            norms.update(name.encode() + _content(array))
        elif name.endswith(".weight"):
            rows.update(name.encode() + _content(array[(0,) * (array.ndim - 1)]))
        if release:
            model.update(tree_unflatten([(name, mx.zeros(()))]))
    for path, module in sorted(model.named_modules()):
        if hasattr(module, "bits"):
            formats.update(f"{path} {module.mode} {module.bits} {module.group_size}\n".encode())
    return "-".join(digest.hexdigest()[:16] for digest in (norms, formats, rows))


def same_base(trained_on: str, found: str) -> bool:
    """Whether adapters trained on a base of one fingerprint fit a model of the other."""
    theirs, ours = trained_on.split("-"), found.split("-")
    if len(theirs) != 3 or theirs[0] != ours[0]:
        return False
    return theirs[1] != ours[1] or theirs[2] == ours[2]


def _content(array: mx.array) -> bytes:
    """Bytes that do not depend on the float type in which the weights were loaded."""
    if mx.issubdtype(array.dtype, mx.floating):
        array = array.astype(mx.bfloat16)
        array = mx.where(mx.abs(array) < _SMALL, mx.zeros_like(array), array).view(mx.uint16)
    return np.array(array).tobytes()


def _add_layers(model: DiffusionGemma, config: Mapping[str, Any], folder: Path) -> None:
    parameters = config.get("lora_parameters")
    try:
        assert isinstance(parameters, Mapping)
        settings: dict[str, Any] = {
            "rank": int(parameters["rank"]),
            "scale": float(parameters["scale"]),
            "dropout": float(parameters.get("dropout", 0.0)),
        }
        count = int(config["num_layers"])
        keys = parameters.get("keys")
        keys = None if keys is None else [str(key) for key in keys]
        assert settings["rank"] > 0 and isfinite(settings["scale"])
        assert 0 <= settings["dropout"] < 1
    except (AssertionError, KeyError, TypeError, ValueError, OverflowError):
        raise CheckpointError(
            f"{folder / CONFIG}: num_layers and lora_parameters (rank, scale, dropout, keys) are "
            "not as mlx-lm writes them; train again, or mend the file."
        ) from None
    paths = modules_of_keys(model, keys, count)
    if not paths:
        raise CheckpointError(
            f"{folder / CONFIG}: its keys name no module of this model; they are of another."
        )
    add_adapters(model, paths, **settings, dora=config.get("fine_tune_type") == "dora")


def modules_of_keys(model: DiffusionGemma, keys: list[str] | None, num_layers: int) -> list[str]:
    """The modules that mlx-lm's `keys` name: paths within each of the last `num_layers` layers
    (-1 for all), or paths from the top; None for all in these layers."""
    layers = layer_prefixes(model, num_layers)
    paths = [path for path, module in model.named_modules() if isinstance(module, ADAPTABLE)]
    wanted = {prefix + key for prefix in layers for key in keys or ()} | set(keys or ())
    if keys is None:
        return [path for path in paths if path.startswith(tuple(layers))]
    return [path for path in paths if path in wanted]


def layer_prefixes(model: DiffusionGemma, num_layers: int) -> list[str]:
    """How the paths of the modules of the last `num_layers` layers begin; -1 for all layers."""
    total = len(model.layers)
    first = 0 if num_layers < 0 else max(0, total - num_layers)
    return [f"model.decoder.layers.{index}." for index in range(first, total)]


def _read_weights(path: Path) -> dict[str, mx.array]:
    try:
        return dict(mx.load(str(path)))  # type: ignore[arg-type]
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({os_reason(error)}); copy it again.") from None


def _require_slots(
    model: nn.Module, weights: Mapping[str, mx.array], config: Mapping[str, Any], folder: Path
) -> None:
    """Every adapter must be stored, in its shape, and nothing else.

    Raises:
        CheckpointError: naming the first that is missing, wrong or extra.
    """
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    full = config.get("fine_tune_type") == "full"
    slots = {n: p for n, p in parameters.items() if full or n.rpartition(".")[2] in _LEAVES}
    what = f"adapters and {CONFIG} do not belong together"
    for name, array in weights.items():
        if name not in slots:
            raise CheckpointError(f"{folder}: {name} has no place in the model; {what}.")
        if array.shape != slots[name].shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(array.shape)} instead of "
                f"{list(slots[name].shape)}; {what}."
            )
    missing = next((name for name in slots if name not in weights and not full), None)
    if missing is not None:
        raise CheckpointError(f"{folder}: {missing} is missing; {what}.")

"""The safetensors files of a checkpoint, read by their headers; the tensors stay on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mlx_diffgemma.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_AGAIN = "fetch the file again"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what its header says of it."""

    name: str
    shard: Path
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path) -> Any:
    """A JSON file of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; name the folder of a whole checkpoint."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); {_AGAIN}.") from None


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder`, by name.

    Raises:
        CheckpointError: a shard is missing, truncated or damaged, or index and shards disagree.
    """
    index = folder / INDEX
    weight_map = _weight_map(index) if index.exists() else None
    if weight_map is None:
        shards = sorted(folder.glob("model*.safetensors"))
        if not shards:
            raise CheckpointError(f"{folder} holds no model*.safetensors; {_AGAIN}s.")
    else:
        shards = [folder / name for name in sorted(set(weight_map.values()))]
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in _header(shard):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{tensor.name} is both in {tensors[tensor.name].shard.name} and in "
                    f"{shard.name}; delete the stale shard."
                )
            tensors[tensor.name] = tensor
    if weight_map is not None:
        _require_listed(weight_map, tensors, index)
    return tensors


def _weight_map(index: Path) -> Mapping[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; {_AGAIN}.")
    return weight_map


def _header(shard: Path) -> list[StoredTensor]:
    try:
        with safe_open(shard, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return [
                StoredTensor(name, shard, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            ]
    except FileNotFoundError:
        raise CheckpointError(f"shard {shard} is missing; {_AGAIN}.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"shard {shard} is truncated or damaged ({error}); {_AGAIN}."
        ) from None


def _require_listed(
    weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor], index: Path
) -> None:
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].shard.name != shard:
            where = f"is in {tensors[name].shard.name}" if name in tensors else "is in no shard"
            raise CheckpointError(
                f"{index.name} says that {name} is in {shard}, but it {where}; fetch both again."
            )
    unlisted = next((name for name in tensors if name not in weight_map), None)
    if unlisted is not None:
        raise CheckpointError(
            f"{tensors[unlisted].shard.name} holds {unlisted}, which {index.name} does not list; "
            "fetch both again."
        )

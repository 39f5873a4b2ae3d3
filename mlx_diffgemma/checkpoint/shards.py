"""The safetensors files of a checkpoint, read by their headers; the tensors stay on disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.reading import AGAIN, is_there, kind_of, os_reason, read_object, shown

INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[\w.+-][\w.+ -]*\.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """The file of a tensor, and what its header says; `dtype` is "BF16", "U32" and the like."""

    name: str
    shard: Path
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder`, by name.

    Raises:
        CheckpointError: a shard is missing, truncated or damaged, or index and shards disagree.
    """
    index = folder / INDEX
    weight_map = _weight_map(index) if is_there(index) else None
    if weight_map is None:
        shards = sorted(folder.glob("model*.safetensors"))
        if not shards:
            raise CheckpointError(f"{folder} holds no model*.safetensors; fetch the files again.")
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
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map of tensors and files; {AGAIN}.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            what = shown(shard) if isinstance(shard, str) else kind_of(shard)
            raise CheckpointError(
                f"{index}: 'weight_map' names {what} as the file of {shown(name)}, which is no "
                f"name of a safetensors file; {AGAIN}."
            )
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
        raise CheckpointError(f"shard {shard} is missing; {AGAIN}.") from None
    except (SafetensorError, OSError) as error:
        if shard.is_dir():
            raise CheckpointError(
                f"shard {shard} is a folder, where a file is needed; {AGAIN}."
            ) from None
        raise CheckpointError(
            f"shard {shard} cannot be read, or is truncated or damaged ({os_reason(error)}); "
            f"{AGAIN}."
        ) from None


def _require_listed(
    weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor], index: Path
) -> None:
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].shard.name != shard:
            where = f"is in {tensors[name].shard.name}" if name in tensors else "is in no shard"
            raise CheckpointError(
                f"{index.name} says that {_spelt(name)} is in {shard}, but it {where}; "
                "fetch both again."
            )
    unlisted = next((name for name in tensors if name not in weight_map), None)
    if unlisted is not None:
        raise CheckpointError(
            f"{tensors[unlisted].shard.name} holds {unlisted}, which {index.name} does not list; "
            "fetch both again."
        )


def _spelt(name: str) -> str:
    """The name of a tensor for a message."""
    return name if name.isprintable() and len(name) < 200 else shown(name)

"""Checks that a converted checkpoint is as it was written, complete, finite, and close to its
source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mlx_diffgemma.checkpoint.names import (
    canonical_name,
    expected_shapes,
    is_vision,
    module_path,
    vision_shapes,
)
from mlx_diffgemma.checkpoint.quantization import Recipe, formats_from_config
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.reading import read_object
from mlx_diffgemma_convert.pack import (
    MX_DTYPES,
    Block,
    Loss,
    blocks,
    check_finite,
    compare,
    pack,
    to_mx,
)
from mlx_diffgemma_convert.plan import Stored, Target, make_plan
from mlx_diffgemma_convert.record import read_record
from mlx_diffgemma_convert.repository import file_digest
from mlx_diffgemma_convert.source import (
    FolderSource,
    ShardReader,
    Source,
    SourceTensor,
    read_header,
)
from mlx_diffgemma_convert.stream import read_block

_CHUNK = 1 << 23


@dataclass(frozen=True)
class Verified:
    """How much was checked: files, tensors, and bytes of the weights."""

    files: int
    tensors: int
    nbytes: int


def verify(folder: Path) -> Verified:
    """Check everything that can be checked without the source: that each file is as it was written,
    that every tensor is there in its shape and holds no NaN or infinity.

    Raises:
        CheckpointError: a file or a tensor, which the message names, is not so.
    """
    record = read_record(folder)
    for name, digest in record["files"].items():
        _exists(folder / name)
        if file_digest(folder / name) != digest:
            raise _changed(folder / name)
    tensors: dict[str, SourceTensor] = {}
    for name, entry in record["weights"].items():
        tensors |= _check_shard(folder / name, entry)
    extra = {path.name for path in folder.glob("model*.safetensors")} - set(record["weights"])
    if extra:
        raise CheckpointError(
            f"{folder / min(extra)} is not of this conversion; delete it, loaders would read it."
        )
    _check_complete(folder, tensors)
    size = sum(entry["size"] for entry in record["weights"].values())
    return Verified(len(record["files"]) + len(record["weights"]) + 1, len(tensors), size)


def _check_shard(path: Path, entry: Mapping[str, Any]) -> dict[str, SourceTensor]:
    """Read a file once, and check its checksum and that its numbers are finite. Returns its
    tensors."""
    _exists(path)
    if path.stat().st_size != entry["size"]:
        raise CheckpointError(
            f"{path} has {path.stat().st_size:,} bytes, not {entry['size']:,} as written; fetch or "
            "convert it again."
        )
    try:
        tensors = read_header(path)
    except CheckpointError:
        raise _changed(path) from None
    with path.open("rb", buffering=0) as file:
        header = file.read(8)
        digest = sha256(header + file.read(int.from_bytes(header, "little")))
        broken = None
        for tensor in sorted(tensors.values(), key=lambda t: t.start):
            left = tensor.nbytes
            while left:
                chunk = np.frombuffer(file.read(min(left, _CHUNK)), np.uint8)
                digest.update(chunk.data)
                left -= chunk.size
                try:
                    check_finite(chunk, tensor.dtype, tensor.name)
                except CheckpointError as error:
                    broken = broken or error
    if digest.hexdigest() != entry["sha256"]:
        raise _changed(path)
    if broken is not None:
        raise broken
    return tensors


def _check_complete(folder: Path, tensors: Mapping[str, SourceTensor]) -> None:
    config = ModelConfig.from_dict(read_object(folder / "config.json"))
    shapes = {canonical_name(t.name) or t.name: t.shape for t in tensors.values()}
    formats = formats_from_config(config, shapes)
    expected = expected_shapes(config)
    if config.vision is not None and any(map(is_vision, shapes)):
        expected |= vision_shapes(config.vision, config.text.hidden_size)
    for name, shape in expected.items():
        fmt = formats.get(module_path(name))
        parts: Iterable[Stored] = [Stored(name, "BF16", shape)]
        if fmt is not None and name.endswith(".weight"):
            parts = Target(name, shape, fmt, "BF16", {}).stored()
        for part in parts:
            if part.name not in shapes:
                raise CheckpointError(f"tensor {part.name} is missing in {folder}; convert again.")
            if shapes[part.name] != part.shape:
                raise CheckpointError(
                    f"tensor {part.name} in {folder} has shape {list(shapes[part.name])}, not "
                    f"{list(part.shape)}; convert again."
                )


def compare_with_source(folder: Path, source: Source) -> Loss:
    """Compare every weight with the source: quantized ones come back within what their format
    allows, the others are equal to the bit (after the change of type that was asked for).

    Raises:
        CheckpointError: a tensor, which the message names, differs by more than that.
    """
    record = read_record(folder)
    plan = make_plan(
        source,
        Recipe.of(record["recipe"], record["rules"]),
        dtype=record["dtype"],
        dequantize="quantization" in source.config,
        hugging_face=record["layout"] == "hugging_face",
        shard_size=record["shard_size"],
        vision=record.get("vision", True),
    )
    result = FolderSource(folder)
    total = Loss()
    with ShardReader(source) as before, ShardReader(result) as after:
        for target in plan.targets:
            if target.format.quantized:
                total.add(_compare_quantized(target, result, before, after))
            else:
                _compare_plain(target, plan.hugging_face, result, before, after)
    return total


def _compare_quantized(
    target: Target, result: FolderSource, before: ShardReader, after: ShardReader
) -> Loss:
    loss = Loss()
    source = target.parts["weight"][0].tensor
    for block in blocks(target):
        raw = read_block(block, before, {})["weight"]
        weight = to_mx(raw, source.dtype, target.columns).astype(MX_DTYPES[target.dtype])
        arrays = tuple(
            to_mx(_rows(result.tensors[s.name], block, after), s.dtype, s.shape[-1])
            for s in target.stored()
        )
        loss.add(compare(weight, arrays, target.format, target.name))
    return loss


def _compare_plain(
    target: Target,
    hugging_face: bool,
    result: FolderSource,
    before: ShardReader,
    after: ShardReader,
) -> None:
    (stored,) = target.stored(hugging_face)
    for block in blocks(target):
        expected = pack(block, read_block(block, before, {})).parts["weight"]
        if not np.array_equal(expected, _rows(result.tensors[stored.name], block, after)):
            raise CheckpointError(f"tensor {stored.name} differs from the source; convert again.")


def _rows(tensor: SourceTensor, block: Block, reader: ShardReader) -> np.ndarray:
    out = np.empty((block.stop - block.start) * tensor.row_bytes, np.uint8)
    reader.read(tensor, block.start, out)
    return out


def _exists(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; fetch or convert it again.")


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is not as it was written (its checksum differs); fetch or convert it again."
    )

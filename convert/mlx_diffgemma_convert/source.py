"""Where the weights come from: the headers of safetensors files, and bytes read from them.

Nothing is mapped into memory: rows are read into a buffer of the caller's, so that only the rows
that are worked on are in memory.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlx_diffgemma.checkpoint.names import canonical_name, module_path
from mlx_diffgemma.checkpoint.shards import stored_tensors
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.reading import is_there, os_reason, read_object

GENERATION = "generation_config.json"
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1, "I8": 1, "I32": 4, "I64": 8,
    "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class SourceTensor:
    """A tensor as the header of its shard describes it; `start` counts from the first data byte."""

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1]) if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.columns * ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


class Source(Protocol):
    """A checkpoint to convert, in a folder or (partly) still on the hub."""

    name: str
    revision: str | None
    config: Mapping[str, Any]

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor, by its name in the source."""

    def shard_path(self, shard: str) -> Path:
        """The shard as a file, fetched if need be."""

    def release(self, shard: str) -> None:
        """Note that the shard is not needed again."""

    def identities(self) -> dict[str, Any]:
        """Size and time of change of the shards that may change during a conversion, by name."""

    def room_needed(self, shards: Collection[str]) -> list[tuple[Path, int]]:
        """The folders that reading `shards` downloads to, each with a number of bytes."""

    def card(self) -> Path | None:
        """The checkpoint's README, or None."""

    def side_files(self) -> Mapping[str, Path]:
        """Everything but weights, index and config that belongs to the checkpoint, by name."""


class FolderSource:
    """A checkpoint in a folder."""

    def __init__(self, folder: Path, name: str | None = None, revision: str | None = None) -> None:
        self.folder = folder
        self.name = name or str(folder)
        self.revision = revision
        self.config: Mapping[str, Any] = read_object(folder / "config.json")
        if is_there(folder / GENERATION):
            read_object(folder / GENERATION)  # what is no file is no side file either
        self.tensors: dict[str, SourceTensor] = {}
        for shard in sorted({t.shard for t in stored_tensors(folder).values()}):
            self.tensors |= read_header(shard)

    def shard_path(self, shard: str) -> Path:
        return self.folder / shard

    def release(self, shard: str) -> None:
        """Do nothing: a file of the user stays where it is."""

    def identities(self) -> dict[str, Any]:
        """Size and time of change of each shard."""
        stats = {s: self.shard_path(s).stat() for s in {t.shard for t in self.tensors.values()}}
        return {shard: [stat.st_size, stat.st_mtime_ns] for shard, stat in stats.items()}

    def room_needed(self, shards: Collection[str]) -> list[tuple[Path, int]]:
        """An empty list: a folder needs no downloads."""
        return []

    def card(self) -> Path | None:
        path = self.folder / "README.md"
        return path if path.is_file() else None

    def side_files(self) -> Mapping[str, Path]:
        names = sorted(path.name for path in self.folder.iterdir() if path.is_file())
        return {name: self.folder / name for name in names if is_side_file(name)}


_SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model")
_OURS = ("config.json", "conversion.json")


def is_side_file(name: str) -> bool:
    """Whether a file of a repository is copied as it is: tokenizer, template, generation and
    processor settings, license."""
    if name in _OURS or name.endswith(".index.json") or "/" in name or name.startswith("."):
        return False
    return name.endswith(_SIDE_SUFFIXES) or name.upper().startswith(("LICENSE", "NOTICE"))


def read_header(path: Path) -> dict[str, SourceTensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: the file is damaged or truncated, or holds a type that is not known.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size - 8 - length
            header = json.loads(file.read(length)) if size >= 0 else {}
        header.pop("__metadata__", None)
        tensors = {
            name: SourceTensor(name, path.name, e["dtype"], tuple(e["shape"]), e["data_offsets"][0])
            for name, e in header.items()
        }
        ends = {name: entry["data_offsets"][1] for name, entry in header.items()}
    except OSError as error:
        raise CheckpointError(
            f"shard {path} cannot be read ({os_reason(error)}); check the path."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(
            f"shard {path} has a damaged header ({error!r}); fetch the file again."
        ) from None
    for name, tensor in tensors.items():
        if tensor.dtype not in ITEM_BYTES:
            raise CheckpointError(
                f"tensor {name} in {path.name} is of type {tensor.dtype}; convert from weights in "
                "bf16, fp16 or fp32."
            )
        if ends[name] > size or tensor.start + tensor.nbytes != ends[name]:
            raise CheckpointError(f"shard {path} is truncated at {name}; fetch the file again.")
    if size < 0:
        raise CheckpointError(f"shard {path} is truncated; fetch the file again.")
    return tensors


class OverlaidSource(FolderSource):
    """`folder`, with the modules that `files` (safetensors, MLX names) hold in place of its own.

    A module stays quantized only if its scales are in `files` too.
    """

    def __init__(self, folder: Path, files: Sequence[Path], name: str) -> None:
        super().__init__(folder, name)
        self._files = {path.name: path for path in files}
        added: dict[str, SourceTensor] = {}
        for path in files:
            added |= read_header(path)
        replaced = {module_path(name) for name in added}
        kept = {
            name: tensor
            for name, tensor in self.tensors.items()
            if module_path(canonical_name(name) or name) not in replaced
        }
        self.tensors = kept | added
        plain = {path: False for path in replaced if f"{path}.scales" not in added}
        for key in ("quantization", "quantization_config"):
            if self.config.get(key):
                self.config = {**self.config, key: {**self.config[key], **plain}}

    def shard_path(self, shard: str) -> Path:
        return self._files.get(shard) or super().shard_path(shard)


class ShardReader:
    """Rows of tensors, read from the shards of a source that are open at the moment."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._files: dict[str, tuple[io.FileIO, int]] = {}

    def read(self, tensor: SourceTensor, row: int, out: np.ndarray) -> None:
        """Fill `out` (bytes) with rows of `tensor` from `row` on.

        Raises:
            CheckpointError: the file ends before the rows do.
        """
        file, data = self._open(tensor.shard)
        file.seek(data + tensor.start + row * tensor.row_bytes)
        view = out.data.cast("B")
        while view.nbytes:
            count = file.readinto(view)
            if not count:
                raise CheckpointError(
                    f"shard {tensor.shard} ends within {tensor.name}; fetch the file again."
                )
            view = view[count:]

    def _open(self, shard: str) -> tuple[io.FileIO, int]:
        if shard not in self._files:
            file = io.FileIO(self._source.shard_path(shard))
            self._files[shard] = file, 8 + int.from_bytes(file.read(8), "little")
        return self._files[shard]

    def close(self, shard: str | None = None) -> None:
        """Close one shard, or all where it is None."""
        for name in [shard] if shard is not None else list(self._files):
            opened = self._files.pop(name, None)
            if opened is not None:
                opened[0].close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tensors_digest(source: Source) -> str:
    """A checksum of the names, types, shapes and places that the headers give."""
    described = [
        [t.name, t.shard, t.dtype, list(t.shape), t.start] for t in source.tensors.values()
    ]
    return sha256(json.dumps(sorted(described)).encode()).hexdigest()

"""A safetensors file written from front to back, its checksum taken on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import numpy as np

from mlx_diffgemma import disk
from mlx_diffgemma_convert.plan import Stored


def header_bytes(tensors: Iterable[Stored], kind: str) -> bytes:
    """The bytes of the length and the header of a file that holds `tensors` one after the other;
    `kind` is its "format" ("mlx" or "pt")."""
    header: dict[str, object] = {"__metadata__": {"format": kind}}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardFile:
    """Writes to a file named `path` with `.part` behind it, which gets the name `path` when all of
    it is on the disk."""

    def __init__(self, path: Path, tensors: Iterable[Stored], kind: str, keep: int = 0) -> None:
        """Begin a file; `keep` bytes of an earlier `.part` are taken over."""
        self._path = path
        self._partial = path.with_name(f"{path.name}.part")
        self._hash = sha256()
        self.size = 0
        if keep and self._partial.exists() and self._partial.stat().st_size >= keep:
            self._file = self._partial.open("r+b", buffering=0)
            self._take_over(keep)
        else:
            self._file = self._partial.open("wb", buffering=0)
            self.write(np.frombuffer(header_bytes(tensors, kind), np.uint8))

    def _take_over(self, keep: int) -> None:
        while self.size < keep:
            chunk = self._file.read(min(1 << 22, keep - self.size))
            self._hash.update(chunk)
            self.size += len(chunk)
        self._file.truncate(keep)

    @property
    def resumed(self) -> bool:
        return self._file.mode == "rb+"

    def write(self, data: np.ndarray) -> None:
        view = data.data.cast("B")
        self._hash.update(view)
        self.size += view.nbytes
        while view.nbytes:
            view = view[self._file.write(view) :]

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        os.fsync(self._file.fileno())

    def finish(self) -> str:
        """Put the file in place. Returns its sha256."""
        self.sync()
        self._file.close()
        disk.put_in_place(self._partial, self._path)
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()

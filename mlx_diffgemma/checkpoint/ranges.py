"""Parts of stored tensors, read from safetensors files by ranges of bytes.

Nothing is mapped into memory and nothing else is read, so that a process which holds a part of a
model reads that part alone.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_diffgemma.checkpoint.shards import StoredTensor
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.reading import AGAIN, os_reason

GAP = 4096
"""Bytes between two wanted runs that are read with them: a disk reads whole blocks anyway."""

_MOST = 64 << 20  # bytes of one read, and of a buffer for runs with gaps
_TYPES: dict[str, tuple[type[np.generic], mx.Dtype]] = {
    "BF16": (np.uint16, mx.bfloat16),
    "F16": (np.float16, mx.float16),
    "F32": (np.float32, mx.float32),
    "F64": (np.float64, mx.float32),
    "U32": (np.uint32, mx.uint32),
    "U8": (np.uint8, mx.uint8),
}


@dataclass(frozen=True)
class Runs:
    """Runs of bytes at even distances.

    Attributes:
        first: where the first run begins.
        length: bytes of each run.
        count: how many runs there are.
        stride: bytes from the beginning of one run to that of the next.
    """

    first: int
    length: int
    count: int = 1
    stride: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in all runs."""
        return self.count * self.length

    def with_gaps(self, most: int) -> int:
        """Bytes that are read for all runs where gaps of `most` bytes and less are read too."""
        between = self.stride - self.length
        if not self.length or between > most:
            return self.nbytes
        return self.nbytes + (self.count - 1) * between


def runs_of(shape: Sequence[int], where: Sequence[slice], item: int) -> Runs:
    """Where a part of a tensor lies, counted from the tensor's first byte.

    Args:
        where: a slice with start and stop for each axis; one axis at most is cut.
        item: bytes of one number.
    """
    cut = [axis for axis, part in enumerate(where) if (part.start, part.stop) != (0, shape[axis])]
    if not cut:
        return Runs(0, prod(shape) * item)
    assert len(cut) == 1, "a part is cut along one axis"
    axis, inner = cut[0], prod(shape[cut[0] + 1 :]) * item
    start, stop = where[axis].start, where[axis].stop
    return Runs(start * inner, (stop - start) * inner, prod(shape[:axis]), shape[axis] * inner)


class RangeReader:
    """Reads parts of stored tensors, and counts what it reads. It is closed at the end of a `with`
    statement.

    Attributes:
        nbytes: bytes of weights read so far, those in gaps between runs included.
    """

    def __init__(self, gap: int = GAP) -> None:
        self.nbytes = 0
        self._gap = gap
        self._files: dict[Path, tuple[io.FileIO, dict[str, int]]] = {}

    def read(self, tensor: StoredTensor, where: Sequence[slice]) -> mx.array:
        """The part of a stored tensor that the slices `where` name, one for each axis, of which one
        at most is cut.

        Raises:
            CheckpointError: the file cannot be read, or ends before the tensor does; or its numbers
                are of a type that no model has.
        """
        stored, kind = _type_of(tensor)
        runs = runs_of(tensor.shape, where, np.dtype(stored).itemsize)
        numbers = self._bytes(tensor, runs).view(stored)
        if stored is np.float64:
            numbers = numbers.astype(np.float32)
        numbers = numbers.reshape([part.stop - part.start for part in where])
        array = mx.array(numbers)
        return array if array.dtype == kind else array.view(kind)

    def place(
        self, tensor: StoredTensor, where: Sequence[slice] | None = None
    ) -> tuple[Path, int, int]:
        """The shard of a part of a stored tensor (of all of it, if `where` is None), and from which
        to before which byte of it the part lies; gaps between its runs are within these.

        Raises:
            CheckpointError: as for `read`.
        """
        stored, _ = _type_of(tensor)
        every = [slice(0, size) for size in tensor.shape]
        runs = runs_of(tensor.shape, every if where is None else where, np.dtype(stored).itemsize)
        _, starts = self._opened(tensor)
        first = starts[tensor.name] + runs.first
        last = first + (runs.count - 1) * runs.stride + runs.length if runs.length else first
        return tensor.shard, first, last

    def _bytes(self, tensor: StoredTensor, runs: Runs) -> np.ndarray:
        """The bytes of all runs, one behind the other."""
        file, starts = self._opened(tensor)
        try:
            return self._joined(file, starts[tensor.name] + runs.first, runs)
        except EOFError:
            raise CheckpointError(
                f"shard {tensor.shard} ends within {tensor.name}; {AGAIN}."
            ) from None
        except OSError as error:
            raise _unreadable(tensor, error) from None

    def _joined(self, file: io.FileIO, first: int, runs: Runs) -> np.ndarray:
        out = np.empty(runs.nbytes, np.uint8)
        if not runs.length:
            return out
        if runs.count == 1 or runs.stride == runs.length:
            self._fill(file, first, out)
        elif runs.with_gaps(self._gap) == runs.nbytes:
            for at, run in enumerate(out.reshape(runs.count, runs.length)):
                self._fill(file, first + at * runs.stride, run)
        else:
            rows = out.reshape(runs.count, runs.length)
            together = max(1, _MOST // runs.stride)
            for at in range(0, runs.count, together):
                block = rows[at : at + together]
                buffer = np.empty((len(block), runs.stride), np.uint8)
                end = buffer.size - (runs.stride - runs.length)
                self._fill(file, first + at * runs.stride, buffer.reshape(-1)[:end])
                block[:] = buffer[:, : runs.length]
        return out

    def _fill(self, file: io.FileIO, start: int, out: np.ndarray) -> None:
        view = out.data.cast("B")
        file.seek(start)
        while view.nbytes:
            count = file.readinto(view[:_MOST])
            if not count:
                raise EOFError
            view, self.nbytes = view[count:], self.nbytes + count

    def _opened(self, tensor: StoredTensor) -> tuple[io.FileIO, dict[str, int]]:
        """The open file of a tensor, and where in it each of its tensors begins."""
        try:
            return self._open(tensor.shard)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unreadable(tensor, error) from None

    def _open(self, shard: Path) -> tuple[io.FileIO, dict[str, int]]:
        if shard not in self._files:
            file = io.FileIO(shard)
            self._files[shard] = file, {}
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            starts = {name: 8 + length + e["data_offsets"][0] for name, e in header.items()}
            self._files[shard] = file, starts
        return self._files[shard]

    def close(self) -> None:
        """Close all files."""
        while self._files:
            self._files.popitem()[1][0].close()

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _type_of(tensor: StoredTensor) -> tuple[type[np.generic], mx.Dtype]:
    """What the numbers of a stored tensor are read as, and what they are."""
    if tensor.dtype not in _TYPES:
        raise CheckpointError(
            f"tensor {tensor.name} in {tensor.shard.name} is of type {tensor.dtype}; convert the "
            "weights again."
        )
    return _TYPES[tensor.dtype]


def _unreadable(tensor: StoredTensor, error: Exception) -> CheckpointError:
    return CheckpointError(f"shard {tensor.shard} cannot be read ({os_reason(error)}); {AGAIN}.")

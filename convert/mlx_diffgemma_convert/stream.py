"""The pipeline: one thread reads and takes checksums, others pack, and the caller's thread writes.

Blocks are read, packed and written in the order of the plan, only a few in flight, so memory is
bounded whatever the size of the checkpoint.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlx_diffgemma import cpu
from mlx_diffgemma.checkpoint.memory import cache_limit
from mlx_diffgemma_convert.pack import Block, Loss, Packed, blocks, pack
from mlx_diffgemma_convert.pieces import Piece
from mlx_diffgemma_convert.plan import Plan, Target
from mlx_diffgemma_convert.shard_file import ShardFile
from mlx_diffgemma_convert.source import ShardReader

_AHEAD = 16  # blocks in flight
_CACHE_BYTES = 256 << 20

_NOTE_BYTES = 256 << 20  # written between two notes in the journal


@dataclass(frozen=True)
class Written:
    """A file, or the beginning of one.

    Attributes:
        size: bytes that are on the disk.
        sha256: checksum of a finished file, else "".
        tensors: records by target name: format, source tensors, checksum of the source bytes, loss.
    """

    size: int
    tensors: Mapping[str, Mapping[str, Any]]
    sha256: str = ""


class Observer(Protocol):
    """What is told of the progress of a file that is being written."""

    def progress(self, target: Target, source_bytes: int) -> None:
        """Note that another block of `target`, made from `source_bytes` bytes, is written."""

    def note(self, written: Written) -> None:
        """Note how much of the file is on the disk for good."""

    def leaves(self, target: Target) -> bool:
        """Note that `target` is written. Returns True where a source shard is not needed any more,
        so that `note` is to be called."""


def write_shard(
    plan: Plan,
    file: str,
    path: Path,
    reader: ShardReader,
    observer: Observer,
    begun: Written | None = None,
) -> Written:
    """Write one file of the plan to `path`, going on from `begun` where its bytes are still there.

    Raises:
        CheckpointError: a source shard is damaged, or a weight cannot be stored in its format.
    """
    targets = plan.shards[file]
    stored = [s for target in targets for s in target.stored(plan.hugging_face)]
    kind = "pt" if plan.hugging_face else "mlx"
    shard = ShardFile(path, stored, kind, begun.size if begun else 0)
    records: dict[str, Mapping[str, Any]] = {}
    if begun is not None and shard.resumed:
        records |= begun.tensors
        for target in targets[: len(records)]:
            observer.progress(target, target.source_bytes)
    noted = shard.size
    digests: dict[str, Any] = {}
    loss, behind = Loss(), _Behind()
    syncing: tuple[Future[None], Written] | None = None  # the disk takes its time meanwhile
    syncer = ThreadPoolExecutor(1, "sync")
    try:
        with closing(packed_blocks(targets[len(records) :], reader, digests)) as stream:
            for packed in stream:
                target = packed.block.target
                loss.add(packed.loss)
                shard.write(packed.parts["weight"])
                behind.add(packed.parts)
                rows = packed.block.stop - packed.block.start
                observer.progress(target, target.source_bytes * rows // target.rows)
                if packed.block.stop < target.rows:
                    continue
                for data in behind.take():
                    shard.write(data)
                digest = digests.pop(target.name).hexdigest()
                records[target.name] = _record(target, digest, loss)
                loss = Loss()
                leaves = observer.leaves(target)
                if syncing is not None and (leaves or syncing[0].done()):
                    syncing[0].result()
                    observer.note(syncing[1])
                    syncing = None
                if leaves:  # before the next source shard is fetched
                    shard.sync()
                    noted = shard.size
                    observer.note(Written(noted, records))
                elif syncing is None and shard.size - noted >= _NOTE_BYTES:
                    noted = shard.size
                    syncing = syncer.submit(shard.sync), Written(noted, dict(records))
        if syncing is not None:
            syncing[0].result()
        return Written(shard.size, records, shard.finish())
    finally:
        syncer.shutdown()
        shard.close()


class _Behind:
    """Scales and biases of a target, kept until its last weights are written (a file holds one
    tensor after the other)."""

    def __init__(self) -> None:
        self._parts: dict[str, list[np.ndarray]] = {}

    def add(self, parts: Mapping[str, np.ndarray]) -> None:
        for part in ("scales", "biases"):
            if part in parts:
                self._parts.setdefault(part, []).append(parts[part])

    def take(self) -> Iterator[np.ndarray]:
        for data in self._parts.values():
            yield from data
        self._parts = {}


def packed_blocks(
    targets: Iterable[Target], reader: ShardReader, digests: dict[str, Any]
) -> Generator[Packed, None, None]:
    """The packed blocks of `targets`, in order; `digests` takes in the running checksum of the
    source bytes of each target."""
    waiting: deque[Future[Packed]] = deque()
    readers = ThreadPoolExecutor(1, "read")
    packers = ThreadPoolExecutor(min(2, os.cpu_count() or 1) if cpu.is_device() else 1, "pack")
    try:
        with cache_limit(_CACHE_BYTES):
            for block in (block for target in targets for block in blocks(target)):
                raw = readers.submit(read_block, block, reader, digests)
                waiting.append(packers.submit(_pack_read, block, raw))
                if len(waiting) >= _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:  # after an error, nobody waits for a download to end
        for pool in (readers, packers):
            pool.shutdown(wait=False, cancel_futures=True)


def _pack_read(block: Block, raw: Future[Mapping[str, np.ndarray]]) -> Packed:
    return pack(block, raw.result())


def read_block(
    block: Block, reader: ShardReader, digests: dict[str, Any]
) -> Mapping[str, np.ndarray]:
    """The source bytes of a block, by part; `digests` takes them into its target's checksum."""
    target = block.target
    digest = digests.setdefault(target.name, sha256())
    raw = {}
    for part, pieces in target.parts.items():
        raw[part] = read_rows(pieces, block.start, block.stop, reader)
        digest.update(raw[part])
    return raw


def read_rows(pieces: Iterable[Piece], start: int, stop: int, reader: ShardReader) -> np.ndarray:
    """The bytes of the rows of a target from `start` to `stop`, gathered from its pieces."""
    wanted = [p for p in pieces if p.target_row < stop and p.target_row + p.rows > start]
    row_bytes = wanted[0].tensor.row_bytes
    out = np.empty((stop - start) * row_bytes, np.uint8)
    for piece in wanted:
        first = max(start, piece.target_row)
        last = min(stop, piece.target_row + piece.rows)
        rows = out[(first - start) * row_bytes : (last - start) * row_bytes]
        reader.read(piece.tensor, piece.source_row + first - piece.target_row, rows)
    return out


def source_digest(target: Target, reader: ShardReader) -> str:
    """The sha256 of the source bytes of a target, which are read for it."""
    digests: dict[str, Any] = {}
    for block in blocks(target):
        read_block(block, reader, digests)
    return digests[target.name].hexdigest()


def _record(target: Target, digest: str, loss: Loss) -> dict[str, Any]:
    record: dict[str, Any] = {"format": target.format.name, "dtype": target.dtype}
    if target.format.quantized:
        record["relative_error"] = float(f"{loss.relative:.6g}")
        record["worst_of_allowed"] = float(f"{loss.worst:.4g}")
        record["compared"] = loss.compared
    names = target.source_names
    record["source"] = names[0] if len(names) == 1 else f"{len(names)} tensors"
    record["source_sha256"] = digest
    return record

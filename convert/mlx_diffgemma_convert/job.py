"""A conversion from beginning to end: check, stream, verify, publish."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_diffgemma.checkpoint.memory import size_text
from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma_convert.card import write_card
from mlx_diffgemma_convert.journal import Journal
from mlx_diffgemma_convert.plan import Plan, Target
from mlx_diffgemma_convert.record import conversion_record, write_record
from mlx_diffgemma_convert.repository import FULL, check_side_files, write_side_files
from mlx_diffgemma_convert.source import ShardReader
from mlx_diffgemma_convert.stream import Written, write_shard
from mlx_diffgemma_convert.verify import verify

Progress = Callable[[Target, int], None]


@dataclass(frozen=True)
class Outcome:
    """What a conversion did.

    Attributes:
        target: the folder that was made.
        source_bytes, stored_bytes: bytes of the weights that were read and written.
        resumed_files: files of weights that an earlier run had finished.
    """

    target: Path
    source_bytes: int
    stored_bytes: int
    resumed_files: int


def check_target(target: Path, source_folder: Path | None) -> None:
    """Check that `target` may be made.

    Raises:
        UsageError: it is the source itself, or it exists already.
    """
    if source_folder is not None and target.resolve() == source_folder.resolve():
        raise UsageError(f"{target} is the source itself; choose another --mlx-path.")
    if target.exists():
        raise UsageError(f"{target} exists already; remove it or choose another --mlx-path.")


def convert(
    plan: Plan,
    journal: Journal,
    *,
    restart: bool = False,
    progress: Progress = lambda target, source_bytes: None,
) -> Outcome:
    """Carry out a plan. `journal` is the journal of the target, locked by its context.

    Raises:
        CheckpointError: the source is damaged or has changed, the result does not verify, or there
            is no room.
        UsageError: the settings differ from those of the run that is to go on.
    """
    if journal.published(plan):
        journal.discard()
        return Outcome(journal.target, plan.source_bytes, plan.stored_bytes(), len(plan.shards))
    check_side_files(plan)
    journal.open(plan, restart)
    resumed = len(journal.done)
    _check_room(plan, journal)
    try:
        _write_shards(plan, journal, progress)
        write_card(plan, journal.recorded(), journal.result)
        files = write_side_files(plan, journal.result)
        write_record(journal.result, conversion_record(plan, journal.done, files))
        verify(journal.result)
        journal.publish()
    except OSError as error:
        if error.errno in FULL:
            left = size_text(_missing_bytes(plan, journal))
            raise CheckpointError(
                f"no room left for {journal.folder}; free {left}, then run the same command "
                "again: it goes on where it stopped."
            ) from None
        raise
    return Outcome(journal.target, plan.source_bytes, plan.stored_bytes(), resumed)


class _Watch:
    """Passes progress on, keeps the journal, and releases source shards that are not needed
    again."""

    def __init__(self, plan: Plan, journal: Journal, reader: ShardReader, tell: Progress) -> None:
        self._plan, self._journal, self._reader = plan, journal, reader
        self._tell = tell
        recorded = journal.recorded()
        left = [target for target in plan.targets if target.name not in recorded]
        self._users = Counter(shard for target in left for shard in target.shards)
        self._leaving = {t.shard for t in plan.source.tensors.values()} - set(self._users)
        self.file = ""
        self.release()

    def progress(self, target: Target, source_bytes: int) -> None:
        self._tell(target, source_bytes)

    def leaves(self, target: Target) -> bool:
        self._users.subtract(target.shards)
        self._leaving |= {shard for shard in target.shards if not self._users[shard]}
        return bool(self._leaving)

    def note(self, written: Written) -> None:
        self._journal.note_progress(self.file, written)
        self.release()

    def release(self) -> None:
        """Release the source shards whose tensors are all on the disk in their new form."""
        recorded = self._journal.recorded()
        left = [target for target in self._plan.targets if target.name not in recorded]
        needed = {shard for target in left for shard in target.shards}
        for shard in self._leaving - needed:
            self._reader.close(shard)
            self._plan.source.release(shard)
        self._leaving &= needed


def _write_shards(plan: Plan, journal: Journal, tell: Progress) -> None:
    for file in journal.done:
        for target in plan.shards[file]:
            tell(target, target.source_bytes)
    with ShardReader(plan.source) as reader:
        watch = _Watch(plan, journal, reader, tell)
        for file in plan.shards:
            if file in journal.done:
                continue
            watch.file, begun = file, None
            if journal.current and journal.current["file"] == file:
                begun = Written(journal.current["size"], journal.current["tensors"])
            written = write_shard(plan, file, journal.result / file, reader, watch, begun)
            journal.finish_file(file, written)
            watch.release()


def _missing_bytes(plan: Plan, journal: Journal) -> int:
    left = sum(plan.stored_bytes(file) for file in plan.shards if file not in journal.done)
    return left - (journal.current["size"] if journal.current else 0)


def _check_room(plan: Plan, journal: Journal) -> None:
    recorded = journal.recorded()
    shards = {s for t in plan.targets if t.name not in recorded for s in t.shards}
    needs = [(journal.folder, _missing_bytes(plan, journal)), *plan.source.room_needed(shards)]
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, size in needs:
        disk = folder.stat().st_dev
        first, sum_ = by_disk.get(disk, (folder, 0))
        by_disk[disk] = first, sum_ + size
    for folder, needed in by_disk.values():
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise CheckpointError(
                f"the disk of {folder.parent} has {size_text(free)} free, the conversion needs "
                f"{size_text(needed)}; free some, choose another --mlx-path, or add "
                "--delete-source-shards where the source is a repository."
            )

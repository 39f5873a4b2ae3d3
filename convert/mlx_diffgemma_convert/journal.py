"""The record on disk of what a conversion has done, so that an interrupted one can go on.

Everything is made in `TARGET.partial`, next to the target: `result/` becomes the target in one
rename at the end, `journal.json` says which files of it are finished and how much of the current
one is on the disk for good. The folder is locked while a conversion runs; the lock goes with the
process.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from mlx_diffgemma import disk
from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma.reading import read_object
from mlx_diffgemma_convert.plan import Plan
from mlx_diffgemma_convert.source import ShardReader
from mlx_diffgemma_convert.stream import Written, source_digest


class Journal:
    """The partial folder of one conversion, locked while its context is open.

    Attributes:
        target: the folder to make.
        folder: the partial folder.
        result: folder in it that becomes the target.
        downloads: folder in it for source shards that are deleted after use.
        done: finished files, each with its size, checksum and the records of its tensors.
        current: the file that is being written, or None.

    Raises:
        UsageError: on entering, the folder cannot be made, or another conversion uses it.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.with_name(f"{target.name}.partial")
        self.result = self.folder / "result"
        self.downloads = self.folder / "source"
        self.done: dict[str, dict[str, Any]] = {}
        self.current: dict[str, Any] | None = None
        self._file = self.folder / "journal.json"
        self._state: dict[str, Any] = {}
        self._lock: int | None = None

    def __enter__(self) -> Journal:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{self.folder} cannot be made ({error.strerror}); choose another --mlx-path."
            ) from None
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UsageError(
                f"{self.folder} is in use by another conversion; wait for it or choose another "
                "target."
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
        if self.folder.exists() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    @property
    def begun(self) -> bool:
        return self._file.exists()

    def published(self, plan: Plan) -> bool:
        """Whether an earlier run of the plan was stopped between its last two steps, so that the
        target is complete and only the partial folder is left."""
        if not (self.target.exists() and self.begun) or self.result.exists():
            return False
        return bool(self._read()["fingerprint"] == plan.fingerprint)

    def _read(self) -> dict[str, Any]:
        """The journal of an earlier run.

        Raises:
            CheckpointError: the journal is damaged.
        """
        mend = "add --restart to begin anew"
        state = read_object(self._file, mend=mend)
        objects = [state.get(key) for key in ("settings", "identities", "done")]
        if not all(isinstance(each, dict) for each in objects) or "fingerprint" not in state:
            raise CheckpointError(f"{self._file} is damaged (it is no journal of ours); {mend}.")
        return state

    def open(self, plan: Plan, restart: bool) -> None:
        """Begin, or go on where an earlier run of the same plan stopped.

        Raises:
            CheckpointError: the source has changed since that run, or its journal is damaged.
            UsageError: the settings are not those of that run.
        """
        if restart:
            self.discard()
        if self.begun:
            self._state = self._read()
            self._compare(plan)
            self.done = {f: d for f, d in self._state["done"].items() if self._is_there(f, d)}
            self.current = self._state["current"]
            self._compare_content(plan)
        else:
            self._state = {
                "fingerprint": plan.fingerprint,
                "settings": dict(plan.settings),
                "revision": plan.source.revision,
                "identities": plan.source.identities(),
            }
        self.result.mkdir(parents=True, exist_ok=True)
        self._save()

    def _is_there(self, file: str, entry: dict[str, Any]) -> bool:
        path = self.result / file
        return path.is_file() and path.stat().st_size == entry["size"]

    def recorded(self) -> dict[str, dict[str, Any]]:
        """The record of every target that is on the disk."""
        files = [*self.done.values(), *([self.current] if self.current else [])]
        return {name: record for file in files for name, record in file["tensors"].items()}

    def _compare(self, plan: Plan) -> None:
        before = self._state
        changed = [k for k, v in plan.settings.items() if before["settings"].get(k) != v]
        if changed:
            raise UsageError(
                f"{self.folder} was begun with another {' and '.join(changed)}; run the same "
                "command as then, or add --restart to begin anew."
            )
        was, now = before["revision"], plan.source.revision
        if was != now:
            raise self._changed(
                plan, f"{plan.source.name} has moved from revision {was} to {now}",
                f"add --revision {was} to go on, or " if was else "",
            )  # fmt: skip
        if before["fingerprint"] != plan.fingerprint:
            raise self._changed(plan, f"{plan.source.name} has changed")

    def _compare_content(self, plan: Plan) -> None:
        """Read shards that look changed since the earlier run again, and compare checksums.

        Raises:
            CheckpointError: the content of a shard has changed, or is not known.
        """
        before, now = self._state["identities"], plan.source.identities()
        touched = {shard for shard, identity in now.items() if before.get(shard) != identity}
        if not touched:
            return
        recorded = self.recorded()
        with ShardReader(plan.source) as reader:
            for target in plan.targets:
                if not touched & target.shards:
                    continue
                record = recorded.get(target.name)
                if record is None or source_digest(target, reader) != record["source_sha256"]:
                    names = ", ".join(sorted(touched & target.shards))
                    raise self._changed(plan, f"{plan.source.name}: {names} has changed")
        self._state["identities"] = now

    def _changed(self, plan: Plan, what: str, way: str = "") -> CheckpointError:
        return CheckpointError(
            f"{what} since the conversion into {self.folder} began; {way}add --restart to begin "
            "anew."
        )

    def note_progress(self, file: str, written: Written) -> None:
        """Note how much of a file is on the disk."""
        self.current = {"file": file, "size": written.size, "tensors": dict(written.tensors)}
        self._save()

    def finish_file(self, file: str, written: Written) -> None:
        """Note that a file is finished."""
        self.done[file] = {
            "size": written.size,
            "sha256": written.sha256,
            "tensors": dict(written.tensors),
        }
        self.current = None
        self._save()

    def _save(self) -> None:
        state = {**self._state, "done": self.done, "current": self.current}
        disk.write_atomically(self._file, json.dumps(state).encode())

    def publish(self) -> None:
        """Give the result its final name, and remove the partial folder's content."""
        disk.sync(self.result)
        self.result.rename(self.target)
        disk.sync(self.target.parent)
        self.discard()

    def discard(self) -> None:
        """Remove everything in the partial folder, the journal last."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path == self._file):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.done, self.current = {}, None

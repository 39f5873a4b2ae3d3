"""A repository of the hub of which only some bytes are fetched, into files with holes.

A copy is a folder like that of any checkpoint: config, index and tokenizer are whole, and each
shard is as long as it should be, with its header in it. Which bytes of a shard are there is noted
beside it, after they are on the disk, so a copy goes on where it was broken off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlx_diffgemma.checkpoint.locate import SMALL_FILES, hub_errors, locate, repository_of
from mlx_diffgemma.checkpoint.shards import stored_tensors
from mlx_diffgemma.disk import sync, write_atomically
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.reading import is_there, read_object

_MARKER = "sparse-copy.json"
_PIECE = 32 << 20  # bytes of one request
_AT_ONCE = 4  # requests
_FIRST = 1 << 17  # bytes of a shard that are asked for in the hope that its header is in them

Span = tuple[int, int]


def locate_sparse(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """As `locate`, but of a repository that is not on this machine as a whole, no more than config,
    tokenizer and the headers of the shards is fetched. `SparseCopy.of` the folder fetches more.

    Raises:
        UsageError, CheckpointError: as for `locate`.
    """
    from huggingface_hub import constants

    repository = repository_of(path_or_repo, revision)
    if repository is None or constants.HF_HUB_OFFLINE:
        return locate(path_or_repo, revision)
    at = f"{repository} at revision '{revision}'" if revision else repository
    with hub_errors(at, "cannot be fetched ({}); check the network, and the room on the disk"):
        return _prepared(repository, revision)


def _prepared(repository: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, constants, errors, hf_hub_download

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except errors.HTTPError as error:
        is_reached = isinstance(error, errors.HfHubHTTPError)
        cached = None if is_reached else _whole_snapshot(repository, revision)
        if cached is None:
            raise
        return cached
    whole = _whole_snapshot(repository, str(info.sha))
    if whole is not None:
        return whole
    owner, _, name = repository.partition("/")
    room = Path(constants.HF_HOME) / "mlx-diffgemma" / f"{owner}--{name}"
    folder = room / str(info.sha)
    files = {each.rfilename: int(each.size or 0) for each in info.siblings or ()}
    for name in files:
        if any(fnmatchcase(name, pattern) for pattern in SMALL_FILES):
            hf_hub_download(repository, name, revision=info.sha, local_dir=str(folder))
    sizes = {
        name: size
        for name, size in files.items()
        if name.endswith(".safetensors") and "/" not in name
    }
    about = {"repository": repository, "revision": info.sha, "sizes": sizes}
    write_atomically(folder / _MARKER, json.dumps(about).encode())
    copy = SparseCopy.of(folder)
    assert copy is not None
    copy.fetch_headers()
    return folder


def _whole_snapshot(repository: str, revision: str | None) -> Path | None:
    """The folder of a revision in the hub's own cache, if all of its shards are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        stored_tensors(folder)
    except (LocalEntryNotFoundError, CheckpointError):
        return None
    return folder


@dataclass(frozen=True)
class SparseCopy:
    """A copy with holes of a repository at one commit.

    Attributes:
        folder: where it is.
        repository: what it is a copy of.
        sizes: bytes of each shard, by name.
        read: gives the bytes of a shard from one place to another.
    """

    folder: Path
    repository: str
    sizes: Mapping[str, int]
    read: Callable[[str, int, int], bytes]

    @classmethod
    def of(cls, folder: Path) -> SparseCopy | None:
        """The copy in `folder`; None where that is a folder of whole files."""
        if not is_there(folder / _MARKER):
            return None
        about = read_object(folder / _MARKER)
        repository, revision = str(about["repository"]), str(about["revision"])

        def read(shard: str, start: int, stop: int) -> bytes:
            return _range_of(repository, revision, shard, start, stop)

        return cls(folder, repository, about["sizes"], read)

    def fetch_headers(self) -> None:
        """Fetch the header of every shard that lacks it."""
        for shard, size in self.sizes.items():
            self.fetch([(self.folder / shard, 0, min(size, _FIRST))])
            with (self.folder / shard).open("rb") as file:
                header = 8 + int.from_bytes(file.read(8), "little")
            self.fetch([(self.folder / shard, 0, min(size, header))])

    def fetch(
        self, wanted: Iterable[tuple[Path, int, int]], *, shows_progress: bool = False
    ) -> int:
        """Fetch what is missing of ranges of shards, each from one place to before another.

        Returns:
            How many bytes were missing.

        Raises:
            CheckpointError: the hub or the disk fails; what was fetched before that stays.
        """
        by_shard: dict[str, list[Span]] = {}
        for shard, start, stop in wanted:
            by_shard.setdefault(shard.name, []).append((start, stop))
        missing = {
            shard: [
                (at, min(at + _PIECE, stop))
                for start, stop in _without(_merged(spans), self._there(shard))
                for at in range(start, stop, _PIECE)
            ]
            for shard, spans in by_shard.items()
        }
        total = sum(stop - start for spans in missing.values() for start, stop in spans)
        with (
            hub_errors(self.repository, "cannot be fetched ({}); check network and disk"),
            _progress(total if shows_progress else 0) as advance,
        ):
            for name, spans in missing.items():
                self._fetch(name, spans, advance)
        return total

    def _fetch(self, shard: str, spans: list[Span], advance: Callable[[int], Any]) -> None:
        if not spans:
            return
        path, there = self.folder / shard, self._there(shard)
        with (
            path.open("r+b" if is_there(path) else "w+b") as file,
            ThreadPoolExecutor(_AT_ONCE) as pool,
        ):
            file.truncate(self.sizes[shard])  # holes take no room
            for begin in range(0, len(spans), _AT_ONCE):
                some = spans[begin : begin + _AT_ONCE]
                pieces = pool.map(lambda span: self.read(shard, *span), some)
                for (start, _), piece in zip(some, pieces, strict=True):
                    file.seek(start)
                    file.write(piece)
                    advance(len(piece))
                file.flush()
                sync(path)
                there = _merged([*there, *some])
                write_atomically(self._note(shard), json.dumps(there).encode())

    def _there(self, shard: str) -> list[Span]:
        """What is there of a shard, as ranges in order that do not touch."""
        path, note = self.folder / shard, self._note(shard)
        if not is_there(note) or not is_there(path) or path.stat().st_size != self.sizes[shard]:
            return []
        try:
            return [(int(start), int(stop)) for start, stop in json.loads(note.read_text())]
        except (ValueError, TypeError):
            return []

    def _note(self, shard: str) -> Path:
        return self.folder / f"{shard}.there.json"


def _range_of(repository: str, revision: str, shard: str, start: int, stop: int) -> bytes:
    """Bytes of a file of a repository from `start` to before `stop`."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    url = hf_hub_url(repository, shard, revision=revision)
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
    response = http_backoff("GET", url, headers=headers)
    hf_raise_for_status(response)
    content: bytes = response.content
    if response.status_code != 206 or len(content) != stop - start:
        raise OSError(f"{shard}: the hub sent {len(content)} bytes for {stop - start}")
    return content


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Ranges in order, joined where they touch."""
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif stop > start:
            merged.append((start, stop))
    return merged


def _without(spans: Iterable[Span], there: Iterable[Span]) -> list[Span]:
    """Of ranges what is not in those of `there`, both in order and apart."""
    left: list[Span] = []
    for start, stop in spans:
        for first, last in there:
            if first < stop and last > start:
                if first > start:
                    left.append((start, first))
                start = max(start, last)
        if start < stop:
            left.append((start, stop))
    return left


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], Any]]:
    """A function to call with each number of bytes that has come; it moves a bar like those of the
    hub's own downloads, unless `total` is 0."""
    if not total:
        yield lambda count: None
        return
    from huggingface_hub.utils import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="Fetching this Mac's share") as bar:
        yield bar.update

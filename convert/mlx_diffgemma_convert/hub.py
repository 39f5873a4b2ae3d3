"""The Hugging Face hub: a checkpoint fetched from it shard by shard, and a folder sent to it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from mlx_diffgemma.checkpoint.locate import DEMO, hub_errors, locate
from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma.reading import read_object
from mlx_diffgemma_convert.source import (
    ITEM_BYTES,
    FolderSource,
    Source,
    SourceTensor,
    is_side_file,
)

RETRIES = 5  # after pauses of 1, 2, 4, ... seconds
_NOT_WRITTEN = (
    "cannot be written ({}); check name, login and network, then run "
    "`mlx-diffgemma convert upload` on the folder"
)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_T = TypeVar("_T")


def open_source(
    model: str, revision: str | None = None, downloads: Path | None = None, retries: int = RETRIES
) -> Source:
    """The checkpoint that a user names: a folder or a repository.

    Args:
        model: path of a folder, or "owner/name".
        revision: branch, tag or commit of a repository.
        downloads: folder for shards that are deleted after use; None keeps them in the hub's own
            cache.
        retries: new attempts where the network is lost.

    Raises:
        CheckpointError: there is no such checkpoint.
        UsageError: `downloads` or `revision` is given for a folder.
    """
    folder = locate(DEMO) if model == DEMO else Path(model).expanduser()
    if folder.is_dir():
        if downloads is not None:
            raise UsageError(
                f"--delete-source-shards is for repositories, and {folder} is a folder of yours; "
                "drop it."
            )
        if revision is not None:
            raise UsageError(f"--revision is for repositories, and {folder} is a folder; drop it.")
        return FolderSource(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; name the folder that holds config.json.")
    if not _REPOSITORY.fullmatch(model):
        raise CheckpointError(
            f'{model}: no such folder; give a folder or a Hugging Face repository ("owner/name").'
        )
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _cached(model, revision)
    return HubSource(model, revision, downloads, retries)


def _cached(repository: str, revision: str | None) -> Source:
    """A snapshot that is in the cache already, for work without a network."""
    from huggingface_hub import snapshot_download

    with hub_errors(repository, "cannot be read ({}); unset HF_HUB_OFFLINE"):
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    return FolderSource(folder, repository, folder.name)


class HubSource:
    """A repository of the hub at one commit."""

    def __init__(
        self,
        repository: str,
        revision: str | None,
        downloads: Path | None,
        retries: int = RETRIES,
    ) -> None:
        from huggingface_hub import HfApi, utils

        utils.disable_progress_bars()  # there is one bar for the whole
        self.name = repository
        self.announce: Callable[[str], None] = lambda text: None
        self._asked, self._downloads, self._retries = revision, downloads, retries
        self._ahead: dict[str, Future[Path]] = {}
        self._fetcher = ThreadPoolExecutor(1, "fetch")
        api = HfApi()
        info = self._insist(
            "its list of files",
            lambda: api.model_info(repository, revision=revision, files_metadata=True),
        )
        self.revision: str | None = info.sha
        self._sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        if "config.json" not in self._sizes:
            raise CheckpointError(f"{repository} has no config.json; name another repository.")
        self._fetch("config.json", revision)  # notes in the cache what the revision's name means
        self.config: Mapping[str, Any] = read_object(self._fetch("config.json"))
        self.tensors = self._headers(api)

    def shard_path(self, shard: str) -> Path:
        """The shard as a file. The next shard is fetched meanwhile, unless shards are deleted after
        use."""
        ahead = self._ahead.pop(shard, None)
        self.announce(f"fetching {shard}")
        path = ahead.result() if ahead is not None else self._fetch(shard)
        if self._downloads is None:
            later = sorted({t.shard for t in self.tensors.values() if t.shard > shard})
            if later and later[0] not in self._ahead:
                self._ahead[later[0]] = self._fetcher.submit(self._fetch, later[0])
        return path

    def release(self, shard: str) -> None:
        """Delete the shard if it was fetched to be deleted."""
        if self._downloads is not None:
            (self._downloads / shard).unlink(missing_ok=True)

    def identities(self) -> dict[str, Any]:
        """No identities: files of one commit never change."""
        return {}

    def room_needed(self, shards: Collection[str]) -> list[tuple[Path, int]]:
        """The folder that `shards` go to, and the bytes that they take there: those of all that are
        missing, or those of the largest where each is deleted after use."""
        from huggingface_hub import constants, try_to_load_from_cache

        if self._downloads is not None:
            largest = max((self._sizes.get(shard, 0) for shard in shards), default=0)
            return [(self._downloads.parent, largest)]
        missing = [
            self._sizes.get(shard, 0)
            for shard in shards
            if not isinstance(try_to_load_from_cache(self.name, shard, revision=self.revision), str)
        ]
        cache = Path(constants.HF_HUB_CACHE)
        while not cache.exists():
            cache = cache.parent
        return [(cache, sum(missing))]

    def card(self) -> Path | None:
        return self._fetch("README.md") if "README.md" in self._sizes else None

    def side_files(self) -> Mapping[str, Path]:
        return {name: self._fetch(name) for name in sorted(self._sizes) if is_side_file(name)}

    def _headers(self, api: Any) -> dict[str, SourceTensor]:
        metadata = self._insist(
            "the headers of its shards",
            lambda: api.get_safetensors_metadata(self.name, revision=self.revision),
        )
        tensors = {}
        for shard, file in metadata.files_metadata.items():
            for name, info in file.tensors.items():
                if info.dtype not in ITEM_BYTES:
                    raise CheckpointError(
                        f"tensor {name} in {shard} is of type {info.dtype}; convert from weights "
                        "in bf16, fp16 or fp32."
                    )
                if metadata.weight_map.get(name) != shard:
                    raise CheckpointError(
                        f"{self.name}: {shard} holds {name}, its index says "
                        f"{metadata.weight_map.get(name, 'nothing of it')}; name another revision."
                    )
                shape, start = tuple(info.shape), info.data_offsets[0]
                tensors[name] = SourceTensor(name, shard, info.dtype, shape, start)
        missing = next((name for name in metadata.weight_map if name not in tensors), None)
        if missing is not None:
            raise CheckpointError(
                f"{self.name}: its index lists {missing}, which is in no shard; name another "
                "revision."
            )
        return tensors

    def _fetch(self, file: str, revision: str | None = "") -> Path:
        from huggingface_hub import hf_hub_download

        to_delete = self._downloads is not None and file.endswith(".safetensors")
        return Path(
            self._insist(
                file,
                lambda: hf_hub_download(
                    self.name,
                    file,
                    revision=self.revision if revision == "" else revision,
                    local_dir=self._downloads if to_delete else None,
                ),
            )
        )

    def _insist(self, what: str, call: Callable[[], _T]) -> _T:
        """What `call` returns, tried again where the network is at fault; a download goes on where
        it stopped."""
        otherwise = (
            f"cannot be converted: {what} cannot be fetched ({{}}); check the network, then run "
            "the same command again: it goes on where it stopped"
        )
        at = f"{self.name} at revision '{self._asked}'" if self._asked else self.name
        with hub_errors(at, otherwise):
            for attempt in range(self._retries + 1):
                try:
                    return call()
                except Exception as error:
                    if attempt == self._retries or not _is_lost(error):
                        raise
                    time.sleep(2.0**attempt)
        raise AssertionError("the last attempt returns or raises")


def _is_lost(error: Exception) -> bool:
    """Whether the network is at fault, or a server that may answer otherwise the next time."""
    from huggingface_hub import errors

    lost = (
        errors.LocalEntryNotFoundError, errors.HTTPError, ConnectionError, TimeoutError,
        getattr(errors, "XetDownloadError", ConnectionError),
    )  # fmt: skip
    status = getattr(getattr(error, "response", None), "status_code", None)
    refused = status is not None and 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, lost) and not refused


def prepare_upload(repository: str) -> None:
    """Make the repository if it is not there, before hours are spent on what could not be uploaded.

    Raises:
        CheckpointError: there is no login, or no right to write there.
    """
    from huggingface_hub import HfApi

    with hub_errors(repository, _NOT_WRITTEN):
        HfApi().create_repo(repository, exist_ok=True)


def upload(folder: Path, repository: str, *, dry_run: bool = False) -> dict[str, Any]:
    """Upload a folder; the same call again sends what is missing.

    Args:
        dry_run: send nothing.

    Returns:
        The repository, the files with their sizes in bytes, and whether there is a login.

    Raises:
        CheckpointError: there is no login, no right to write there, or no network.
    """
    from huggingface_hub import HfApi, get_token

    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
    found = {
        "repository": repository,
        "files": files,
        "bytes": sum(files.values()),
        "token": get_token() is not None,
        "dry_run": dry_run,
    }
    if dry_run:
        return found
    prepare_upload(repository)
    with hub_errors(repository, _NOT_WRITTEN):
        HfApi().upload_folder(repo_id=repository, folder_path=folder)
    return found

"""A checkpoint on the Hugging Face hub: planned from its headers, fetched shard by shard."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from mlx_diffgemma.checkpoint.locate import DEMO, locate
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
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_T = TypeVar("_T")


def open_source(
    model: str, revision: str | None = None, downloads: Path | None = None, retries: int = RETRIES
) -> Source:
    """The checkpoint that a user names: a folder or a repository.

    Args:
        downloads: where shards are fetched to that are deleted after use; None keeps them in the
            hub's own cache.

    Raises:
        CheckpointError: there is no such checkpoint.
        UsageError: `downloads` or `revision` is given for a folder.
    """
    folder = locate(DEMO) if model == DEMO else Path(model).expanduser()
    if folder.is_dir():
        if downloads is not None:
            raise UsageError(
                f"--delete-source-shards is for repositories; {folder} is yours and stays as it is."
            )
        if revision is not None:
            raise UsageError(f"--revision is for repositories; {folder} is a folder.")
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
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        raise CheckpointError(
            f"{repository} is not in the local cache and HF_HUB_OFFLINE is set; unset it."
        ) from None
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
        self._downloads, self._retries = downloads, retries
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
        """The shard as a file. The one after it is fetched meanwhile, unless room is short."""
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
        """None: the commit says it all."""
        return {}

    def room_needed(self, shards: Collection[str]) -> list[tuple[Path, int]]:
        """What downloading `shards` takes: all of them, or the largest where each is deleted."""
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
        from huggingface_hub import errors

        try:
            metadata = self._insist(
                "the headers of its shards",
                lambda: api.get_safetensors_metadata(self.name, revision=self.revision),
            )
        except errors.NotASafetensorsRepoError:
            raise CheckpointError(
                f"{self.name} holds no safetensors weights; name a repository that does."
            ) from None
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
        """Try again where the network is at fault (a download goes on where it stopped)."""
        from huggingface_hub import errors

        lost = (
            errors.LocalEntryNotFoundError, errors.HTTPError, ConnectionError, TimeoutError,
            getattr(errors, "XetDownloadError", ConnectionError),
        )  # fmt: skip
        for attempt in range(self._retries + 1):
            try:
                return call()
            except errors.GatedRepoError:
                why = "is gated; accept its terms on its page, then log in with `hf auth login`"
                raise CheckpointError(f"{self.name} {why}.") from None
            except errors.RepositoryNotFoundError:
                why = "does not exist or is private; check the name, or log in with `hf auth login`"
                raise CheckpointError(f"{self.name} {why}.") from None
            except errors.RevisionNotFoundError:
                why = "has no such revision; see its branches and tags"
                raise CheckpointError(f"{self.name} {why}.") from None
            except lost as error:
                if attempt == self._retries or _refused(error):
                    reason = (str(error).splitlines() or [type(error).__name__])[0]
                    raise CheckpointError(
                        f"{self.name}: {what} cannot be fetched ({reason}); check the network, "
                        "then run the same command again: it goes on where it stopped."
                    ) from None
                time.sleep(2.0**attempt)
        raise AssertionError("the last attempt returns or raises")


def _refused(error: BaseException) -> bool:
    """Whether the server answered, and will answer the same again."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is not None and 400 <= status < 500 and status not in (408, 429)

"""The folder on this machine of what a user names: a folder, a repository, or "demo"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma.reading import is_there, os_reason, shown

DEMO = "demo"
_SHIPPED = {DEMO: "checkpoint", "demo-image": "reader"}
RELEASE = "google/diffusiongemma-26B-A4B-it"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # `./typo` is a path
SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model", "*.txt"]
"""What a checkpoint needs of a repository beside its weights."""


def locate(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint, downloaded from the Hugging Face hub if need be.

    "demo" is the small model that comes with this package, and "demo-image" the one that reads
    drawn sudokus.

    Raises:
        UsageError: an argument is of another type.
        CheckpointError: there is no such folder or repository, or the hub cannot be reached.
    """
    if isinstance(path_or_repo, str) and path_or_repo in _SHIPPED:
        return Path(__file__).parents[1] / "demo" / _SHIPPED[path_or_repo]
    if not isinstance(path_or_repo, (str, Path)) or not str(path_or_repo):
        raise UsageError(
            f'a model is named by a folder, a repository or "{DEMO}", not {shown(path_or_repo)}.'
        )
    if revision is not None and (not isinstance(revision, str) or not revision.isprintable()):
        raise UsageError(
            f"revision must be a branch, tag or commit of the repository, not {shown(revision)}."
        )
    try:
        path = Path(path_or_repo).expanduser()
        if path.is_dir():
            return path
    except (RuntimeError, OSError, ValueError) as error:  # no such user's home, a null byte
        raise CheckpointError(
            f"{shown(str(path_or_repo))} cannot be read ({os_reason(error)}); check the path."
        ) from None
    if is_there(path):
        try:
            path.stat()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{_spelt(path)} cannot be read ({os_reason(error)}); check the path."
            ) from None
        raise CheckpointError(f"{path} is a file; name the folder that holds config.json.")
    if not _REPOSITORY.fullmatch(str(path_or_repo)):
        raise CheckpointError(
            f"{_spelt(path_or_repo)}: no such folder; give a folder, a Hugging Face repository "
            f'("owner/name"), or "{DEMO}".'
        )
    return _download(str(path_or_repo), revision)


def repository_of(path_or_repo: str | Path, revision: str | None = None) -> str | None:
    """The repository that is named; None where it is anything else that `locate` knows, or would
    refuse."""
    name = str(path_or_repo)
    if revision is not None and not isinstance(revision, str):
        return None
    if name in _SHIPPED or not _REPOSITORY.fullmatch(name) or is_there(Path(name).expanduser()):
        return None
    return name


def _spelt(name: str | Path) -> str:
    return str(name) if str(name).isprintable() else shown(str(name))


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    at = f"{repository} at revision '{revision}'" if revision else repository
    with hub_errors(at, "cannot be downloaded ({}); check the network, and the room on the disk"):
        files = [*SMALL_FILES, "*.safetensors"]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))


@contextmanager
def hub_errors(repository: str, otherwise: str) -> Iterator[None]:
    """Inside, what a call of `huggingface_hub` raises becomes an error of one line.

    Args:
        repository: what was asked for, as the line names it.
        otherwise: what failed, with `{}` for the reason, and what to do about it, for an error that
            says nothing more definite.

    Raises:
        CheckpointError: the call failed by the hub, the network or the disk.
    """
    try:
        yield
    except Exception as error:
        why = _hub_reason(error, otherwise)
        if why is None:
            raise
        raise CheckpointError(f"{repository} {why}.") from None


def _hub_reason(error: Exception, otherwise: str) -> str | None:
    """What an error says of a call to the hub; None where the error is of something else."""
    from huggingface_hub import constants, errors

    at_fault = (OSError, ValueError, errors.HTTPError)
    if not isinstance(error, at_fault) and type(error).__module__ != errors.__name__:
        return None
    if isinstance(error, errors.GatedRepoError):
        why = "is gated; accept its terms on its page, then log in with `hf auth login`"
    elif isinstance(error, errors.RepositoryNotFoundError):
        why = "does not exist, or is private; check the name, or log in with `hf auth login`"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = "does not exist; see the branches and tags of the repository"
    elif isinstance(error, errors.NotASafetensorsRepoError):
        why = "holds no safetensors weights; name a repository that does"
    elif isinstance(error, errors.LocalTokenNotFoundError):
        why = "needs a login; run `hf auth login`, or set HF_TOKEN"
    elif isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no hub can be reached"
        why = otherwise.replace("{}", f"it is not in the local cache, and {offline}")
    else:
        reason = (str(error).splitlines() or [os_reason(error)])[0]
        why = otherwise.replace("{}", reason[:200])
    return why

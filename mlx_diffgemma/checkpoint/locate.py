"""From what a user names (a folder, a repository, "demo") to a folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma.reading import is_there, os_reason, shown

DEMO = "demo"
_SHIPPED = {DEMO: "checkpoint", "demo-image": "reader"}
RELEASE = "google/diffusiongemma-26B-A4B-it"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # `./typo` is a path
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


def locate(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint, downloaded from the Hugging Face hub if need be.

    "demo" is the small model that comes with this package, and "demo-image" the one that reads
    drawn sudokus.

    Raises:
        CheckpointError: no such folder or repository, or the hub cannot be reached.
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
            f"{shown(str(path_or_repo))} cannot be read ({os_reason(error)})."
        ) from None
    if is_there(path):
        try:
            path.stat()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{_spelt(path)} cannot be read ({os_reason(error)}).") from None
        raise CheckpointError(f"{path} is a file; name the folder that holds config.json.")
    if not _REPOSITORY.fullmatch(str(path_or_repo)):
        raise CheckpointError(
            f"{_spelt(path_or_repo)}: no such folder; give a folder, a Hugging Face repository "
            f'("owner/name"), or "{DEMO}".'
        )
    return _download(str(path_or_repo), revision)


def _spelt(name: str | Path) -> str:
    return str(name) if str(name).isprintable() else shown(str(name))


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    at = f" at revision '{revision}'" if revision else ""
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_FILES))
    except errors.GatedRepoError:
        why = "is gated; accept its terms on its page, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = "does not exist, or is private; check the name, or log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        why = "does not exist; see the repository's branches and tags"
    except errors.LocalEntryNotFoundError:
        why = "is not in the local cache and the hub cannot be reached; check the network"
    except errors.HfHubHTTPError as error:
        why = f"cannot be downloaded ({os_reason(error):.200})"
    except (OSError, ValueError) as error:  # ValueError: the hub takes no such name
        why = f"cannot be downloaded ({os_reason(error):.200})"
    raise CheckpointError(f"{repository}{at} {why}.")

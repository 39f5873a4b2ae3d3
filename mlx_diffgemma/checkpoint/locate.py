"""From what a user names (a folder, a repository, "demo") to a folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_diffgemma.errors import CheckpointError

DEMO = "demo"
RELEASE = "google/diffusiongemma-26B-A4B-it"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


def locate(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint, downloaded from the Hugging Face hub if need be.

    "demo" is the small model that comes with this package.

    Raises:
        CheckpointError: no such folder or repository, or the hub cannot be reached.
    """
    if path_or_repo == DEMO:
        return Path(__file__).parents[1] / "demo" / "checkpoint"
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; name the folder that holds config.json.")
    if not _REPOSITORY.fullmatch(str(path_or_repo)):
        raise CheckpointError(
            f"{path_or_repo}: no such folder; give a folder, a Hugging Face repository "
            f'("owner/name"), or "{DEMO}".'
        )
    return _download(str(path_or_repo), revision)


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
        why = f"cannot be downloaded ({str(error).splitlines()[0]})"
    except OSError as error:
        why = f"cannot be downloaded ({error.strerror or error})"
    raise CheckpointError(f"{repository}{at} {why}.")

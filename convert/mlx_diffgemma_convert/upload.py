"""A finished folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_diffgemma.errors import CheckpointError


def prepare(repository: str) -> None:
    """Make the repository if it is not there, before hours are spent on what could not be uploaded.

    Raises:
        CheckpointError: there is no login, or no right to write there.
    """
    from huggingface_hub import HfApi

    _hub_call(repository, lambda: HfApi().create_repo(repository, exist_ok=True))


def upload(folder: Path, repository: str, *, dry_run: bool = False) -> dict[str, Any]:
    """Upload a folder, resumable; a dry run only says what would be sent."""
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
    prepare(repository)
    _hub_call(
        repository,
        lambda: HfApi().upload_folder(repo_id=repository, folder_path=folder),
    )
    return found


def _hub_call(repository: str, call: Any) -> None:
    from huggingface_hub import errors

    try:
        call()
    except errors.LocalTokenNotFoundError:
        raise CheckpointError(
            "no login for the Hugging Face hub; run `hf auth login` or set HF_TOKEN."
        ) from None
    except (errors.HTTPError, errors.HFValidationError, ConnectionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{repository} cannot be written ({reason}); check name, login and network, then run "
            "`mlx-diffgemma-convert upload` on the folder."
        ) from None

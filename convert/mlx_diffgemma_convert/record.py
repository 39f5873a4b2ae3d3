"""`conversion.json`: what was made from what and how, with checksums of everything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_diffgemma import __version__
from mlx_diffgemma.disk import write_atomically
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.reading import os_reason
from mlx_diffgemma_convert.plan import Plan
from mlx_diffgemma_convert.repository import json_bytes

RECORD = "conversion.json"


def conversion_record(
    plan: Plan, done: Mapping[str, Mapping[str, Any]], files: Mapping[str, str]
) -> dict[str, Any]:
    """The content of `conversion.json`. It holds no times, so that the same conversion writes the
    same bytes."""
    weights = {file: {"size": d["size"], "sha256": d["sha256"]} for file, d in done.items()}
    return {
        "tool": "mlx-diffgemma",
        "tool_version": __version__,
        "mlx_version": version("mlx"),
        "source": Path(plan.source.name).name if plan.source.revision is None else plan.source.name,
        "source_revision": plan.source.revision,
        **plan.settings,
        "weights": dict(sorted(weights.items())),
        "files": dict(sorted(files.items())),
        "tensors": {
            name: record for file in plan.shards for name, record in done[file]["tensors"].items()
        },
    }


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record with a checksum of itself."""
    write_atomically(folder / RECORD, json_bytes({**record, "checksum": _checksum(record)}))


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record back.

    Raises:
        CheckpointError: the record is missing or unreadable, or not as it was written.
    """
    path = folder / RECORD
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {RECORD}; only what this converter wrote can be verified."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({os_reason(error)}); check the path."
        ) from None
    try:
        record = json.loads(content)
        checksum = record.pop("checksum", None)
        intact = checksum == _checksum(record)
        intact = intact and json_bytes({**record, "checksum": checksum}) == content
    except (ValueError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path} is not as it was written; convert again.")
    return record


def _checksum(record: Mapping[str, Any]) -> str:
    return sha256(json_bytes(record)).hexdigest()

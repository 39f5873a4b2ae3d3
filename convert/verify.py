"""Is a converted checkpoint as it was written, and fit to run?"""

from __future__ import annotations

from pathlib import Path

from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma_convert.record import read_record
from mlx_diffgemma_convert.repository import file_digest


def verify(folder: Path) -> None:
    record = read_record(folder)
    for name, entry in record["weights"].items():
        if file_digest(folder / name) != entry["sha256"]:
            raise CheckpointError(f"{folder / name} is not as it was written; convert again.")
    for name, digest in record["files"].items():
        if file_digest(folder / name) != digest:
            raise CheckpointError(f"{folder / name} is not as it was written; convert again.")

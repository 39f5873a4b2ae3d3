"""Files that are replaced as a whole: a crash leaves the old one or the new one, never a part."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file, or make it; `path` with `.part` behind it is written first.

    Raises:
        OSError: the file cannot be written; what was at `path` is as it was.
    """
    partial = path.with_name(f"{path.name}.part")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    put_in_place(partial, path)


def put_in_place(partial: Path, path: Path) -> None:
    """Give a file that is whole, and on the disk, the name of the file that it replaces.

    Raises:
        OSError: the file cannot be renamed, and `path` is as it was; or the folder cannot be
            brought to the disk.
    """
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the renames within a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

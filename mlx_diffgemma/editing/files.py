"""Files that are edited in place: read as they are, replaced whole or not at all."""

from __future__ import annotations

import difflib
import os
import tempfile
from pathlib import Path

from mlx_diffgemma import disk
from mlx_diffgemma.errors import DiffGemmaError, UsageError

_NO_NEWLINE = "\\ No newline at end of file\n"


class FileError(DiffGemmaError):
    """A file cannot be read or written."""


def read_text(path: str | Path) -> str:
    """A file as text, its line ends and byte-order mark included.

    Raises:
        FileError: it cannot be read.
        UsageError: it is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text (byte {error.start}); re-encode it first."
        ) from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from None


def replace_text(path: str | Path, text: str) -> None:
    """Replace what a file holds at one stroke: whoever looks, at whatever moment, and whatever
    interrupts, finds the old text or the new one. Mode bits stay; a symbolic link stays one.

    Raises:
        FileError: it cannot be written; the file is as it was.
    """
    target = Path(os.path.realpath(path))
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fchmod(file.fileno(), target.stat().st_mode & 0o7777)
            os.fsync(file.fileno())
        Path(temporary).replace(target)
        temporary = None
        disk.sync(target.parent)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}; it is as it was.") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def unified_diff(before: str, after: str, name: str) -> str:
    """What changed, as `diff -u` shows it; empty where nothing did."""
    lines = difflib.unified_diff(split_lines(before), split_lines(after), f"a/{name}", f"b/{name}")
    return "".join(line if line.endswith("\n") else f"{line}\n{_NO_NEWLINE}" for line in lines)


def split_lines(text: str) -> list[str]:
    """The lines of a text with their ends; only "\\n" and "\\r\\n" end a line, as in editors."""
    lines = text.split("\n")
    return [f"{line}\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])

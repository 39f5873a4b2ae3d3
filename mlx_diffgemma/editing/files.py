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
        FileError: the file cannot be read.
        UsageError: the file is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text (byte {error.start}); re-encode it first."
        ) from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}; check the path.") from None
    except ValueError:
        raise FileError("a name of a file has no null byte; check the path.") from None


def check_writable(path: str | Path) -> None:
    """Raise FileError where a file is marked as read-only, whoever asks: a file can be replaced in
    a folder that one may write to, whatever its own mode says."""
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}; check the path.") from None
    except ValueError:
        raise FileError("a name of a file has no null byte; check the path.") from None
    if not mode & 0o222 or not os.access(path, os.W_OK):
        raise FileError(f"{path} is read-only; --force writes it all the same.")


def replace_text(path: str | Path, text: str, *, force: bool = False) -> list[str]:
    """Replace what a file holds in one rename: whoever reads it at any moment, even after an
    interruption, finds the old text or the new one. Mode bits, owner, group and extended attributes
    stay as far as the system lets them; a symbolic link stays one.

    Args:
        force: whether a read-only file is replaced too.

    Returns:
        One sentence for each thing that was lost: hard links, owner, extended attributes.

    Raises:
        FileError: the file is read-only or cannot be written; it is as it was.
    """
    if not force:
        check_writable(path)
    target = Path(os.path.realpath(path))
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode())
            file.flush()
            lost = _take_over(target, file.fileno())
            os.fsync(file.fileno())
        disk.put_in_place(Path(temporary), target)
        temporary = None
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}; it is as it was.") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return lost


def _take_over(target: Path, handle: int) -> list[str]:
    """Give an open file what is known of `target` besides its text; returns what is lost."""
    known, lost = target.stat(), []
    if known.st_nlink > 1:
        others = "another name" if known.st_nlink == 2 else f"{known.st_nlink - 1} other names"
        lost.append(f"{target.name} had {others} (hard links), under which the old text stays.")
    made = os.fstat(handle)
    if (made.st_uid, made.st_gid) != (known.st_uid, known.st_gid):
        try:
            os.fchown(handle, known.st_uid, known.st_gid)
        except OSError:
            lost.append(f"{target.name} belongs to you now; its owner or group could not be kept.")
    os.fchmod(handle, known.st_mode & 0o7777)  # after fchown, which takes bits away
    # Python knows extended attributes on Linux only.
    if hasattr(os, "listxattr"):
        kept = True
        for name in _attributes(target):
            try:
                os.setxattr(handle, name, os.getxattr(target, name))
            except OSError:
                kept = False
        if not kept:
            lost.append(f"Some extended attributes of {target.name} could not be kept.")
    return lost


def _attributes(target: Path) -> list[str]:
    try:
        return os.listxattr(target)
    except OSError:
        return []  # the file system has none


def unified_diff(before: str, after: str, name: str) -> str:
    """What changed, as `diff -u` shows it; empty where nothing did."""
    lines = difflib.unified_diff(split_lines(before), split_lines(after), f"a/{name}", f"b/{name}")
    return "".join(line if line.endswith("\n") else f"{line}\n{_NO_NEWLINE}" for line in lines)


def split_lines(text: str) -> list[str]:
    """The lines of a text with their ends; only "\\n" and "\\r\\n" end a line, as in editors."""
    lines = text.split("\n")
    return [f"{line}\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])

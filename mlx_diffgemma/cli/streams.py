"""stdin, stdout and stderr: what to do where they are closed or broken, and JSON in any
encoding."""

from __future__ import annotations

import codecs
import json
import os
import sys
from typing import Any


def prepare() -> None:
    """Make the three streams usable. A stdin that is closed (`<&-`) reads as empty, and what is
    written to a stderr that is closed goes nowhere: without a file in its place, the next file that
    is opened would take its number.

    Raises:
        SystemExit: stdout is closed, which was said on stderr.
    """
    closed = [number for number in range(3) if not _is_open(number)]
    for number in closed:
        nowhere = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an answer may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    if 1 in closed:
        print(
            "error: stdout is closed; send it to /dev/null to drop what is written there.",
            file=sys.stderr,
        )
        sys.exit(1)


def as_line(value: Any) -> str:
    """JSON on one line for stdout. In an encoding other than UTF-8 it is written in ASCII, for JSON
    is read as UTF-8."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    return json.dumps(value, ensure_ascii=codecs.lookup(encoding).name != "utf-8")


def discard() -> OSError | None:
    """Redirect stdout and stderr to nowhere where they cannot be written to, since Python flushes
    what is buffered at exit. Returns the error of stdout, or None."""
    wrong = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            wrong = error if stream is sys.stdout else wrong
            _redirect(stream)
    return wrong


def _redirect(stream: Any) -> None:
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # not a real file
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True

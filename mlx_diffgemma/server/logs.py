"""Log lines of `name=value`, one a request, with its id and without the text of prompts."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any

log = logging.getLogger("mlx_diffgemma.server")

_PLAIN = re.compile(r"[^\s\"=\x00-\x20\x7f-\uffff]+")
_LONGEST = 2000  # characters of a value
_BROKEN = 500


def line(**fields: Any) -> str:
    """Fields as `name=value`; a text with spaces or signs in it is written as JSON, so that nobody
    can forge a line."""
    return " ".join(f"{name}={_value(value)}" for name, value in fields.items())


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = value if isinstance(value, str) else json.dumps(value)
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def note(scope: Any, **fields: Any) -> None:
    """Add fields to the line of a request: `note(request.scope, model="demo")`."""
    scope.setdefault("log", {}).update(fields)


def failed(scope: Any, status: int, error: BaseException) -> None:
    """Log the traceback of an error that no client can cause, with the id of its request."""
    if status == _BROKEN:
        log.error(line(event="error", id=scope.get("request_id", "")), exc_info=error)


class Lines(logging.Formatter):
    """A formatter that puts the time in UTC and the level before every line."""

    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__(
            "time=%(asctime)s.%(msecs)03dZ level=%(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"
        )


class Stderr(logging.StreamHandler):
    """A handler that writes to the `sys.stderr` of the moment, which may have been replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        self.stream = sys.stderr
        super().emit(record)


def start(level: int = logging.INFO) -> None:
    """Write the log to stderr."""
    handler = Stderr()
    handler.setFormatter(Lines())
    log.setLevel(level)
    for each in (log, logging.getLogger("uvicorn.error")):
        each.handlers[:] = [handler]

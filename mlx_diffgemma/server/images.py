"""Pictures in requests: only as data, never as an address that the server would open."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from typing import Any, TypeAlias

from mlx_diffgemma.errors import PromptError
from mlx_diffgemma.server.engine import Engine
from mlx_diffgemma.server.refusals import RefusedError
from mlx_diffgemma.text.pictures import read_picture

_DATA = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE)

See: TypeAlias = "Callable[[str, str], dict[str, Any]]"
"""Takes a picture in base64, and what an error calls it; returns a part of a message."""


def picture(engine: Engine, data: bytes, where: str) -> dict[str, Any]:
    """A part of a message that shows a picture, from the bytes of its file.

    Raises:
        RefusedError: the model reads no pictures, or `data` is none (400).
    """
    vision = engine.model.config.vision if engine.model.reads_pictures else None
    if vision is None:
        raise RefusedError(
            400, f"{where} is a picture, and this model reads no pictures; leave it out.", where
        )
    try:
        return {"type": "image", "image": read_picture(data, vision, name=where)}
    except PromptError as error:
        raise RefusedError(400, str(error), where) from None


def from_url(engine: Engine, url: str, most: int, where: str) -> dict[str, Any]:
    """A part of a message that shows the picture in a data URL of at most `most` bytes.

    Raises:
        RefusedError: it is another kind of URL, damaged, too large, or cannot be read.
    """
    start = _DATA.match(url)
    if start is None:
        raise RefusedError(
            400,
            f"{where} must be a picture in the request itself (data:image/png;base64,...); no "
            "address is opened.",
            where,
        )
    return from_base64(engine, most, url[start.end() :], where)


def from_base64(engine: Engine, most: int, encoded: str, where: str) -> dict[str, Any]:
    """A part of a message that shows a picture of at most `most` bytes, given in base64.

    Raises:
        RefusedError: it is damaged, too large, or cannot be read.
    """
    if len(encoded) * 3 // 4 > most + 3:
        raise RefusedError(400, f"{where} has more than {most} bytes; make it smaller.", where)
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise RefusedError(400, f"{where} is no base64; encode the picture again.", where) from None
    return picture(engine, data, where)

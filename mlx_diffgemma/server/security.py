"""Who is answered and how much of a request is taken."""

from __future__ import annotations

import math
from typing import Any

from mlx_diffgemma.server.config import ServerSettings
from mlx_diffgemma.server.refusals import RefusedError

_LARGEST = 10**300
_SCHEMAS = ("response_format", "format", "json_schema", "schema", "tools", "output_config")


def check_bounds(body: dict[str, Any], settings: ServerSettings, *, surrogates: bool) -> None:
    """Refuse a body that holds too much, or what no handler should have to think of: numbers
    beyond all bounds, and halves of characters.

    Args:
        surrogates: whether there may be halves of characters.

    Raises:
        RefusedError: it does (400 or 413).
    """
    messages = body.get("messages")
    if isinstance(messages, list) and len(messages) > settings.max_messages:
        raise RefusedError(
            400,
            f"messages has {len(messages)} items, and at most {settings.max_messages} are read.",
            "messages",
        )
    for key, value in body.items():
        size, depth = _measure(value, key, settings, surrogates)
        if key in _SCHEMAS and size > settings.max_schema:
            raise RefusedError(
                400, f"{key} is too large; a schema may hold {settings.max_schema} bytes.", key
            )
        if depth >= settings.max_depth:
            raise RefusedError(400, f"{key} is nested too deep.", key)


def _measure(value: Any, key: str, settings: ServerSettings, surrogates: bool) -> tuple[int, int]:
    """About how many bytes of JSON a value takes, and how deep it is."""
    size, depth = 0, 0
    level = [value]
    while level and depth <= settings.max_depth:
        depth += 1
        inside: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inside += [*each.keys(), *each.values()]
            elif isinstance(each, list):
                inside += each
            elif isinstance(each, str):
                size += len(each)
                _check_text(each, key, settings, surrogates)
            elif isinstance(each, (int, float)) and not _bounded(each):
                raise RefusedError(400, f"{key} holds a number that is too large.", key)
        size += 2 * len(inside)
        level = inside
    return size, depth


def _bounded(number: float) -> bool:
    return math.isfinite(number) if isinstance(number, float) else abs(number) < _LARGEST


def _check_text(text: str, key: str, settings: ServerSettings, surrogates: bool) -> None:
    if len(text) > settings.max_image * 4 // 3 + 64:
        raise RefusedError(413, f"{key} holds a text or an image that is too large.", key)
    if surrogates and any("\ud800" <= character <= "\udfff" for character in text):
        raise RefusedError(400, f"{key} holds half of a character (a lone surrogate).", key)

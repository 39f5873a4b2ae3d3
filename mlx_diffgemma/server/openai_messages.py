"""The conversation of a request, as OpenAI's clients spell it."""

from __future__ import annotations

import json
from typing import Any

from mlx_diffgemma.server.engine import Engine
from mlx_diffgemma.server.fields import Fields
from mlx_diffgemma.server.images import from_url

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
    "tool": "tool", "function": "tool",
}  # fmt: skip


def messages_of(fields: Fields, engine: Engine, most: int) -> list[dict[str, Any]]:
    """A conversation in the library's form; a picture in it may have at most `most` bytes.

    Raises:
        RefusedError: a message is malformed or holds what cannot be read (400).
    """
    found = []
    names: dict[str, str] = {}  # of the functions that were called, by the ids of the calls
    for message in fields.objects("messages", required=True):
        role = _ROLES[str(message.choice("role", _ROLES, required=True))]
        read: dict[str, Any] = {"role": role, "content": _content(message, engine, most)}
        name, thought = message.text("name"), message.text("reasoning_content")
        if role == "assistant":
            calls = [_call(each, names) for each in message.objects("tool_calls")]
            thought = thought or message.text("reasoning")
            read |= {"tool_calls": calls or None, "reasoning_content": thought}
            if read["content"] is None and not calls:
                read["content"] = message.text("refusal") or ""
        elif role == "tool":
            called = message.text("tool_call_id")
            read |= {"tool_call_id": called, "name": name or names.get(called or "")}
        if read["content"] is None and role != "assistant":
            raise message.refused("content", "is missing.")
        found.append({key: value for key, value in read.items() if value is not None})
        message.settle(
            {
                "audio": "holds sound, and only text is read; leave it out.",
                "function_call": "is deprecated; use tool_calls.",
            },
            ["refusal", "annotations", "id"],
        )
    if not found:
        raise fields.refused("messages", "is empty; give at least one message.")
    return found


def _content(message: Fields, engine: Engine, most: int) -> str | list[dict[str, Any]] | None:
    if not isinstance(message.data.get("content"), list):
        return message.text("content")
    parts: list[dict[str, Any]] = []
    for part in message.objects("content"):
        kind = part.choice("type", ("text", "image_url", "refusal"), required=True)
        if kind == "image_url":
            url = part.data.get("image_url")
            image = part.within("image_url", required=True) if isinstance(url, dict) else None
            text = part.text("image_url") if image is None else image.text("url", required=True)
            parts.append(from_url(engine, str(text), most, part.name("image_url")))
        else:
            parts.append({"type": "text", "text": part.text(str(kind), required=True)})
    return parts


def _call(call: Fields, names: dict[str, str]) -> dict[str, Any]:
    """A call of an earlier turn, with its arguments as an object. `names` takes in its name by its
    id."""
    called, kind = call.text("id"), call.text("type")
    if kind not in (None, "function"):
        raise call.refused("type", "must be function; other tools are not known here.")
    function = call.within("function", required=True)
    assert function is not None
    name = str(function.text("name", required=True))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise function.refused("arguments", "must be JSON.") from None
    if not isinstance(arguments, dict):
        raise function.refused("arguments", "must be an object, as JSON.")
    if called:
        names[called] = name
    return {"id": called, "type": "function", "function": {"name": name, "arguments": arguments}}

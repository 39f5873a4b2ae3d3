"""Messages and tools as callers have them, made into the plain data that a chat template reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from inspect import isroutine
from typing import Any

from mlx_diffgemma.errors import PromptError, UsageError
from mlx_diffgemma.reading import shown
from mlx_diffgemma.text.pictures import Picture

_PARTS = "'content' must be a text or a list of parts"


def checked_messages(items: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages that a template can read. Keys whose value is null are left out, as transformers
    leaves them out, and calls of tools have their arguments as objects.

    Raises:
        PromptError: one of them is malformed; it is named by its number.
    """
    return [_checked(as_data(item), number) for number, item in enumerate(items, start=1)]


def as_data(value: Any) -> Any:
    """`value` with dataclasses and pydantic models in it as dicts, and tuples as lists; pictures
    stay what they are."""
    if isinstance(value, Mapping):
        return {key: as_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_data(item) for item in value]
    if isinstance(value, Picture):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_data(getattr(value, field.name)) for field in fields(value)}
    dump = None if isinstance(value, type) else getattr(value, "model_dump", None)
    return as_data(dump()) if callable(dump) else value


def _checked(item: Any, number: int) -> dict[str, Any]:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str):
        raise PromptError(
            f'message {number} must be an object like {{"role": "user", "content": "..."}}, '
            f"not {item!r:.60}."
        )
    message = {key: value for key, value in item.items() if value is not None}
    if message.get("tool_calls"):
        message["tool_calls"] = _with_objects(message["tool_calls"], number)
    content = message.get("content", "")
    if isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise PromptError(f"message {number}: {_PARTS}.")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image", "video") and part.get(kind) is not None:
            continue
        if kind in ("image_url", "audio"):
            raise PromptError(f"message {number} holds {kind} data, which is not read here.")
        if kind in ("image", "video"):
            raise PromptError(
                f'message {number}: a part with a picture must be {{"type": "image", "image": '
                f'...}}, or "video" with a path, not {shown(part)}.'
            )
        if kind != "text" or not isinstance(part.get("text"), str):
            raise PromptError(
                f'message {number}: a part of its content must be {{"type": "text", "text": '
                f'"..."}}, not {part!r:.60}.'
            )
    return message


def _with_objects(calls: Any, number: int) -> list[dict[str, Any]]:
    """Calls of tools whose arguments are objects; some callers keep them as JSON text."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise PromptError(f"message {number}: 'tool_calls' must be a list of objects.")
    read: list[dict[str, Any]] = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict):
            read.append({**call, "function": _with_object(function)})
        else:
            read.append(_with_object(call))
    return read


def _with_object(function: dict[str, Any]) -> dict[str, Any]:
    try:
        arguments = json.loads(function["arguments"])
    except (KeyError, RecursionError, TypeError, ValueError):  # an object already, none, or no JSON
        return function
    return {**function, "arguments": arguments} if isinstance(arguments, dict) else function


def checked_tools(tools: Any) -> list[dict[str, Any]]:
    """Tools as the objects that templates read: `{"type": "function", "function": {...}}`.

    A Python function becomes one by its name, type hints and docstring. The description of a
    function alone (`{"name": ..., "parameters": ...}`) is put into such an object.

    Raises:
        UsageError: one of them is no function and no description of one; it is named.
    """
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Iterable):
        raise UsageError("tools must be a list of functions, or of objects that describe them.")
    return [_checked_tool(tool, number) for number, tool in enumerate(tools, start=1)]


def _checked_tool(tool: Any, number: int) -> dict[str, Any]:
    if isroutine(tool):
        return _described(tool)
    described = as_data(tool)
    if isinstance(described, dict) and "function" not in described and "name" in described:
        described = {"type": "function", "function": described}
    function = described.get("function") if isinstance(described, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UsageError(
            f'tool {number} must be a function, or an object like {{"type": "function", '
            f'"function": {{"name": "...", "parameters": {{...}}}}}}, not {tool!r:.60}.'
        )
    return dict(described)


def _described(function: Any) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    try:
        return dict(get_json_schema(function))
    except (DocstringParsingException, TypeHintParsingException, NameError, ValueError) as error:
        name = getattr(function, "__name__", "?")
        raise UsageError(
            f"tool {name}: no description can be made of it "
            f"({' '.join(str(error).split()).rstrip('.!')}); give it type hints and a docstring "
            "with an 'Args:' section, or describe it by an object."
        ) from error


def text_of(message: Mapping[str, Any]) -> str:
    """What a message says, its parts of text joined."""
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def with_plain_content(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is its parts of text joined, for templates that only print it."""
    return {**message, "content": text_of(message)} if "content" in message else message


def with_images(messages: Sequence[dict[str, Any]], images: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages with `images` before the content of the last message of a user.

    Raises:
        PromptError: there is no such message.
    """
    found = list(messages)
    for place in range(len(found) - 1, -1, -1):
        if found[place]["role"] == "user":
            content = found[place].get("content", "")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            shown_first = [
                image if isinstance(image, dict) else {"type": "image", "image": image}
                for image in images
            ]
            found[place] = {**found[place], "content": [*shown_first, *parts]}
            return found
    raise PromptError("pictures belong to a message of a user, and there is none.")


def media_in(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The parts of messages that hold pictures or videos, in order."""
    contents = (message.get("content") for message in messages)
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return [part for part in parts if part["type"] != "text"]


def with_places(
    messages: Sequence[dict[str, Any]], places: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Messages with the parts `places` in the place of those that `media_in` finds, in order."""
    given, found = iter(places), []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = [part if part["type"] == "text" else next(given) for part in content]
            message = {**message, "content": parts}
        found.append(message)
    return found


def strings_in(value: Any) -> list[str]:
    """Every string in `value`, the keys of objects among them."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        return [string for item in value for string in strings_in(item)]
    return []

"""From what a user asks to the token ids that the encoder reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from mlx_diffgemma.checks import check_flag, check_text
from mlx_diffgemma.errors import PromptError, UsageError
from mlx_diffgemma.reading import shown
from mlx_diffgemma.text.chat_template import render, template_text
from mlx_diffgemma.text.control_tokens import ControlTokens, unused_character
from mlx_diffgemma.text.tokenizer import check_tokenizer, hf_tokenizer

Prompt: TypeAlias = "str | Sequence[Mapping[str, Any]] | Sequence[int]"

_CHANNEL = ("<|channel>", "<channel|>")
_EMPTY = "the prompt is empty; say what to write about."
_READS_PARTS = re.compile(r"""['"]text['"]|\.text\b""")


def encode_prompt(
    tokenizer: Any,
    prompt: Prompt,
    *,
    raw: bool = False,
    system_prompt: str | None = None,
    thinking: bool | None = None,
    controls: ControlTokens | None = None,
) -> list[int]:
    """Token ids of a prompt.

    Text of the user that spells a control token stays text. Only token ids are taken as they are.

    Args:
        tokenizer: mlx-lm's wrapper or a Hugging Face tokenizer.
        prompt: a text, which becomes a user's turn; messages, as `{"role": ..., "content": ...}`;
            or token ids.
        raw: use no chat template; `prompt` is a text.
        system_prompt: a system message before the others.
        thinking: whether the answer begins with a chain of thought; None leaves it to the template.
        controls: the tokenizer's, for a caller with many prompts.

    Raises:
        PromptError: the prompt is empty, malformed, or holds images.
        UsageError: the settings contradict each other, or the template cannot think.
        CheckpointError: the chat template is missing or broken.
    """
    check_tokenizer(tokenizer)
    if system_prompt is not None:
        check_text("system_prompt", system_prompt)
    for name, value in (("raw", raw), ("thinking", thinking)):
        if value is not None:
            check_flag(name, value)
    if isinstance(prompt, str):
        if not prompt or not (raw or prompt.strip()):
            raise PromptError(_EMPTY)
        if raw:
            _refuse(system_prompt, thinking, "a raw prompt")
            _check_unicode(prompt)
            controls = controls or ControlTokens(hf_tokenizer(tokenizer))
            return controls.encode_text(prompt, add_special_tokens=True)
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise PromptError(
            f"a prompt is a text, messages or token ids, not {shown(prompt)}; give one of them."
        )
    items = list(prompt)
    if not items:
        raise PromptError(_EMPTY)
    if all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        _refuse(system_prompt, thinking, "a prompt of token ids")
        return [int(item) for item in items]  # type: ignore[call-overload]
    if raw:
        raise UsageError("a raw prompt is a text; leave out raw to send messages.")
    return _encode_messages(hf_tokenizer(tokenizer), items, system_prompt, thinking, controls)


def _encode_messages(
    tokenizer: Any,
    items: list[Any],
    system_prompt: str | None,
    thinking: bool | None,
    controls: ControlTokens | None,
) -> list[int]:
    template = template_text(tokenizer)
    messages = [_checked(item, number) for number, item in enumerate(items, start=1)]
    if messages[-1]["role"] == "user" and not _text_of(messages[-1]).strip():
        raise PromptError(_EMPTY)
    if system_prompt is not None:
        if messages[0]["role"] in ("system", "developer"):
            raise UsageError("the messages have a system prompt already; leave out the other.")
        messages.insert(0, {"role": "system", "content": system_prompt})
    if not _READS_PARTS.search(template):
        messages = [_with_plain_content(message) for message in messages]
    settings: dict[str, bool] = {}
    if thinking is not None:
        if "enable_thinking" not in template:
            raise UsageError(
                "this checkpoint's chat template knows no thinking mode; leave out "
                f"--{'' if thinking else 'no-'}thinking."
            )
        settings["enable_thinking"] = thinking
    strings = _strings(messages)
    for string in strings:
        _check_unicode(string)
    controls = controls or ControlTokens(tokenizer)
    if not any(controls.breaks(string) for string in strings):
        ids: list[int] = tokenizer.encode(
            render(tokenizer, messages, **settings), add_special_tokens=False
        )
        return ids
    marker = unused_character(template, *strings)
    own = [name for name in _CHANNEL if _CHANNEL[1] in template]
    marked = [_marked(controls, message, marker, own) for message in messages]
    rendered = render(tokenizer, marked, **settings)
    return controls.encode_rendered(rendered, marker)


def _marked(
    controls: ControlTokens, message: dict[str, Any], marker: str, own: Sequence[str]
) -> dict[str, Any]:
    """A message whose text can spell no control token. In what the model said the markers `own`
    stay whole, by which the template finds the thoughts that it leaves out."""
    marked: dict[str, Any] = controls.mark(message, marker)
    if message["role"] in ("assistant", "model") and isinstance(message.get("content"), str):
        marked["content"] = controls.mark(message["content"], marker, own)
    return marked


def _checked(item: Any, number: int) -> dict[str, Any]:
    """A message that a template can read, or an error that names it by its number."""
    if not isinstance(item, Mapping) or not isinstance(item.get("role"), str):
        raise PromptError(
            f'message {number} must be an object like {{"role": "user", "content": "..."}}, '
            f"not {item!r:.60}."
        )
    content = item.get("content")
    message = dict(item)
    if item.get("tool_calls"):
        message["tool_calls"] = _with_objects(item["tool_calls"], number)
    elif content is None and ("content" not in item or item["role"] == "user"):
        raise PromptError(f"message {number}: 'content' must be a text or a list of parts.")
    if content is None or isinstance(content, str):
        return message
    if not isinstance(content, (list, tuple)):
        raise PromptError(f"message {number}: 'content' must be a text or a list of parts.")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("image", "image_url", "audio", "video"):
            raise PromptError(f"message {number} holds {kind} data: only text is supported yet.")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise PromptError(
                f'message {number}: a part of its content must be {{"type": "text", "text": '
                f'"..."}}, not {part!r:.60}.'
            )
    return message


def _with_objects(calls: Any, number: int) -> list[dict[str, Any]]:
    """Calls of tools whose arguments are objects; some callers keep them as JSON text."""
    if not isinstance(calls, (list, tuple)) or not all(isinstance(c, Mapping) for c in calls):
        raise PromptError(f"message {number}: 'tool_calls' must be a list of objects.")
    read: list[dict[str, Any]] = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, Mapping):
            read.append({**call, "function": _with_object(function)})
        else:
            read.append(_with_object(call))
    return read


def _with_object(function: Mapping[str, Any]) -> dict[str, Any]:
    try:
        arguments = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError):  # an object already, none, or no JSON
        return dict(function)
    return {**function, "arguments": arguments} if isinstance(arguments, dict) else dict(function)


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _with_plain_content(message: dict[str, Any]) -> dict[str, Any]:
    """For templates that only print `content`: its parts joined."""
    return message if message.get("content") is None else {**message, "content": _text_of(message)}


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        return [string for item in value for string in _strings(item)]
    return []


def _refuse(system_prompt: str | None, thinking: bool | None, what: str) -> None:
    """Settings of the chat template mean nothing where none is used."""
    for name, value in (("system prompt", system_prompt), ("thinking mode", thinking)):
        if value is not None:
            raise UsageError(f"a {name} needs the chat template; {what} uses none.")


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt is not valid Unicode at character {error.start + 1}; "
            "give it as text in UTF-8."
        ) from error

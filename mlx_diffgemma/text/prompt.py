"""From what a user asks to the token ids that the encoder reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, TypeAlias

from mlx_diffgemma.checks import overridden
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import PromptError, UsageError
from mlx_diffgemma.pictured import PicturedIds
from mlx_diffgemma.reading import shown
from mlx_diffgemma.text.chat_template import render, template_text
from mlx_diffgemma.text.control_tokens import (
    ControlTokens,
    control_tokens_of,
    unused_character,
)
from mlx_diffgemma.text.markers import CHANNEL, THINK
from mlx_diffgemma.text.messages import (
    checked_messages,
    checked_tools,
    media_in,
    strings_in,
    text_of,
    with_images,
    with_places,
    with_plain_content,
)
from mlx_diffgemma.text.picture_places import PictureReader
from mlx_diffgemma.text.pictures import Picture
from mlx_diffgemma.text.prompt_settings import PromptSettings, Tools
from mlx_diffgemma.text.tokenizer import check_tokenizer, hf_tokenizer

Prompt: TypeAlias = "str | Sequence[Any] | Mapping[str, Any] | Any"
"""A text, messages, or token ids in a list, a tuple, an array or a `BatchEncoding`."""

THOUGHT_MARKERS = (CHANNEL, *THINK)  # by them templates find the thoughts that they leave out
_EMPTY = "the prompt is empty; say what to write about."
_READS_IMAGES = re.compile(r"""['"]image['"]""")
_READS_PARTS = re.compile(r"""['"]text['"]|\.text\b""")
_OURS = (  # what the chat template gets from elsewhere than `chat_template_kwargs`
    "messages", "conversation", "tools", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)  # fmt: skip


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model reads it.

    Attributes:
        ids: its token ids, with its pictures where it has any.
        prefill: the text that the model's turn begins with, as the template has it, or "".
        thinking: whether a thought is expected at the beginning of the answer.
    """

    ids: list[int]
    prefill: str = ""
    thinking: bool = False


def encode_prompt(
    tokenizer: Any, prompt: Prompt, how: PromptSettings | None = None, **settings: Any
) -> list[int]:
    """Token ids of a prompt; arguments and errors as for `encode`."""
    return encode(tokenizer, prompt, how, **settings).ids


def encode(
    tokenizer: Any,
    prompt: Prompt,
    how: PromptSettings | None = None,
    *,
    config: ModelConfig | None = None,
    **settings: Any,
) -> Encoded:
    """A prompt as the model reads it; an `Encoded` prompt is returned as it is.

    Text of the user that spells a control token stays text, unless `markers` says otherwise. Only
    token ids are taken as they are.

    Args:
        tokenizer: mlx-lm's wrapper or a Hugging Face tokenizer.
        prompt: a text, which becomes a user's turn; messages, as `{"role": ..., "content": ...}`;
            or token ids in a list, a tuple, an array or a `BatchEncoding`.
        how: the settings; None stands for the defaults.
        config: the model's config (`model.config`), which pictures need.
        settings: fields of `PromptSettings` to put over `how`.

    Raises:
        PromptError: the prompt is empty, malformed or of an unknown kind, or a picture cannot be
            read.
        UsageError: the settings contradict each other, or the template cannot do what they ask.
        CheckpointError: the chat template is missing or broken.
    """
    check_tokenizer(tokenizer)
    if isinstance(prompt, Encoded):
        return prompt
    if isinstance(prompt, PicturedIds):
        return Encoded(prompt)
    how = overridden(how or PromptSettings(), settings)
    reader, images = PictureReader(config, how.image_tokens), how.images
    if isinstance(prompt, str):
        if not (images or (prompt if how.raw else prompt.strip())):
            raise PromptError(_EMPTY)
        if how.raw:
            how.refuse_template("a raw prompt")
            _check_unicode(prompt)
            ids = _encode_raw(hf_tokenizer(tokenizer), prompt, how.markers)
            return Encoded(reader.in_ids(ids, images, tokenizer.bos_token_id))
        items: list[Any] = [{"role": "user", "content": prompt}]
    else:
        items = _items(prompt)
    if all(isinstance(item, Integral) and not isinstance(item, bool) for item in items):
        how.refuse_template("a prompt of token ids")
        return Encoded(reader.in_ids([int(item) for item in items], images, None))
    if how.raw:
        raise UsageError("a raw prompt is a text; leave out raw to send messages.")
    own = hf_tokenizer(tokenizer)
    messages = checked_messages(items)
    if images:
        messages = with_images(messages, images)
    last = messages[-1]
    is_asked = last["role"] == "user" and "content" in last
    if is_asked and not text_of(last).strip() and not media_in([last]):
        raise PromptError(_EMPTY)
    if how.system_prompt is not None:
        if messages[0]["role"] in ("system", "developer"):
            raise UsageError("the messages have a system prompt already; leave out the other.")
        messages.insert(0, {"role": "system", "content": how.system_prompt})
    described = checked_tools(how.tools) if how.tools else []
    template = template_text(own, tools=bool(described))
    variables = _variables(template, how.chat_template_kwargs, how.thinking)
    if described and not re.search(r"\btools\b", template):
        raise UsageError("this checkpoint's chat template knows no tools; leave them out.")
    begun = how.prefill_response
    if begun is not None:
        messages.append({"role": "assistant", "content": begun})
    chat = _Chat(messages, described, variables, prefilled=begun is not None)
    ids, rendered = _encode_chat(own, chat, template, reader)
    prefill = "" if begun is None else _as_rendered(begun, rendered)
    # What follows a beginning of the answer's text is no thought.
    return Encoded(ids, prefill, bool(variables.get("enable_thinking")) and not prefill)


def encode_conversation(
    tokenizer: Any,
    messages: Sequence[Any],
    *,
    thinking: bool | None = None,
    tools: Tools | None = None,
) -> list[int]:
    """Token ids of messages without a turn opened behind them; arguments and errors as for
    `encode`."""
    own, described = hf_tokenizer(tokenizer), checked_tools(tools) if tools else []
    template = template_text(own, tools=bool(described))
    variables = _variables(template, None, thinking)
    chat = _Chat(checked_messages(messages), described, variables, open_turn=False)
    return _encode_chat(own, chat, template, PictureReader())[0]


def rows_of(prompts: Any) -> list[Any]:
    """The prompts of a batch: a list of them, rows of an array, or those of a `BatchEncoding`.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        masks = prompts.get("attention_mask")
        rows = [{"input_ids": row} for row in prompts["input_ids"]]
        return [
            row if masks is None else {**row, "attention_mask": mask}
            for row, mask in zip(rows, rows if masks is None else masks, strict=True)
        ]
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Sequence):
        kind = "one text" if isinstance(prompts, str) else f"of the type {type(prompts).__name__}"
        raise UsageError(f"prompts is {kind}; give a list of prompts, or use generate.")
    return list(prompts)


def _items(prompt: Any) -> list[Any]:
    """The messages or token ids of a prompt that is no text."""
    mask = None
    if isinstance(prompt, Mapping) and "input_ids" in prompt:
        mask = prompt.get("attention_mask")
        prompt = prompt["input_ids"]
    prompt = getattr(prompt, "messages", prompt)
    items = _row(prompt)
    if items is None:
        raise PromptError(
            "a prompt must be a text, a list of messages, or token ids, not of the type "
            f"{type(prompt).__name__}."
        )
    if mask is not None:  # ids that only fill up a batch are no part of the prompt
        items = [item for item, counts in zip(items, _row(mask) or [], strict=True) if counts]
    if not items:
        raise PromptError(_EMPTY)
    return items


def _row(values: Any) -> list[Any] | None:
    """A list of what a list, a tuple or an array holds, or None for anything else. An array of one
    row is that row."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        return None
    row = [item.tolist() if hasattr(item, "tolist") else item for item in values]
    if row and all(isinstance(item, (list, tuple)) for item in row):
        if len(row) > 1:
            raise PromptError(f"the prompt is {len(row)} prompts; give them to batch_generate.")
        return list(row[0])
    return row


def _encode_raw(tokenizer: Any, text: str, markers: bool) -> list[int]:
    if not markers:
        return control_tokens_of(tokenizer).encode_text(text, add_special_tokens=True)
    bos = tokenizer.bos_token
    ids: list[int] = tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos)))
    return ids


def _variables(
    template: str, given: Mapping[str, Any] | None, thinking: bool | None
) -> dict[str, Any]:
    """The variables of the chat template that the caller sets."""
    if given is not None and not isinstance(given, Mapping):
        raise UsageError(f"chat_template_kwargs must be an object, not {shown(given)}.")
    variables = dict(given or {})
    for name in variables:
        if not isinstance(name, str) or name in _OURS:
            raise UsageError(f"chat_template_kwargs cannot set {name!r}; leave it out.")
    if thinking is None:
        return variables
    if "enable_thinking" not in template:
        raise UsageError(
            "this checkpoint's chat template knows no thinking mode; leave out "
            f"--{'' if thinking else 'no-'}thinking."
        )
    if variables.get("enable_thinking", thinking) != thinking:
        raise UsageError("thinking and chat_template_kwargs contradict each other: drop one.")
    return {**variables, "enable_thinking": thinking}


@dataclass(frozen=True)
class _Chat:
    """What a chat template is to render.

    Attributes:
        prefilled: whether the last message is the beginning of the answer.
        open_turn: whether the answer's turn is opened.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    variables: dict[str, Any]
    prefilled: bool = False
    open_turn: bool = True

    def render(self, tokenizer: Any, template: str) -> str:
        return render(
            tokenizer,
            self.messages,
            template=template,
            open_turn=self.open_turn,
            prefilled=self.prefilled,
            tools=self.tools or None,
            **self.variables,
        )

    def marked(self, controls: ControlTokens, marker: str, own: Sequence[str]) -> _Chat:
        """A copy of the chat in which no text can spell a control token. In what the model said,
        the markers `own` stay whole, by which the template finds the thoughts that it leaves
        out."""
        messages = [controls.mark(message, marker) for message in self.messages]
        for place, message in enumerate(self.messages):
            begun = self.prefilled and place == len(messages) - 1
            if message["role"] in ("assistant", "model") and "content" in message and not begun:
                messages[place]["content"] = controls.mark(message["content"], marker, own)
        variables = {name: controls.mark(v, marker) for name, v in self.variables.items()}
        tools = controls.mark(self.tools, marker)
        return _Chat(messages, tools, variables, self.prefilled, self.open_turn)


def _encode_chat(
    tokenizer: Any, chat: _Chat, template: str, reader: PictureReader
) -> tuple[list[int], str]:
    """The token ids of a chat, and its text."""
    media = media_in(chat.messages)
    if not media:
        return _encode_text(tokenizer, chat, template)
    texts = strings_in([with_plain_content(message) for message in chat.messages])
    place = unused_character(template, *texts, *strings_in([chat.tools, chat.variables]))
    pictures: list[Picture] = []
    parts = []
    for part in media:
        found, said = reader.read(part, place)
        pictures += found
        native = part["type"] == "image" and _READS_IMAGES.search(template)
        parts.append({"type": "image"} if native else {"type": "text", "text": said})
    chat = replace(chat, messages=with_places(chat.messages, parts))
    ids, rendered = _encode_text(tokenizer, chat, template, (place, reader.spelled(tokenizer)))
    return reader.expanded(ids, pictures), rendered


def _encode_text(
    tokenizer: Any, chat: _Chat, template: str, place: tuple[str, str] | None = None
) -> tuple[list[int], str]:
    """The token ids of a chat in which each picture is one token, and the chat's text. `place` is
    the character that stands for a picture, and the spelling of its token."""

    def put(rendered: str) -> str:
        return rendered if place is None else rendered.replace(*place)

    if not _READS_PARTS.search(template):
        messages = [with_plain_content(message) for message in chat.messages]
        chat = _Chat(messages, chat.tools, chat.variables, chat.prefilled, chat.open_turn)
    strings = strings_in([chat.messages, chat.tools, list(chat.variables.values())])
    for string in strings:
        _check_unicode(string)
    controls = control_tokens_of(tokenizer)
    if not any(controls.breaks(string) for string in strings):
        rendered = put(chat.render(tokenizer, template))
        ids: list[int] = tokenizer.encode(rendered, add_special_tokens=False)
        return ids, rendered
    marker = unused_character(template, *strings, *(place or ()))
    own = [name for pair in THOUGHT_MARKERS if pair[1] in template for name in pair]
    rendered = put(chat.marked(controls, marker, own).render(tokenizer, template))
    return controls.encode_rendered(rendered, marker), rendered.replace(marker, "")


def _as_rendered(text: str, rendered: str) -> str:
    """The beginning of the answer as it ends the prompt: templates trim it."""
    forms = (text, text.rstrip(), text.lstrip(), text.strip())
    return next((form for form in forms if rendered.endswith(form)), forms[-1])


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt is not valid Unicode at character {error.start + 1}; "
            "give it as text in UTF-8."
        ) from error

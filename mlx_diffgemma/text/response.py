"""From an answer to the token ids that a model would have written, for training on it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma.pictured import in_common
from mlx_diffgemma.text.chat_template import render, template_text
from mlx_diffgemma.text.control_tokens import ControlTokens, control_tokens_of, unused_character
from mlx_diffgemma.text.markers import markers_of
from mlx_diffgemma.text.messages import checked_messages, text_of
from mlx_diffgemma.text.parts import Parts, Text, Thought
from mlx_diffgemma.text.prompt import (
    THOUGHT_MARKERS,
    encode_conversation,
    encode_prompt,
)
from mlx_diffgemma.text.prompt_settings import Tools
from mlx_diffgemma.text.tokenizer import hf_tokenizer
from mlx_diffgemma.text.tool_calls import ToolCall

_THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # as transformers knows them
_AWAITING = "<|tool_response>"  # ends a turn that called tools


def encode_response(controls: ControlTokens, text: str, end: int) -> list[int]:
    """Token ids of an answer as it follows the opened turn: plain text, then the token `end`."""
    return [*controls.encode_text(text), end]


def encode_answered(
    tokenizer: Any, messages: Sequence[Any], end: int, *, tools: Tools | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation up to its last message, and of that message as the model would
    have written it. Text is taken as it is, and ends with the token `end`; calls of tools and
    thoughts are as the chat template renders them.

    Args:
        tokenizer: mlx-lm's wrapper.
        messages: at least two, the last one an assistant's.
        tools: what the model may call.

    Raises:
        UsageError: a message is malformed, says nothing, or has calls or thoughts that the chat
            template does not render as they are given.
        CheckpointError: the chat template is missing or broken.
    """
    last = checked_messages([*messages])[-1]
    text, before = text_of(last), messages[:-1]
    thought = next((last[name] for name in _THOUGHTS if last.get(name)), "")
    calls = last.get("tool_calls") or []
    if not isinstance(thought, str):
        raise UsageError(f"what the answer thought must be a text, not {thought!r:.40}.")
    if not (text or thought or calls):
        raise UsageError("the response is empty; give some text.")
    template = template_text(hf_tokenizer(tokenizer), tools=bool(tools))
    for names in THOUGHT_MARKERS:
        if names[1] in template and any(name in text for name in names):
            raise UsageError(
                f"the answer spells {names[0]} or {names[1]}, which the chat template takes out of "
                "answers; put what was thought under 'reasoning_content'."
            )
    if not thought and not calls:
        controls = control_tokens_of(hf_tokenizer(tokenizer))
        prompt = encode_prompt(tokenizer, before, tools=tools)
        return prompt, encode_response(controls, text, end)
    thinking = True if thought and "enable_thinking" in template else None
    prompt = encode_prompt(tokenizer, before, tools=tools, thinking=thinking)
    whole = encode_conversation(tokenizer, messages, tools=tools, thinking=thinking)
    response = _behind(prompt, whole, tokenizer)
    ends = set(tokenizer.eos_token_ids)
    response = list(takewhile(lambda token: token not in ends, response))
    _check_parts(tokenizer, prompt, response, (text, thought, calls))
    if response[-1:] == [markers_of(tokenizer).called]:
        awaiting = hf_tokenizer(tokenizer).convert_tokens_to_ids(_AWAITING)
        end = awaiting if awaiting in ends else end
    return prompt, [*response, end]


def _behind(prompt: list[int], whole: list[int], tokenizer: Any) -> list[int]:
    """What of a whole conversation follows its prompt. Some templates end the prompt with an empty
    thought, which the conversation lacks."""
    same = in_common(prompt, whole)
    rest, markers = prompt[same:], markers_of(tokenizer)
    if rest and (markers.opened is None or (rest[0], rest[-1]) != (markers.opened, markers.closed)):
        raise UsageError(
            "the chat template renders the answer otherwise than behind its prompt, so it cannot "
            "be learnt; leave out its calls and thoughts, or mend the template."
        )
    return whole[same:]


def _check_parts(
    tokenizer: Any, prompt: list[int], response: list[int], given: tuple[str, str, list[Any]]
) -> None:
    """Raise UsageError unless the parts of a response are those that were given."""
    parts = Parts(tokenizer, prompt=prompt)
    found = parts.add(response) + parts.finish("stop")
    text = "".join(part.text for part in found if isinstance(part, Text))
    thought = "".join(part.text for part in found if isinstance(part, Thought))
    called = [part.name for part in found if isinstance(part, ToolCall)]
    functions = [call.get("function") for call in given[2]]
    named = [each.get("name") if isinstance(each, dict) else None for each in functions]
    for what, ours, theirs in (
        ("text", text.strip(), given[0].strip()),
        ("thought", thought.strip(), given[1].strip()),
        ("calls of tools", called, named),
    ):
        if ours != theirs:
            raise UsageError(
                f"the chat template does not render the {what} of the answer as given, so it would "
                "not be learnt; leave it out, or mend the template."
            )


def end_of_turn(tokenizer: Any) -> int:
    """The token that ends an answer: the first eos that the chat template writes behind one, or the
    tokenizer's own eos where it writes none.

    Raises:
        CheckpointError: there is neither, or the template is missing or broken.
    """
    own = hf_tokenizer(tokenizer)
    mark = unused_character(str(own.chat_template))
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    behind = render(own, messages, open_turn=False).rpartition(mark)[2]
    ids = own.encode(behind, add_special_tokens=False)
    ends = set(tokenizer.eos_token_ids)
    return next((token for token in ids if token in ends), None) or end_of_text(tokenizer)


def end_of_text(tokenizer: Any) -> int:
    """The tokenizer's own eos.

    Raises:
        CheckpointError: it has none.
    """
    eos = hf_tokenizer(tokenizer).eos_token_id
    if eos is None:
        raise CheckpointError(
            "no token ends an answer: neither the chat template writes an eos behind one, nor has "
            "the tokenizer one of its own; mend tokenizer_config.json."
        )
    return int(eos)

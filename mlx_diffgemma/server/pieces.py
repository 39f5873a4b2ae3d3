"""What every protocol asks for and gets: `Asked` goes in, `Piece`s come out.

A protocol's file turns its requests into `Asked`, and the pieces that `asking.answer` gives into
its own answers. Nothing here knows how a request or an answer is spelt on the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Reason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Asked:
    """One request for text, whatever the protocol.

    Attributes:
        messages: a conversation in the library's form: `role`, `content` (a text or parts),
            `tool_calls`, `tool_call_id`, `name`, `reasoning_content`; None where `prompt` is given.
        prompt: a text or token ids to go on from, without a chat template. Control tokens that the
            text spells are never obeyed.
        suffix: the text behind the answer: what is written is what stands between both.
        present: the text that stands now where the answer is to stand, by whose length that of the
            answer goes; for a prompt with a suffix.
        instruction: what the model is told of a prompt with a suffix; None says that something is
            missing between them.
        system: a system message before the others.
        tools: what may be called, `{"type": "function", "function": {...}}` each.
        tool_choice: "auto", "none", "required", or the name of the function to call; None is
            "auto".
        json_schema: what the answer must satisfy as JSON; True allows any JSON object.
        regex: what the whole answer must match, in Rust's syntax.
        max_tokens: most tokens of the answer; None is what the context leaves.
        temperature: factor of `t_min` and `t_max`; None and 1 are the checkpoint's own. At 0 the
            schedule is the checkpoint's own too, and every draw is the likeliest token.
        seed: makes the answer repeatable; None draws a fresh one.
        stop: texts that end the answer.
        n: answers to give, the first by `seed` and each further one by the next.
        thinking: whether to think before the answer; None leaves it to the chat template.
        logprobs: whether text is to come with its tokens.
        frames: whether to give a `Frame` after every denoising step.
        prefill: the text that the answer begins with; it is not repeated in what comes out.
        settings: fields of `DiffusionConfig` to put over the checkpoint's.
        profile: the name of settings that trade fidelity for speed.
        chat_template_kwargs: variables for the chat template.
    """

    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    suffix: str | None = None
    present: str | None = None
    instruction: str | None = None
    system: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | None = None
    json_schema: Mapping[str, Any] | bool | None = None
    regex: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    thinking: bool | None = None
    logprobs: bool = False
    frames: bool = False
    prefill: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    profile: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class TokenInfo:
    """A token of an answer when it was committed.

    Attributes:
        token: its id.
        text: what it spells by itself.
        spelled: its bytes, which may be a part of a character.
        log_probability: in nats, at the temperature of the last step; 0 where there was no choice.
        entropy: of its position, in nats, at that temperature; 0 where there was no choice.
    """

    token: int
    text: str
    spelled: bytes
    log_probability: float
    entropy: float


@dataclass(frozen=True)
class Started:
    """The prompt of an answer is known; the first piece of each answer.

    Attributes:
        index: which of the answers.
        prompt_tokens: tokens of the prompt.
        cached_tokens: how many of them were known from earlier requests.
    """

    index: int
    prompt_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Text:
    """Some text of an answer; `tokens` only where `logprobs` were asked for."""

    index: int
    text: str
    tokens: tuple[TokenInfo, ...] = ()


@dataclass(frozen=True)
class Thought:
    """Some of what was thought before an answer."""

    index: int
    text: str


@dataclass(frozen=True)
class Call:
    """One whole call of a tool.

    Attributes:
        index: which of the answers.
        number: which call of the answer, from 0.
        id: its name for the results that refer to it; new for every call.
        name: the function's.
        arguments: by their names, as JSON values.
    """

    index: int
    number: int
    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Frame:
    """A canvas as it stands after a denoising step.

    Attributes:
        index: which of the answers.
        block: which canvas of the answer, from 0.
        step: denoising steps run on it, from 1.
        total: steps that it may take at most.
        text: what it would add to the answer's text.
        thought: what it would add to the thought.
    """

    index: int
    block: int
    step: int
    total: int
    text: str
    thought: str = ""


@dataclass(frozen=True)
class Ended:
    """The last piece of an answer.

    Attributes:
        index: which of the answers.
        reason: "stop", "length" (by `max_tokens` or the context), or "tool_calls".
        prompt_tokens, cached_tokens: as in `Started`.
        completion_tokens: tokens of the answer, those of thoughts and calls among them.
        thought_tokens: how many of them belong to thoughts, as far as that is known.
        stop_string: the stop string that ended it, or None.
        seed: what every random draw of it followed from.
        converged: whether every canvas was done before its steps were used up.
        steps: denoising steps of each canvas.
        context_full: whether it ended because the context did.
        ids: of its tokens, where frames or `logprobs` were asked for.
        stop_token: the eos that ended it, where that is known.
    """

    index: int
    reason: Reason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    stop_string: str | None = None
    seed: int = 0
    converged: bool = True
    steps: tuple[int, ...] = ()
    thought_tokens: int = 0
    context_full: bool = False
    ids: tuple[int, ...] = ()
    stop_token: int | None = None


Piece = Started | Text | Thought | Call | Frame | Ended

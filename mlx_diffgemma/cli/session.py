"""What commands do around a generation: read the prompt, open the model, gather the outcome."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_diffgemma.errors import PromptError, UsageError

if TYPE_CHECKING:
    from mlx_diffgemma.generation import GenerationResponse
    from mlx_diffgemma.text.tool_calls import ToolCall

_CONTEXT = 32  # committed tokens that decide how the draft behind them reads


def pieces_of(tokenizer: Any) -> Callable[[GenerationResponse], list[tuple[str, str]]]:
    """What gives a response's draft in pieces, each with what it is part of ("text", "thought" or
    "call"): what canvases before it have not decided yet, then each token. A token has "" from the
    first eos on, as nothing from there is part of the answer."""
    from mlx_diffgemma.text.detokenize import token_strings

    def pieces(response: GenerationResponse) -> list[tuple[str, str]]:
        ids = response.canvas
        ends = (place for place, token in enumerate(ids) if token in tokenizer.eos_token_ids)
        end = next(ends, len(ids))
        found: list[tuple[str, str]]
        if response.parts is not None:
            found = [*response.parts.pieces(ids[:end])]
        else:
            texts = token_strings(tokenizer, ids[:end], response.tokens[-_CONTEXT:])
            found = [("text", text) for text in ("", *texts)]
        return found + [("text", "")] * (len(ids) - end)

    return pieces


def read_prompt(given: str | None, *, raw: bool = False) -> str:
    """The prompt as given, or from stdin; one newline at the end of stdin is the shell's, and is
    kept only for a raw prompt.

    Raises:
        UsageError: there is none, or it is not text.
    """
    if given is None and sys.stdin.isatty():
        raise UsageError("no prompt: give one with --prompt, or pipe it in.")
    if given is None or given == "-":
        prompt = read_text(sys.stdin.read).removeprefix("\ufeff")  # says how it is encoded
        if not raw:
            prompt = prompt.removesuffix("\n").removesuffix("\r")
    else:
        prompt = given
    if not is_text(prompt):
        raise PromptError("the prompt is not UTF-8 text: re-encode it.")
    if not (prompt if raw else prompt.strip()):
        raise PromptError("the prompt is empty: give some text with --prompt, or pipe it in.")
    return prompt


def read_text(read: Callable[[], str]) -> str:
    """What `read` returns from stdin.

    Raises:
        PromptError: stdin holds bytes that are not text.
    """
    try:
        return read()
    except UnicodeDecodeError:
        raise PromptError("the prompt is not UTF-8 text: re-encode it.") from None


def is_text(text: str) -> bool:
    """Whether it can be encoded: Python lets undecodable bytes through as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


@dataclass
class Outcome:
    """What a generation has come to so far.

    Attributes:
        text: what the answer says, as far as it is committed.
        thought: what was thought.
        tool_calls: the calls that can be made.
        failed_calls: the calls that are malformed or cut off.
        last: the latest response, or None before the first.
    """

    text: str = ""
    thought: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    failed_calls: list[ToolCall] = field(default_factory=list)
    last: GenerationResponse | None = None
    _start: float = field(default_factory=time.perf_counter)
    _end: float = 0.0

    def add(self, response: GenerationResponse) -> None:
        """Take in the next response."""
        self.text += response.text
        self.thought += response.thought
        self.tool_calls += response.tool_calls
        self.failed_calls += response.failed_calls
        self.last = response
        self._end = time.perf_counter()

    @property
    def prompt_seconds(self) -> float:
        """How long the prompt took to encode."""
        if self.last is None or not self.last.prompt_tps:
            return 0.0
        return self.last.prompt_tokens / self.last.prompt_tps

    @property
    def generation_seconds(self) -> float:
        """Time from the first response's request to the last response, less the prompt's."""
        return max(0.0, self._end - self._start - self.prompt_seconds)

    @property
    def empty(self) -> bool:
        """Whether the answer is over and says nothing: it calls no tool, and its text is blank."""
        ended = self.last is not None and self.last.finish_reason is not None
        calls = self.tool_calls or self.failed_calls
        return ended and not calls and not self.text.strip()

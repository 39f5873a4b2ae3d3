"""What a generation comes to, response by response, and how its draft reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_diffgemma.generation_response import GenerationResponse
    from mlx_diffgemma.text.tool_calls import ToolCall

_CONTEXT = 32  # committed tokens that decide how the draft behind them reads


def pieces_of(tokenizer: Any) -> Callable[[GenerationResponse], list[tuple[str, str]]]:
    """A function that gives a response's draft in pieces, each with what it is part of ("text",
    "thought" or "call"): first what earlier canvases have left undecided, then each token. Tokens
    from the first eos on have the text "", as they are no part of the answer."""
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


@dataclass
class Outcome:
    """What a generation has come to so far.

    Attributes:
        text: what the answer says, as far as it is committed.
        thought: what the model thought, as far as it is committed.
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

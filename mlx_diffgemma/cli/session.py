"""What commands do around a generation: read the prompt, open the model, gather the outcome."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_diffgemma.cli.options import DEFAULT_MODEL
from mlx_diffgemma.errors import CheckpointError, MemoryShortageError, PromptError, UsageError
from mlx_diffgemma.reading import read_object

if TYPE_CHECKING:
    from mlx_diffgemma.generation import GenerationResponse
    from mlx_diffgemma.text.tool_calls import ToolCall

_CONTEXT = 32  # committed tokens that decide how the draft behind them reads


@dataclass(frozen=True)
class Opened:
    """A model that is ready to run.

    Attributes:
        name: what the user called it.
        load_seconds: how long that took.
    """

    name: str
    model: Any
    tokenizer: Any
    load_seconds: float


def open_model(name: str | None, **loading: Any) -> Opened:
    """Load a model; without a name, that of the adapters where they say it, or the default one.

    Raises:
        DiffGemmaError: it cannot be loaded. Where the user named none, the message also points
            to the model that ships with the program.
    """
    if name is None and loading.get("adapter_path"):
        name = _base_of(Path(loading["adapter_path"]).expanduser())
    chosen = name or DEFAULT_MODEL
    if sys.stderr.isatty():
        print(f"loading {chosen}", file=sys.stderr)
    start = time.perf_counter()
    from mlx_diffgemma.generation import load  # takes seconds, so say something first

    try:
        model, tokenizer = load(chosen, **loading)
    except (CheckpointError, MemoryShortageError) as error:
        if name is not None:
            raise
        raise type(error)(
            f"{error} For the small model that ships with the program: --model demo"
        ) from error
    return Opened(chosen, model, tokenizer, time.perf_counter() - start)


def _base_of(adapters: Path) -> str | None:
    """The model that adapters were trained on, as their folder says it."""
    try:
        model = read_object(adapters / "adapter_config.json").get("model")
    except CheckpointError:  # loading them will say what is wrong
        return None
    return model if isinstance(model, str) and model else None


def pieces_of(tokenizer: Any) -> Callable[[GenerationResponse], list[str]]:
    """What gives the text of each token of a response's draft: "" from the first eos on, as
    nothing from there is part of the answer."""
    from mlx_diffgemma.text.detokenize import token_strings

    def pieces(response: GenerationResponse) -> list[str]:
        ids = response.canvas
        ends = (place for place, token in enumerate(ids) if token in tokenizer.eos_token_ids)
        end = next(ends, len(ids))
        before = response.tokens[-_CONTEXT:]
        return token_strings(tokenizer, ids[:end], before) + [""] * (len(ids) - end)

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
        prompt = read_text(sys.stdin.read)
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

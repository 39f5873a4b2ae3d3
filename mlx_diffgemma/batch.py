"""Several prompts answered at once, each with settings, seed and end of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx

from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.checks import check_integer
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.events import CanvasCommitted, PrefillProgress, SequenceFailed
from mlx_diffgemma.diffusion.generate import generate_canvases
from mlx_diffgemma.diffusion.noise import Noise, SeededNoise, checked_seed
from mlx_diffgemma.diffusion.profiles import DEFAULT as DEFAULT_PROFILE
from mlx_diffgemma.errors import DiffGemmaError, NumericalError, PromptError, UsageError
from mlx_diffgemma.fitting import configured, fit_to_context
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.text.answer import Answer, Said, stop_strings
from mlx_diffgemma.text.parts import EndReason
from mlx_diffgemma.text.prompt import Encoded, Prompt, encode, rows_of
from mlx_diffgemma.text.prompt_settings import PromptSettings, parted
from mlx_diffgemma.text.tool_calls import ToolCall

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True)
class BatchRow:
    """What became of one prompt of a batch; the names are those of `GenerationResponse`.

    Attributes:
        text: the answer, without thoughts and calls of tools; where the row failed, the text that
            was committed before the failure.
        finish_reason: "stop", "length", "tool_calls", or "error" where the row failed.
        tokens: all tokens of the answer.
        prompt_tokens: tokens of the prompt.
        seed: the seed of the row's random draws.
        config: the settings of the row; their `max_tokens` is at most what its context leaves.
        denoising_steps: steps of each canvas.
        converged: whether every canvas was done before its steps were used up.
        context_full: whether the answer was cut because the model's context ends there.
        error: what went wrong with this row alone, or None.
    """

    text: str
    finish_reason: EndReason | Literal["error"]
    tokens: tuple[int, ...]
    prompt_tokens: int
    seed: int
    config: DiffusionConfig
    denoising_steps: tuple[int, ...]
    converged: bool
    context_full: bool
    thought: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    failed_calls: tuple[ToolCall, ...] = ()
    stop_token: int | None = None
    stop_string: str | None = None
    error: NumericalError | None = None


@dataclass(frozen=True)
class BatchStats:
    """Tokens, seconds and memory of a whole batch, as mlx-lm names them.

    Attributes:
        prompt_tokens: tokens of all prompts.
        prompt_tps: prompt tokens encoded per second.
        prompt_time: seconds in which the prompts were encoded.
        generation_tokens: tokens of all answers.
        generation_tps: tokens of answers per second of generation.
        generation_time: seconds of generation, without those of the prompts.
        peak_memory: most memory that this process has held so far, in GB (1e9 bytes).
    """

    prompt_tokens: int
    prompt_tps: float
    prompt_time: float
    generation_tokens: int
    generation_tps: float
    generation_time: float
    peak_memory: float


@dataclass(frozen=True)
class BatchResponse:
    """The answers to a batch of prompts.

    Attributes:
        rows: what became of each prompt.
        stats: what the batch took.
    """

    rows: tuple[BatchRow, ...]
    stats: BatchStats

    @property
    def texts(self) -> list[str]:
        """The text of each answer.

        Raises:
            NumericalError: a row failed; `rows` has the others.
        """
        for row in self.rows:
            if row.error is not None:
                raise row.error
        return [row.text for row in self.rows]

    @property
    def token_ids(self) -> list[list[int]]:
        """The tokens of each answer.

        Raises:
            NumericalError: a row failed; `rows` has the others.
        """
        return [list(row.tokens) for row, _ in zip(self.rows, self.texts, strict=True)]

    @property
    def finish_reasons(self) -> list[str]:
        """Why each answer ended."""
        return [row.finish_reason for row in self.rows]


@dataclass
class _Row:
    """One prompt while it is answered."""

    answer: Answer
    prompt: Encoded
    seed: int
    sequence: int
    config: DiffusionConfig
    wanted: int  # `max_tokens` before the context limited it
    text: str = ""
    thought: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    failed_calls: list[ToolCall] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    converged: bool = True
    last: Said | None = None
    error: NumericalError | None = None

    @property
    def noise(self) -> Noise:
        return SeededNoise(self.seed, self.sequence)

    def commit(self, event: CanvasCommitted) -> None:
        self.tokens += event.tokens
        self.passes.append(event.passes)
        self.converged &= event.converged
        self.take(self.answer.add(event.tokens, event.finish_reason, event.stop_token))

    def fail(self, error: NumericalError) -> None:
        self.error = error
        self.take(self.answer.add((), "length"))

    def take(self, said: Said) -> None:
        self.text += said.text
        self.thought += said.thought
        self.calls += said.tool_calls
        self.failed_calls += said.failed_calls
        self.last = said

    def result(self) -> BatchRow:
        assert self.last is not None and self.last.end is not None
        reason = self.last.end.reason
        cut = reason == "length" and self.error is None and self.config.max_tokens < self.wanted
        return BatchRow(
            text=self.prompt.prefill + self.text,
            finish_reason=reason if self.error is None else "error",
            tokens=tuple(self.tokens[: self.last.tokens]),
            prompt_tokens=len(self.prompt.ids),
            seed=self.seed,
            config=self.config,
            denoising_steps=tuple(self.passes),
            converged=self.converged,
            context_full=cut,
            thought=self.thought,
            tool_calls=tuple(self.calls),
            failed_calls=tuple(self.failed_calls),
            stop_token=self.last.end.token if self.error is None else None,
            stop_string=self.last.stop_string,
            error=self.error,
        )


def batch_generate(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt] | Any,
    max_tokens: int | Sequence[int] | None = None,
    *,
    seed: int | Sequence[int] | None = None,
    prefill_step_size: int | None = None,
    profile: str = DEFAULT_PROFILE,
    config: DiffusionConfig | Sequence[DiffusionConfig] | None = None,
    prompt_settings: PromptSettings | None = None,
    stop: str | Sequence[str] | None = None,
    **settings: Any,
) -> BatchResponse:
    """Answer several prompts at once. Each row ends by itself, and NaN or infinity that the model
    returns for one row ends that row alone.

    Args:
        prompts: a list of prompts, each as `stream_generate` takes it.
        max_tokens: most tokens of each answer, for all or in a list for each.
        seed: the seed of all, of which each row is a sequence of its own; or a list of seeds, with
            which each row draws as `stream_generate` does with that seed.
        config: all settings of the denoising, for all or in a list for each.
        settings: fields of `DiffusionConfig` and of `PromptSettings` to put over those of every
            row.

    Other arguments are those of `stream_generate`, for all rows.

    Raises:
        ConfigError: the checkpoint's settings are damaged.
        UsageError, PromptError: a setting or a prompt is out of range; the prompt is named.
        MemoryShortageError: the batch does not fit.
        NumericalError: the model returned NaN or infinity for every row.
    """
    given = rows_of(prompts)
    count = len(given)
    start = time.perf_counter()
    if prefill_step_size is not None:
        check_integer("prefill_step_size", prefill_step_size, 1)
    prompt_settings, settings = parted(prompt_settings, settings)
    limit, limits = _shared_or_each("max_tokens", max_tokens, count)
    one_config, configs = _shared_or_each("config", config, count)
    one_seed, seeds = _shared_or_each("seed", seed, count)
    one_seed = checked_seed(one_seed)  # a fresh one that nobody uses where seeds are given
    stops, rows = stop_strings(stop), list[_Row]()
    shared = configured(model, tokenizer, profile, one_config, max_tokens=limit, **settings)
    for row, prompt in enumerate(given):
        own, own_seed = shared, one_seed
        with _naming(row, UsageError):  # what is given for this row
            if configs is not None:
                own = configured(
                    model, tokenizer, profile, configs[row], max_tokens=limit, **settings
                )
            if limits is not None:
                check_integer("max_tokens", limits[row], 1)
                own = own.override(max_tokens=limits[row])
            if seeds is not None:
                check_integer("seed", seeds[row], 0)
                own_seed = checked_seed(seeds[row])
        with _naming(row, PromptError) if count > 1 else nullcontext():
            encoded = encode(tokenizer, prompt, prompt_settings, config=model.config)
        answer = Answer(tokenizer, stop=stops, thinking=encoded.thinking, prompt=encoded.ids)
        sequence = row if seeds is None else 0
        rows.append(_Row(answer, encoded, own_seed, sequence, own, own.max_tokens))
    prompt_seconds = 0.0
    if rows:
        ids = [each.prompt.ids for each in rows]
        given_for_each = configs is not None or limits is not None
        fitted = fit_to_context(
            model,
            ids,
            [each.config for each in rows] if given_for_each else shared,
            step_size=prefill_step_size,
        )
        for each, settled in zip(rows, fitted, strict=True):
            each.config = settled
        start = time.perf_counter()
        with memory.wired():
            for event in generate_canvases(
                model,
                ids,
                fitted,
                lambda row: rows[row].noise,
                ends=lambda row, gained: rows[row].answer.would_stop(gained),
                prefill_step_size=prefill_step_size,
                keep_sound=True,
            ):
                if isinstance(event, PrefillProgress):
                    prompt_seconds = time.perf_counter() - start
                elif isinstance(event, CanvasCommitted):
                    rows[event.row].commit(event)
                elif isinstance(event, SequenceFailed):
                    rows[event.row].fail(event.error)
    seconds = time.perf_counter() - start - prompt_seconds
    results = tuple(row.result() for row in rows)
    failed = [row.error for row in results if row.error is not None]
    if failed and len(failed) == count:
        raise failed[0]
    return BatchResponse(results, _stats(results, prompt_seconds, seconds))


def _shared_or_each(name: str, given: Any, count: int) -> tuple[Any, Sequence[Any] | None]:
    """The value that all rows share of a setting, and the values that are given for each row. One
    of the two is None.

    Raises:
        UsageError: there are more values or fewer than `count`.
    """
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        return given, None
    if len(given) != count:
        raise UsageError(
            f"{name} has {len(given)} values and there are {count} prompts; give one for each, or "
            "one for all."
        )
    return None, given


@contextmanager
def _naming(row: int, kind: type[DiffGemmaError]) -> Iterator[None]:
    """Inside, an error of this `kind` is raised again with the prompt's number before it."""
    try:
        yield
    except kind as error:
        raise type(error)(f"prompt {row + 1}: {error}") from None


def _stats(rows: Sequence[BatchRow], prompt_seconds: float, seconds: float) -> BatchStats:
    prompt_tokens = sum(row.prompt_tokens for row in rows)
    tokens = sum(len(row.tokens) for row in rows)
    return BatchStats(
        prompt_tokens=prompt_tokens,
        prompt_tps=prompt_tokens / prompt_seconds if prompt_seconds else 0.0,
        prompt_time=prompt_seconds,
        generation_tokens=tokens,
        generation_tps=tokens / seconds if seconds > 0 else 0.0,
        generation_time=seconds,
        peak_memory=mx.get_peak_memory() / 1e9,
    )

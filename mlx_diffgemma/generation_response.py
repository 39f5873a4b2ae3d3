"""The responses that a generation yields, and the clock that measures their speeds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_diffgemma.diffusion.events import Looking
from mlx_diffgemma.text.parts import EndReason, Parts
from mlx_diffgemma.text.tool_calls import ToolCall


@dataclass(frozen=True)
class GenerationResponse:
    """One moment of a generation: mlx-lm's fields, then those of text diffusion.

    A response comes after every denoising step (`text` is empty then: nothing is committed) and
    after every committed canvas (`text` is what the canvas added). The last one has a
    `finish_reason`. Where the answer's beginning was given (`prefill_response`), the first response
    has it as its `text`, before any step.

    Attributes:
        text: text committed since the previous response; never half a character. Thoughts and the
            calls of tools are no part of it.
        token: the last token committed, or None.
        tokens: all tokens committed so far, those of thoughts and calls included; cut where a stop
            string cuts the text.
        prompt_tokens: tokens of the prompt.
        prompt_tps: prompt tokens encoded per second.
        generation_tokens: tokens committed so far.
        generation_tps: tokens committed per second of generation so far.
        peak_memory: most memory that this process has held so far, in GB (1e9 bytes).
        finish_reason: "stop" (an eos or a stop string), "length", or "tool_calls" (the model
            stopped and waits for results), on the last response only.
        thought: what was thought and committed since the previous response.
        tool_calls: the calls completed since the previous response, as mlx-lm's server streams
            them; joined over all responses they are all calls.
        failed_calls: the calls since the previous response that are malformed or cut off, with
            their raw text and what is wrong with them.
        draft: the text of the canvas as it stands, or "" where nothing is drafted.
        draft_thought: what is thought on the canvas as it stands, or "".
        canvas: token ids of the draft, [C]; fewer where a stop string cuts it.
        entropy: nats of uncertainty of each draft token, as many as there are in `canvas`.
        probability: the probability of each draft token at the temperature of the step, as many as
            there are in `canvas`.
        step: denoising steps run on this canvas, from 1.
        canvas_index: which canvas of the answer, from 0.
        denoising_steps: steps of each canvas so far, the current one included.
        tokens_per_forward: tokens committed per denoising step so far.
        stop_token: the eos that ended the answer, on the last response; None where none did.
        stop_string: the stop string that ended the answer, on the last response, or None.
        converged: whether every canvas committed so far was done before its steps were used up.
        context_full: whether the answer was cut because the model's context ends there, and not by
            `max_tokens`; on the last response.
        parts: the parts of the answer before this canvas; `parts.pieces(canvas)` says what each
            token of the draft is part of.
        seed: the seed of every random draw of this run.
        images: pictures that the vision tower read for this prompt; those that the prefix cache
            holds are not counted.
        image_seconds: seconds that the vision tower took for these pictures, a part of the time of
            the prompt.
    """

    text: str
    token: int | None
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: EndReason | None = None
    thought: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    failed_calls: tuple[ToolCall, ...] = ()
    draft: str = ""
    draft_thought: str = ""
    canvas: list[int] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    probability: list[float] = field(default_factory=list)
    tokens: tuple[int, ...] = ()
    step: int = 0
    canvas_index: int = 0
    denoising_steps: tuple[int, ...] = ()
    tokens_per_forward: float = 0.0
    stop_token: int | None = None
    stop_string: str | None = None
    converged: bool = True
    context_full: bool = False
    parts: Parts | None = field(default=None, repr=False, compare=False)
    seed: int = 0
    images: int = 0
    image_seconds: float = 0.0


class Clock:
    """Turns the progress of one generation into responses with its speeds.

    Args:
        prompt_tokens: tokens of the prompt.
        seed: the seed of every random draw of the run.

    Attributes:
        converged: whether every canvas committed so far was done before its steps were used up.
        looking: what the vision tower did for the prompt.
    """

    def __init__(self, prompt_tokens: int, seed: int) -> None:
        self.prompt_tokens, self.seed = prompt_tokens, seed
        self.start = time.perf_counter()
        self.prompt_seconds = 0.0
        self.encoded = 0
        self.converged = True
        self.looking = Looking()

    def prompt_is_encoded(self, positions: int) -> None:
        """Note that the prompt is encoded, `positions` of which were not in the prefix cache."""
        self.prompt_seconds, self.encoded = time.perf_counter() - self.start, positions

    def response(
        self, tokens: Sequence[int], steps: Sequence[int], *, text: str = "", **now: Any
    ) -> GenerationResponse:
        """The response of this moment.

        Args:
            tokens: those committed so far that are part of the answer.
            steps: denoising steps of each canvas so far.
            text: what was committed since the previous response.
            now: the other fields of the response.
        """
        seconds = time.perf_counter() - self.start - self.prompt_seconds
        return GenerationResponse(
            text=text,
            token=tokens[-1] if tokens else None,
            tokens=tuple(tokens),
            prompt_tokens=self.prompt_tokens,
            prompt_tps=self.encoded / self.prompt_seconds if self.prompt_seconds else 0.0,
            generation_tokens=len(tokens),
            generation_tps=len(tokens) / seconds if seconds else 0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
            denoising_steps=tuple(steps),
            tokens_per_forward=len(tokens) / sum(steps) if steps else 0.0,
            converged=self.converged,
            seed=self.seed,
            images=self.looking.pictures,
            image_seconds=self.looking.seconds,
            **now,
        )

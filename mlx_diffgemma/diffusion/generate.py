"""Generating sequences canvas by canvas, each ending by itself. Letters: B sequences, C canvas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import mlx.core as mx

from mlx_diffgemma.diffusion.canvas import Canvas, warmed
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import Layout, not_at_first, without
from mlx_diffgemma.diffusion.denoiser import Denoiser, InFlight, denoise
from mlx_diffgemma.diffusion.encode import encode
from mlx_diffgemma.diffusion.encoder_check import check, worth_checking
from mlx_diffgemma.diffusion.events import (
    CanvasCommitted,
    DenoisingStep,
    Event,
    Finished,
    FinishReason,
    SequenceFailed,
)
from mlx_diffgemma.diffusion.noise import NoiseOf
from mlx_diffgemma.errors import NumericalError, UsageError
from mlx_diffgemma.model.cache import PrefixCache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

_LIKELY = 8192  # tokens before which most answers end that may take more

Constrain = Callable[[int, int], Layout | None]
"""What a canvas must hold, by the row of its sequence and the number of the canvas."""
Ends = Callable[[int, Sequence[int]], bool]
"""Whether a sequence ends with the tokens that it is about to gain, by its row; asked once for each
canvas, in order."""


@dataclass
class _Sequence:
    """One sequence while it is written."""

    row: int
    config: DiffusionConfig
    cache: PrefixCache
    tokens: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    encodings: int = 0
    reason: FinishReason | Literal["error"] | None = None
    stop_token: int | None = None

    @property
    def room(self) -> int:
        return self.config.max_tokens - len(self.tokens)

    def commit(self, canvas: Canvas, ends: Ends | None) -> CanvasCommitted:
        draft = canvas.draft.tolist()
        kept, reason = cut(draft, self.config.eos_token_ids, self.room)
        if reason == "stop":
            self.stop_token = draft[len(kept)]
        elif ends is not None and ends(self.row, kept):
            reason = "stop"
        self.reason = reason
        self.tokens += kept
        self.passes.append(canvas.passes)
        return CanvasCommitted(
            self.row,
            canvas.index,
            tuple(kept),
            canvas.passes,
            canvas.converged,
            reason,
            self.stop_token,
        )


def generate_canvases(
    model: DiffusionGemma,
    prompts: Sequence[Sequence[int]],
    config: DiffusionConfig | Sequence[DiffusionConfig],
    noise: NoiseOf,
    *,
    caches: Sequence[PrefixCache] | None = None,
    denoiser: Denoiser | None = None,
    initial_canvas: Sequence[Sequence[int]] | None = None,
    initial_noise: float | None = None,
    constrain: Constrain | None = None,
    ends: Ends | None = None,
    prefill_step_size: int | None = None,
    marks: Sequence[Sequence[int]] | None = None,
    keep_sound: bool = False,
) -> Iterator[Event]:
    """Generate for B prompts of token ids at once, each with its own settings and end.

    Args:
        prompts: the token ids of each of the B prompts.
        config: how to denoise, for all sequences or for each.
        noise: the randomness of each sequence, by its row (see `seeded`).
        caches: a place for each sequence's prefix; the beginning that a held prefix has in common
            with the prompt is not encoded again. None encodes every prompt as a whole.
        denoiser: what runs the passes; None takes the model's own.
        initial_canvas: [B][C] token ids that the first canvases start from instead of noise.
        initial_noise: the share of the initial tokens that gives way to noise; the canvases then
            enter the schedule at the matching step. With None all initial tokens stay, and the
            canvases enter the schedule at its first step.
        constrain: what each canvas must hold.
        ends: ends a sequence for other reasons than an eos; no further canvas is made of it.
        prefill_step_size: most tokens of a prompt that are encoded at a time; None takes the
            model's own number.
        marks: for each prompt, where to mark its prefix (see `encode`).
        keep_sound: whether the other sequences go on where the model returns values that are not
            finite for one, which ends with a `SequenceFailed`.

    Raises:
        UsageError: `initial_canvas` or a layout does not fit, or a cache belongs to another model
            or to other adapters.
        NumericalError: the model returned values that are not finite.

    Yields:
        `PrefillProgress`, then for each step a `DenoisingStep` a sequence, and a `CanvasCommitted`
        where its canvas is done or a `SequenceFailed`; in the end one `Finished`.
    """
    denoiser = denoiser or Denoiser(model)
    configs = [config] * len(prompts) if isinstance(config, DiffusionConfig) else list(config)
    for cache in caches or ():
        cache.require_model(model)
    caches = [model.make_cache() for _ in prompts] if caches is None else caches
    sequences = [
        _Sequence(row, *both) for row, both in enumerate(zip(configs, caches, strict=True))
    ]
    if initial_canvas is not None and len(initial_canvas) != len(prompts):
        raise UsageError(
            f"initial_canvas has {len(initial_canvas)} canvases; there are {len(prompts)} prompts, "
            "and each takes one."
        )

    def canvas(sequence: _Sequence, index: int) -> InFlight:
        """The next canvas of a sequence, behind what its cache holds."""
        row, settings = sequence.row, sequence.config
        first = initial_canvas[row] if initial_canvas is not None and index == 0 else None
        length, vocab = next_length(model, settings, sequence.room), model.config.text.vocab_size
        layout = None if constrain is None else constrain(row, index)
        if settings.forbid_empty and constrain is None and index == 0:
            layout = not_at_first(settings.eos_token_ids, length, vocab)
        if constrain is None:
            layout = without(model.never_drawn, length, vocab, layout)
        started = Canvas.start(
            settings,
            noise(row),
            index,
            length,
            vocab,
            layout=layout,
            initial=first,
        )
        if first is not None and initial_noise is not None:
            started = warmed(started, initial_noise)
        return InFlight(started, sequence.cache.prefix)

    # 1. Encode the prompts.
    for sequence, prompt in zip(sequences, prompts, strict=True):
        yield from encode(
            model,
            sequence.cache,
            prompt,
            row=sequence.row,
            step_size=prefill_step_size,
            room=reserved(model, sequence.config),
            marks=() if marks is None else marks[sequence.row],
        )

    # 2. Denoise: a canvas that is done is committed, and the next one takes its place.
    committed: dict[int, CanvasCommitted] = {}

    def following(row: int, stepped: Canvas) -> InFlight | None:
        sequence, encoded = sequences[row], None
        if worth_checking(stepped):
            stepped, encoded = check(model, stepped, sequence.cache.prefix)
            sequence.encodings += 1
        if not stepped.done:
            return InFlight(stepped, sequence.cache.prefix)
        committed[row] = sequence.commit(stepped, ends)
        if sequence.reason is not None:
            return None  # a finished sequence needs its last canvas encoded no more
        if encoded is not None:
            sequence.cache.prefix = encoded
        else:
            extend(model, sequence.cache, stepped.draft.tolist())
            sequence.encodings += 1
        return canvas(sequence, stepped.index + 1)

    failures: list[SequenceFailed] = []

    def failed(row: int, error: NumericalError) -> None:
        sequences[row].reason = "error"
        failures.append(SequenceFailed(row, error))

    first = {sequence.row: canvas(sequence, 0) for sequence in sequences}
    title = None if len(sequences) == 1 else (lambda row: f"prompt {row + 1}")
    steps = denoise(denoiser, first, following, title, failed if keep_sound else None)
    del first  # a prefix that is to grow is copied where it is still held
    for stepped in steps:
        while failures:
            yield failures.pop(0)
        for row, each in stepped.items():
            yield DenoisingStep(row, each)
            if row in committed:
                yield committed.pop(row)

    yield Finished(
        tokens=tuple(tuple(each.tokens) for each in sequences),
        finish_reasons=tuple(each.reason or "length" for each in sequences),
        stop_tokens=tuple(each.stop_token for each in sequences),
        steps=tuple(tuple(each.passes) for each in sequences),
        encodings=tuple(each.encodings for each in sequences),
    )


def extend(model: DiffusionGemma, cache: PrefixCache, tokens: Sequence[int]) -> None:
    """Append what was committed to the prefix in `cache`, without waiting for it."""
    cache.prefix = model.encode([tokens], [cache.prefix])[1][0]
    mx.async_eval(cache.prefix.arrays())
    mx.clear_cache()


def next_length(model: DiffusionGemma, config: DiffusionConfig, room: int) -> int:
    """Tokens of the next canvas of a sequence that may still grow by `room`."""
    length = config.canvas_length or model.config.canvas_length
    return min(length, room) if config.shrink_canvas else length


def reserved(model: DiffusionGemma, config: DiffusionConfig) -> int:
    """Positions to make room for behind a prompt: whole canvases, for as much of an answer as is
    likely to be written. For a longer answer the prefix grows a canvas at a time."""
    length = config.canvas_length or model.config.canvas_length
    return -(-min(config.max_tokens, max(_LIKELY, length)) // length) * length


def cut(
    canvas: Sequence[int], eos_token_ids: Sequence[int], room: int
) -> tuple[list[int], FinishReason | None]:
    """The tokens of a canvas that become text: up to the first eos, at most `room`; and why the
    sequence ends here, or None if it does not."""
    for place, token in enumerate(canvas[:room]):
        if token in eos_token_ids:
            return list(canvas[:place]), "stop"
    return list(canvas[:room]), "length" if room <= len(canvas) else None

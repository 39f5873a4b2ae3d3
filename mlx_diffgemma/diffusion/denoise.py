"""The denoising loop: generators that yield an event after each step, before the next one starts.

Letters: B sequences asked for, R rows still being written, C canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diffusion.active_set import ActiveSetPredictor
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import CanvasConstraint
from mlx_diffgemma.diffusion.events import (
    CanvasCommitted,
    DenoisingStep,
    Event,
    Finished,
    FinishReason,
)
from mlx_diffgemma.diffusion.noise import Noise, StepNoise
from mlx_diffgemma.diffusion.predict import Prediction, Predictor, make_predictor
from mlx_diffgemma.diffusion.prefill import DEFAULT_STEP_SIZE, left_padded, prefill
from mlx_diffgemma.diffusion.sampler import Proposal, Sampler, make_sampler
from mlx_diffgemma.diffusion.schedule import LinearTemperature
from mlx_diffgemma.diffusion.stopping import make_stop_rule
from mlx_diffgemma.errors import NumericalError, UsageError
from mlx_diffgemma.model.cache import PrefixCache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

Constrain = Callable[[int, Sequence[int]], CanvasConstraint | None]


def denoising_step(
    predictor: Predictor,
    sampler: Sampler,
    canvas: mx.array,
    cache: PrefixCache,
    soft_embeddings: mx.array | None,
    *,
    temperature: float,
    noise: StepNoise,
    constraint: CanvasConstraint | None = None,
    last: bool = False,
) -> tuple[Prediction, Proposal]:
    """One pass over `canvas` [R, C]: predict, then accept and renoise. Nothing is evaluated yet.

    A fixed position has no entropy, so it takes nothing of the entropy bound; where a sampler goes
    by confidence, it takes no share of what is accepted either.
    """
    prediction = predictor(
        canvas, cache, soft_embeddings, temperature, noise.keys(), constraint, last
    )
    if constraint is None:
        return prediction, sampler.advance(canvas, prediction, noise)
    confidence = mx.where(constraint.is_open, prediction.confidence, 0.0)
    proposal = sampler.advance(canvas, replace(prediction, confidence=confidence), noise)
    return prediction, replace(
        proposal,
        canvas=constraint.pin(proposal.canvas),
        accepted=proposal.accepted | ~constraint.is_open,
    )


def denoise_canvas(
    predictor: Predictor,
    cache: PrefixCache,
    config: DiffusionConfig,
    noise: Noise,
    *,
    rows: Sequence[int],
    canvas_index: int,
    canvas_length: int,
    vocab_size: int,
    initial_canvas: mx.array | None = None,
    constraint: CanvasConstraint | None = None,
    counted: np.ndarray | None = None,
    first_step: int = 1,
) -> Generator[DenoisingStep, None, tuple[np.ndarray, np.ndarray]]:
    """Denoise one canvas for every row until each is done or the steps are used up.

    A row that is done keeps its draft while the others go on. A `first_step` above 1 enters the
    schedule late, for a canvas that is partly right already. `counted` [R, C] says which positions
    decide when it is done, of those that are not fixed. Returns the drafts [R, C] of the last
    step that each row ran, which are what is committed, and the number of those steps [R].

    Raises:
        NumericalError: the model returned values that are not finite.
    """
    shape = (canvas_length, vocab_size)
    canvas = initial_canvas
    if canvas is None:
        canvas = noise.initial_canvas(rows, canvas_index, *shape)
    if constraint is not None:
        constraint.check(len(rows), *shape)
        canvas = constraint.pin(canvas)
        counted = constraint.open if counted is None else constraint.open & counted
    schedule = LinearTemperature(config.t_min, config.t_max, config.max_denoising_steps)
    sampler, stop = make_sampler(config, vocab_size), make_stop_rule(config)
    soft_embeddings, draft = None, None
    done = np.zeros(len(rows), bool)
    steps = np.zeros(len(rows), int)

    for step in range(first_step, config.max_denoising_steps + 1):
        prediction, proposal = denoising_step(
            predictor,
            sampler,
            canvas,
            cache,
            soft_embeddings,
            temperature=schedule.at(step),
            noise=StepNoise(noise, rows, canvas_index, step, *shape),
            constraint=constraint,
            last=step == config.max_denoising_steps,
        )
        canvas, soft_embeddings = proposal.canvas, prediction.soft_embeddings
        mx.eval(canvas, soft_embeddings, proposal.draft, proposal.accepted, prediction.entropy)
        entropy = np.array(prediction.entropy)
        if not np.isfinite(entropy).all():
            raise NumericalError(
                f"canvas {canvas_index + 1}, step {step}: the model returned NaN or infinity; "
                "its weights are damaged (check them with --check)."
            )
        new = np.array(proposal.draft)
        draft = new if draft is None else np.where(done[:, None], draft, new)
        steps += ~done
        done |= stop.update(draft, entropy, counted)
        yield DenoisingStep(
            canvas_index=canvas_index,
            step=step - first_step + 1,
            max_steps=config.max_denoising_steps,
            temperature=schedule.at(step),
            rows=tuple(rows),
            draft=draft,
            canvas=np.array(canvas),
            entropy=entropy,
            accepted=np.array(proposal.accepted),
            done=done.copy(),
        )
        if done.all():
            break
    assert draft is not None
    return draft, steps


def generate_canvases(
    model: DiffusionGemma,
    prompts: Sequence[Sequence[int]],
    config: DiffusionConfig,
    noise: Noise,
    *,
    cache: PrefixCache | None = None,
    predictor: Predictor | None = None,
    initial_canvas: mx.array | None = None,
    constrain: Constrain | None = None,
    prefill_step_size: int = DEFAULT_STEP_SIZE,
) -> Iterator[Event]:
    """Generate for B prompts of token ids at once, canvas by canvas, each ending by itself.

    Args:
        cache: a prefix to continue (its `tokens` say what it holds); the prompts are then only
            what comes after it. None starts from nothing.
        predictor: how predictions are made; None lets `make_predictor` choose.
        initial_canvas: [B, C] token ids that the first canvas starts from instead of noise.
        constrain: what each canvas must hold: called with its index and the rows still being
            written, returns a constraint on them or None.

    Yields:
        `PrefillProgress`, then for each canvas its `DenoisingStep`s and a `CanvasCommitted`, and
        in the end one `Finished`.
    """
    length = config.canvas_length or model.config.canvas_length
    if config.shrink_canvas:
        length = min(length, config.max_tokens)
    if initial_canvas is not None and initial_canvas.shape != (len(prompts), length):
        raise UsageError(
            f"initial_canvas has shape {initial_canvas.shape}; it must be "
            f"({len(prompts)}, {length}): prompts, canvas length."
        )
    if predictor is None:
        passes = make_predictor(model, config.soft_cutoff)
        predictor = passes
        if config.settled_after is not None:
            predictor = ActiveSetPredictor(
                passes, config.settled_after, config.confidence_threshold
            )

    # 1. Encode the prompts.
    ids, pads = left_padded(prompts, config.pad_token_id)
    if cache is None:
        cache = model.make_cache(pads)
        cache.tokens = [[] for _ in prompts]
    yield from prefill(model, ids, cache, step_size=prefill_step_size)
    for held, prompt in zip(cache.tokens, prompts, strict=True):
        held.extend(prompt)

    tokens: list[list[int]] = [[] for _ in prompts]
    all_steps: list[list[int]] = [[] for _ in prompts]
    reasons: list[FinishReason | None] = [None] * len(prompts)
    rows = list(range(len(prompts)))
    canvas_index = 0
    while True:
        # 2. Denoise one canvas for every sequence that is still being written.
        drafts, steps = yield from denoise_canvas(
            predictor,
            cache,
            config,
            noise,
            rows=rows,
            canvas_index=canvas_index,
            canvas_length=length,
            vocab_size=model.config.text.vocab_size,
            initial_canvas=initial_canvas,
            constraint=constrain(canvas_index, rows) if constrain else None,
        )
        initial_canvas = None

        # 3. Commit it.
        gained = []
        for row, draft, count in zip(rows, drafts, steps, strict=True):
            kept, reasons[row] = cut(
                draft.tolist(), config.eos_token_ids, config.max_tokens - len(tokens[row])
            )
            tokens[row] += kept
            all_steps[row].append(int(count))
            gained.append(tuple(kept))
        yield CanvasCommitted(
            canvas_index=canvas_index,
            rows=tuple(rows),
            tokens=tuple(gained),
            steps=tuple(int(count) for count in steps),
            finish_reasons=tuple(reasons[row] for row in rows),
        )

        # 4. Encode it where the sequence goes on; a finished sequence needs it no more.
        going = [place for place, row in enumerate(rows) if reasons[row] is None]
        if not going:
            break
        if len(going) < len(rows):
            cache.keep_rows(going)
        rows = [rows[place] for place in going]
        model.encode(mx.array(drafts[going], mx.int32), cache)
        mx.eval(cache.arrays())
        mx.clear_cache()
        for held, draft in zip(cache.tokens, drafts[going], strict=True):
            held.extend(draft.tolist())
        canvas_index += 1
        if config.shrink_canvas:
            length = min(length, max(config.max_tokens - len(tokens[row]) for row in rows))

    yield Finished(
        tokens=tuple(map(tuple, tokens)),
        finish_reasons=tuple(reason or "length" for reason in reasons),
        steps=tuple(map(tuple, all_steps)),
    )


def cut(
    canvas: Sequence[int], eos_token_ids: Sequence[int], room: int
) -> tuple[list[int], FinishReason | None]:
    """The tokens of a canvas that become text: up to the first eos, at most `room`; and why the
    sequence ends here, or None if it does not."""
    for place, token in enumerate(canvas[:room]):
        if token in eos_token_ids:
            return list(canvas[:place]), "stop"
    return list(canvas[:room]), "length" if room <= len(canvas) else None

"""What a constraint costs: the same step on the same canvas, with one and without."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import mlx.core as mx
import numpy as np

from mlx_diffgemma import cpu
from mlx_diffgemma.bench.steps import canvas_views
from mlx_diffgemma.bench.timing import alternate
from mlx_diffgemma.diffusion.canvas import Canvas
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import FREE, Layout, token_mask
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.diffusion.noise import SeededNoise
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

_CONTROL = 8  # ids at the beginning that no text holds


@dataclass(frozen=True)
class ConstraintCost:
    """A step under one kind of constraint.

    Attributes:
        name: of the kind of constraint; "none" is the step without one.
        seconds: median of one step; on a CPU, seconds of processor time.
        ratio: `seconds` over those of the same step without a constraint.
    """

    name: str
    seconds: float
    ratio: float


def measure_constraints(
    model: DiffusionGemma,
    config: DiffusionConfig,
    *,
    prefix: int,
    repeats: int = 5,
    seed: int = 0,
) -> tuple[ConstraintCost, ...]:
    """Time a step of one canvas without a constraint and under each kind of constraint, in turns.

    Every step starts from the same tokens, since the tokens decide how many experts are read.
    """
    length = config.canvas_length or model.config.canvas_length
    vocab = model.config.text.vocab_size
    (view,) = canvas_views(model, length, prefix, 1, seed)
    tokens: list[int] = view.tokens.tolist()  # type: ignore[assignment]
    denoiser = Denoiser(model)

    def under(layout: Layout | None) -> Canvas:
        canvas = Canvas.start(
            config, SeededNoise(seed), 0, length, vocab, layout=layout, initial=tokens, endless=True
        )
        return replace(canvas, soft_embeddings=view.soft_embeddings)

    def step(canvas: Canvas) -> None:
        mx.eval(denoiser.step([canvas], [view.prefix])[0].tokens)

    layouts = _layouts(tokens, vocab)
    runs: dict[str, Callable[[], object]] = {"none": partial(step, under(None))}
    runs |= {name: partial(step, under(layout)) for name, layout in layouts.items()}
    # A layout keeps what it works out, so this run makes a new one for every step.
    of_a_grammar = list(layouts.values())[-1]
    runs["the same, made anew each step"] = lambda: step(under(replace(of_a_grammar)))
    clock = time.process_time if cpu.is_device() else time.perf_counter
    taken = {name: median(times) for name, times in alternate(runs, repeats, clock=clock).items()}
    return tuple(
        ConstraintCost(name, seconds, seconds / taken["none"]) for name, seconds in taken.items()
    )


def _layouts(tokens: list[int], vocab: int) -> dict[str, Layout]:
    """Kinds of constraints on a canvas that holds `tokens`; the last is what a grammar makes."""
    length = len(tokens)
    few = token_mask(range(_CONTROL, min(_CONTROL + 20, vocab)), vocab)
    text = token_mask(range(_CONTROL, vocab), vocab)
    half = tuple(np.where(np.arange(length) % 2 == 0, tokens, FREE).tolist())
    front = tuple(np.where(np.arange(length) < length // 2, tokens, FREE).tolist())
    rest = range(length // 2, length)
    return {
        "every second position fixed": Layout(half),
        "text alone allowed": Layout((FREE,) * length, dict.fromkeys(range(length), text)),
        "20 tokens allowed anywhere": Layout((FREE,) * length, dict.fromkeys(range(length), few)),
        "front fixed, text behind, 20 tokens at 8 places": Layout(
            front, dict.fromkeys(rest, text) | dict.fromkeys(rest[:8], few)
        ),
    }

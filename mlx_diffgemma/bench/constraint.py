"""What a constraint costs: the same step on the same canvas, with one and without."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import mlx.core as mx
import numpy as np

from mlx_diffgemma.bench.steps import encoded, random_prompts
from mlx_diffgemma.bench.timing import alternate
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import FREE, CanvasConstraint, Layout, token_mask
from mlx_diffgemma.diffusion.denoise import denoising_step
from mlx_diffgemma.diffusion.noise import SeededNoise, StepNoise
from mlx_diffgemma.diffusion.predict import make_predictor
from mlx_diffgemma.diffusion.sampler import make_sampler
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

_CONTROL = 8  # ids at the beginning that no text holds


@dataclass(frozen=True)
class ConstraintCost:
    """A step under one kind of constraint.

    Attributes:
        seconds: median of one step. On a CPU, of the time that this program was given.
        ratio: by that of the same step without a constraint.
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
    """Time a step of one canvas, always from the same tokens, since what stands there decides how
    many experts are read."""
    length = config.canvas_length or model.config.canvas_length
    vocab = model.config.text.vocab_size
    (tokens,) = random_prompts(model, length, 1, seed + 1)
    canvas = mx.array([tokens], mx.int32)
    soft = model.model.decoder.embed_tokens(canvas)
    mx.eval(soft)
    cache = encoded(model, prefix, 1, seed)
    predictor, noise = make_predictor(model, config.soft_cutoff), SeededNoise(seed)

    def step(constraint: CanvasConstraint | None) -> None:
        prediction, proposal = denoising_step(
            predictor,
            make_sampler(config, vocab),
            canvas if constraint is None else constraint.pin(canvas),
            cache,
            soft,
            temperature=config.t_max,
            noise=StepNoise(noise, [0], 0, 1, length, vocab),
            constraint=constraint,
        )
        mx.eval(
            proposal.canvas, proposal.draft, proposal.accepted,
            prediction.entropy, prediction.soft_embeddings,
        )  # fmt: skip

    layouts = _layouts(tokens, vocab)
    constraints = {name: CanvasConstraint.of([each], vocab) for name, each in layouts.items()}
    runs: dict[str, Callable[[], object]] = {"none": lambda: step(None)}
    runs |= {name: partial(step, constraint) for name, constraint in constraints.items()}
    of_a_grammar = list(layouts.values())[-1]
    runs["the same, made anew each step"] = lambda: step(CanvasConstraint.of([of_a_grammar], vocab))
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    clock = time.process_time if on_cpu else time.perf_counter
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

"""From a prediction to the canvas of the next step: which positions take the model's draw, and
what the others get.

A sampler is made anew for each canvas. Letters: R rows, C canvas, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.noise import StepNoise
from mlx_diffgemma.diffusion.predict import Prediction
from mlx_diffgemma.kernels.accept_renoise import accept_renoise


@dataclass(frozen=True)
class Proposal:
    """What a sampler makes of a prediction.

    Attributes:
        canvas: [R, C] what the next step starts from.
        accepted: [R, C] which positions of `canvas` hold a draw of the model.
        draft: [R, C] what would be committed now.
    """

    canvas: mx.array
    accepted: mx.array
    draft: mx.array


class Sampler(Protocol):
    def advance(self, canvas: mx.array, prediction: Prediction, noise: StepNoise) -> Proposal:
        """The next canvas, after a prediction for `canvas` [R, C]."""


class EntropyBound:
    """The reference's sampler: accept what is nearly independent, renoise the rest, decide anew at
    every step. Nothing is ever frozen; the draft is the argmax."""

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def advance(self, canvas: mx.array, prediction: Prediction, noise: StepNoise) -> Proposal:
        canvas, accepted = accept_renoise(
            prediction.entropy, prediction.draw, noise.tokens(), self.bound
        )
        return Proposal(canvas, accepted, prediction.argmax)


class ConfidenceThreshold:
    """Accept every draw that has at least the probability `threshold`, and the most probable one
    always; decide anew at every step."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def advance(self, canvas: mx.array, prediction: Prediction, noise: StepNoise) -> Proposal:
        confidence = prediction.confidence
        best = confidence.max(axis=-1, keepdims=True)
        accepted = (confidence >= self.threshold) | (confidence == best)
        canvas = renoise(prediction.draw, accepted, noise.tokens())
        return Proposal(canvas, accepted, prediction.argmax)


class BlockRefinement:
    """Keep the most probable draws for good: at every step an equal share of the canvas, and all
    of at least the probability `threshold` (as diffusers' `BlockRefinementScheduler` does in its
    uniform mode, without its editing)."""

    def __init__(self, threshold: float, max_steps: int) -> None:
        self.threshold, self.max_steps = threshold, max_steps
        self._kept: mx.array | None = None
        self._tokens: mx.array | None = None

    def advance(self, canvas: mx.array, prediction: Prediction, noise: StepNoise) -> Proposal:
        if self._kept is None or self._tokens is None:
            self._kept, self._tokens = mx.zeros(canvas.shape, mx.bool_), canvas
        confidence = mx.where(self._kept, -1.0, prediction.confidence)
        rank = mx.argsort(mx.argsort(-confidence, axis=-1), axis=-1)
        share = -(-canvas.shape[-1] // self.max_steps)
        fresh = ~self._kept & ((rank < share) | (confidence >= self.threshold))
        self._tokens = mx.where(fresh, prediction.draw, self._tokens)
        self._kept = self._kept | fresh
        return Proposal(
            canvas=renoise(self._tokens, self._kept, noise.tokens()),
            accepted=self._kept,
            draft=mx.where(self._kept, self._tokens, prediction.argmax),
        )


class DiscreteDDIM:
    """Draw the next canvas from the posterior of uniform corruption, given this canvas and the
    model's draw of the clean one (D3PM, https://arxiv.org/abs/2107.03006): at each position the
    draw, the token that stands there, or a random one."""

    def __init__(self, max_steps: int, vocab: int) -> None:
        self.max_steps, self.vocab = max_steps, vocab

    def advance(self, canvas: mx.array, prediction: Prediction, noise: StepNoise) -> Proposal:
        draw = prediction.draw
        to_draw, to_stay = self.posterior(noise.step)
        same = canvas == draw
        # Where canvas and draw agree, staying and taking the draw are one.
        u = noise.uniform()
        agree_draw, _ = self.posterior(noise.step, agree=True)
        take = u < mx.where(same, agree_draw, to_draw)
        stay = ~take & ~same & (u < to_draw + to_stay)
        next_canvas = mx.where(take, draw, mx.where(stay, canvas, noise.tokens()))
        return Proposal(next_canvas, next_canvas == draw, prediction.argmax)

    def posterior(self, step: int, *, agree: bool = False) -> tuple[float, float]:
        """Probability of the draw and of the standing token after step `step` (from 1), where the
        two differ or `agree`; the rest is spread evenly over the whole vocabulary."""
        before = (step - 1) / self.max_steps  # share of clean tokens, rising
        after = step / self.max_steps
        kept = before / after
        uniform_kept, uniform_clean = (1 - kept) / self.vocab, (1 - after) / self.vocab
        # Weight of token k: (kept·[k stands] + uniform_kept) · (after·[k drawn] + uniform_clean).
        spread = uniform_kept * uniform_clean * self.vocab
        if agree:
            both = (kept + uniform_kept) * (after + uniform_clean) - uniform_kept * uniform_clean
            return both / (both + spread), 0.0
        drawn, stands = uniform_kept * after, kept * uniform_clean
        total = drawn + stands + spread
        return drawn / total, stands / total


def make_sampler(config: DiffusionConfig, vocab: int) -> Sampler:
    """The sampler that the settings name, for one canvas."""
    steps, threshold = config.max_denoising_steps, config.accept_threshold
    makers: dict[str, Callable[[], Sampler]] = {
        "entropy-bound": lambda: EntropyBound(config.entropy_bound),
        "confidence-threshold": lambda: ConfidenceThreshold(threshold),
        "block-refinement": lambda: BlockRefinement(threshold, steps),
        "ddim": lambda: DiscreteDDIM(steps, vocab),
    }
    return makers[config.sampler]()


def renoise(draw: mx.array, accepted: mx.array, noise: mx.array) -> mx.array:
    """The next canvas [R, C]: the draw where it was accepted, fresh noise everywhere else."""
    return mx.where(accepted, draw, noise)

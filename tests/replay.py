"""Recorded random draws in the place of random ones, at the seam where a run asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diffusion.canvas import Canvas, Passed
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.diffusion.predict import Predictor
from mlx_diffgemma.model.cache import Prefix
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma


@dataclass
class CanvasDraws:
    """All draws of one canvas of B sequences, N steps."""

    initial: np.ndarray  # [B, C]
    draws: np.ndarray  # [N, B, C]
    noise: np.ndarray  # [N, B, C]


@dataclass(frozen=True)
class ReplayNoise:
    """The recorded noise of one sequence. Past the end of the recording the last step's noise is
    repeated, so that a run that goes on too long is seen as such by who compares it."""

    canvases: Sequence[CanvasDraws]
    row: int

    def initial(self, canvas: int, length: int, vocab: int) -> mx.array:
        return mx.array(self.canvases[canvas].initial[self.row], mx.int32)

    def draw_key(self, canvas: int, step: int) -> mx.array:
        return mx.zeros((2,), mx.uint32)

    def renoise(self, canvas: int, step: int, length: int, vocab: int) -> mx.array:
        return mx.array(_at(self.canvases[canvas].noise, step)[self.row], mx.int32)

    def draws(self, canvas: int, step: int) -> mx.array:
        return mx.array(_at(self.canvases[canvas].draws, step)[self.row], mx.int32)


def replay_noise(canvases: Sequence[CanvasDraws]) -> Callable[[int], ReplayNoise]:
    return lambda row: ReplayNoise(canvases, row)


def replaying(model: DiffusionGemma) -> Denoiser:
    """The model's own predictions with the draws that each canvas's `ReplayNoise` recorded."""
    predictor = Predictor(model)

    def predict(canvases: Sequence[Canvas], prefixes: Sequence[Prefix]) -> list[Passed]:
        found = []
        for canvas, passed in zip(canvases, predictor(canvases, prefixes), strict=True):
            draw = canvas.noise.draws(canvas.index, canvas.step)
            found.append(replace(passed, prediction=replace(passed.prediction, draw=draw)))
        return found

    return Denoiser(model, predict)


def _at(steps: np.ndarray, step: int) -> np.ndarray:
    return steps[min(step, len(steps)) - 1]

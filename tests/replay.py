"""Recorded random draws in the place of random ones, at the seam where the loop asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diffusion.predict import MaterializedPredictor, Prediction
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

_ROWS = 1000  # a key says row · _ROWS + canvas, and the step


@dataclass
class CanvasDraws:
    """All draws of one canvas of B sequences, N steps."""

    initial: np.ndarray  # [B, C]
    draws: np.ndarray  # [N, B, C]
    noise: np.ndarray  # [N, B, C]


class ReplayNoise:
    """The recorded noise, and keys that say which recorded draw belongs to them. Past the end of
    the recording the last step's noise is repeated, so that a run that goes on too long is seen
    as such by who compares it."""

    def __init__(self, canvases: Sequence[CanvasDraws]) -> None:
        self.canvases = canvases

    def initial_canvas(self, rows: Sequence[int], canvas: int, length: int, vocab: int) -> mx.array:
        return mx.array(self.canvases[canvas].initial[list(rows)], mx.int32)

    def draw_keys(self, rows: Sequence[int], canvas: int, step: int) -> mx.array:
        return mx.array([[row * _ROWS + canvas, step] for row in rows], mx.uint32)

    def renoise(
        self, rows: Sequence[int], canvas: int, step: int, length: int, vocab: int
    ) -> mx.array:
        return mx.array(_at(self.canvases[canvas].noise, step)[list(rows)], mx.int32)


class ReplayPredictor:
    """The model's own predictions with recorded categorical draws."""

    def __init__(self, model: DiffusionGemma, canvases: Sequence[CanvasDraws]) -> None:
        self.inner, self.canvases = MaterializedPredictor(model), canvases

    def __call__(
        self, canvas, cache, soft_embeddings, temperature, keys, constraint=None, last=False
    ) -> Prediction:
        prediction = self.inner(canvas, cache, soft_embeddings, temperature, keys, constraint, last)
        draws = []
        for place, step in np.array(keys).tolist():
            row, index = divmod(place, _ROWS)
            draws.append(_at(self.canvases[index].draws, step)[row])
        return replace(prediction, draw=mx.array(np.stack(draws), mx.int32))


def _at(steps: np.ndarray, step: int) -> np.ndarray:
    return steps[min(step, len(steps)) - 1]

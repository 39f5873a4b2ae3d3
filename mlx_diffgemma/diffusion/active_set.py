"""An experiment: positions that have settled are computed rarely.

A position that kept its token and stayed certain for several steps is left out of a pass; the
others see it by its keys and values of the last pass over it. A full pass is run every few steps,
and whenever the canvas looks done, so nothing is committed on stale ground.
Letters: R rows, C canvas, A positions computed.
"""

from __future__ import annotations

from dataclasses import fields, replace

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diffusion.constraints import CanvasConstraint
from mlx_diffgemma.diffusion.predict import MaterializedPredictor, Prediction, TiledPredictor
from mlx_diffgemma.model.cache import PrefixCache

_CERTAIN = 0.01  # nats below which a position may settle
_FULL_EVERY = 4  # steps from one full pass to the next
_BUCKETS = 8  # sizes of an active set, so that few shapes occur


class ActiveSetPredictor:
    """Predictions of the active positions, beside the last ones of those that have settled.

    Args:
        inner: what computes a pass, whole or in part.
        settled_after: steps for which a position must have kept its token and been certain.
        confidence: mean entropy in nats below which a canvas may be done.
    """

    def __init__(
        self,
        inner: MaterializedPredictor | TiledPredictor,
        settled_after: int,
        confidence: float,
    ) -> None:
        self.inner, self.settled_after, self.confidence = inner, settled_after, confidence
        self._last: Prediction | None = None
        self._streak = np.zeros((0, 0), int)
        self._since_full = 0

    def __call__(
        self,
        canvas: mx.array,
        cache: PrefixCache,
        soft_embeddings: mx.array | None,
        temperature: float,
        keys: mx.array,
        constraint: CanvasConstraint | None = None,
        last: bool = False,
    ) -> Prediction:
        if soft_embeddings is None:  # a new canvas
            self._last, self._streak = None, np.zeros(canvas.shape, int)
        known, places = self._last, None
        if known is not None and constraint is None and cache.pads is None:
            places = self._active()
        prediction = None
        if known is not None and places is not None and not last:
            part = self.inner(canvas, cache, soft_embeddings, temperature, keys, places=places)
            prediction = _merged(known, part, places)
            self._since_full += 1
            if self._looks_done(prediction):
                prediction = None
        if prediction is None:
            prediction = self.inner(
                canvas, cache, soft_embeddings, temperature, keys, constraint, last
            )
            self._since_full = 0
        self._count(prediction)
        return prediction

    def _active(self) -> mx.array | None:
        """The positions to compute, [A]; None for a full pass."""
        length = self._streak.shape[1]
        streak = self._streak.min(axis=0)  # a position is active for all rows or for none
        active = int((streak < self.settled_after).sum())
        size = -(-active * _BUCKETS // length) * length // _BUCKETS
        if self._since_full >= _FULL_EVERY or size == 0 or size > length * 3 // 4:
            return None
        return mx.array(np.sort(np.argsort(streak, kind="stable")[:size]))

    def _looks_done(self, prediction: Prediction) -> bool:
        return bool((prediction.entropy.mean(axis=-1) < self.confidence).any().item())

    def _count(self, prediction: Prediction) -> None:
        same = np.array(prediction.entropy) < _CERTAIN
        if self._last is not None:
            same &= np.array(prediction.argmax == self._last.argmax)
        self._streak = np.where(same, self._streak + 1, 0)
        self._last = prediction


def _merged(last: Prediction, part: Prediction, places: mx.array) -> Prediction:
    changes = {}
    for field in fields(Prediction):
        whole = mx.array(getattr(last, field.name))
        whole[:, places] = getattr(part, field.name).astype(whole.dtype)
        changes[field.name] = whole
    return replace(last, **changes)

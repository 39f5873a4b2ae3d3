"""When a canvas is done. Letters: R rows, C canvas."""

from __future__ import annotations

from collections import deque
from typing import Protocol

import numpy as np


class StopRule(Protocol):
    """Sees every step of one canvas in order; made anew for each canvas."""

    def update(
        self, draft: np.ndarray, entropy: np.ndarray, counted: np.ndarray | None = None
    ) -> np.ndarray:
        """Argmax canvases [R, C] and entropies [R, C] in nats of a step -> which rows are done.
        Where `counted` [R, C] is given, only those positions matter."""


class StableAndConfident:
    """The draft equals that of the previous `stability` steps and its mean entropy is below
    `confidence` nats: the reference's `StableAndConfidentStoppingCriteria`."""

    def __init__(self, stability: int, confidence: float) -> None:
        self.stability, self.confidence = stability, confidence
        self._history: deque[np.ndarray] = deque(maxlen=stability)

    def update(
        self, draft: np.ndarray, entropy: np.ndarray, counted: np.ndarray | None = None
    ) -> np.ndarray:
        counted = np.ones(draft.shape, bool) if counted is None else counted
        total = np.where(counted, entropy, 0.0).sum(axis=-1)
        confident = total < self.confidence * np.maximum(counted.sum(axis=-1), 1)
        stable = np.full(len(draft), len(self._history) == self.stability)
        for earlier in self._history:
            stable &= ((earlier == draft) | ~counted).all(axis=-1)
        self._history.append(draft)
        return stable & confident

"""When a canvas is done. Rules are made anew for each canvas. Letters: R rows, C canvas."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mlx_diffgemma.diffusion.config import DiffusionConfig


class StopRule(Protocol):
    """Sees every step of one canvas in order."""

    def update(
        self, draft: np.ndarray, entropy: np.ndarray, counted: np.ndarray | None = None
    ) -> np.ndarray:
        """Drafts [R, C] and entropies [R, C] in nats of a step -> which rows are done. Where
        `counted` [R, C] is given, only those positions matter."""


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
        stable = np.full(len(draft), len(self._history) == self.stability)
        for earlier in self._history:
            stable &= ((earlier == draft) | ~counted).all(axis=-1)
        self._history.append(draft)
        return stable & (_mean(entropy, counted) < self.confidence)


class ConfidentAfter:
    """From step `floor` on, a mean entropy below `confidence` nats is enough."""

    def __init__(self, floor: int, confidence: float) -> None:
        self.floor, self.confidence = floor, confidence
        self._step = 0

    def update(
        self, draft: np.ndarray, entropy: np.ndarray, counted: np.ndarray | None = None
    ) -> np.ndarray:
        self._step += 1
        counted = np.ones(draft.shape, bool) if counted is None else counted
        return (_mean(entropy, counted) < self.confidence) & (self._step >= self.floor)


class AnyOf:
    """Done when one of the rules says so; each of them sees every step."""

    def __init__(self, rules: Sequence[StopRule]) -> None:
        self.rules = rules

    def update(
        self, draft: np.ndarray, entropy: np.ndarray, counted: np.ndarray | None = None
    ) -> np.ndarray:
        return np.any([rule.update(draft, entropy, counted) for rule in self.rules], axis=0)


class UpToEos:
    """Lets a rule look no further than the first eos of the draft whose own entropy is below
    `certain` nats: what follows it is cut off at commit."""

    def __init__(self, rule: StopRule, eos_token_ids: Sequence[int], certain: float) -> None:
        self.rule, self.certain = rule, certain
        self.eos = np.array(eos_token_ids)

    def update(
        self, draft: np.ndarray, entropy: np.ndarray, counted: np.ndarray | None = None
    ) -> np.ndarray:
        ends = np.isin(draft, self.eos) & (entropy < self.certain)
        # An eos that follows an earlier, uncertain one would be cut off with it.
        first = np.isin(draft, self.eos).cumsum(axis=-1) == 1
        behind = np.cumsum(ends & first, axis=-1) - (ends & first) > 0
        # What lies behind counts as settled: left out of the mean, it would delay the stop.
        settled = np.where(behind, self.eos[0], draft)
        return self.rule.update(settled, np.where(behind, 0.0, entropy), counted)


def make_stop_rule(config: DiffusionConfig) -> StopRule:
    """The rule that the settings describe, for one canvas."""
    rule: StopRule = StableAndConfident(config.stability_threshold, config.confidence_threshold)
    if config.confident_after is not None:
        rule = AnyOf([rule, ConfidentAfter(config.confident_after, config.confidence_threshold)])
    if config.stop_at_eos and config.eos_token_ids:
        rule = UpToEos(rule, config.eos_token_ids, config.entropy_bound)
    return rule


def _mean(entropy: np.ndarray, counted: np.ndarray) -> np.ndarray:
    total: np.ndarray = np.where(counted, entropy, 0.0).sum(axis=-1)
    return total / np.maximum(counted.sum(axis=-1), 1)

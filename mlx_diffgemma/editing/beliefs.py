"""The answers of a model to typed questions, from the logits of each question's labels.

Letters: R orders of the options, K options of a question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_diffgemma.editing.calibration import Calibration, log_softmax
from mlx_diffgemma.editing.questions import Question


@dataclass(frozen=True)
class Answer:
    """What the model believes of a question.

    Attributes:
        question: what was asked.
        labels: what stood for each option in the canvas, [K]; empty where the order of the options
            was rotated, so that no label stood for one of them alone.
        log_probs: [draws, K] the logarithms of each draw's probabilities, in nats, before any
            calibration.
        probabilities: [K] the mean over the draws, calibrated where that was asked for; they sum
            to 1.
        spread: [K] the standard deviation over the draws, calibrated alike; 0 for one draw.
    """

    question: Question
    labels: tuple[str, ...]
    log_probs: np.ndarray
    probabilities: tuple[float, ...]
    spread: tuple[float, ...]

    @property
    def best(self) -> str:
        """The most probable option."""
        return self.question.options[int(np.argmax(self.probabilities))]

    @property
    def confidence(self) -> float:
        """1 − H / ln K, with H the entropy of the probabilities in nats: 1 where one option has all
        the mass, and 0 where all are alike."""
        p = np.array(self.probabilities)
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum()
        return float(np.clip(1 - entropy / np.log(len(p)), 0.0, 1.0))

    @property
    def score(self) -> float:
        """The expected number of the option, counted from 0, which for a score is the expected
        level."""
        return float(np.dot(np.arange(len(self.probabilities)), self.probabilities))

    def as_json(self) -> dict[str, Any]:
        """The answer as the wire format has it, and the spread and the confidence beside it."""
        names = self.question.options
        probabilities = dict(zip(names, self.probabilities, strict=True))
        spread = dict(zip(names, self.spread, strict=True))
        kind = self.question.kind
        found: dict[str, Any] = {"type": kind}
        if kind == "noul":
            found |= {"noul": self.probabilities[0], "spread": self.spread[0]}
            return found | {"confidence": self.confidence}
        found |= {"choice": self.best} if kind == "choice" else {"score": self.score}
        found |= {"probabilities": probabilities, "confidence": self.confidence, "spread": spread}
        return found | ({"legend": dict(self.question.legend)} if kind == "score" else {})


@dataclass(frozen=True)
class Decisions:
    """The answers of one request.

    Attributes:
        answers: by the names of the questions, in their order.
        canvases: tokens of each canvas that holds questions; every draw and every order of the
            options has such canvases of its own.
        passes: forward passes over a batch of canvases.
        prompt_tokens: tokens of the prompt, in one order of the options.
        cached_tokens: how many tokens of the prompt were known from an earlier request.
        seed: the seed of every random draw.
    """

    answers: dict[str, Answer]
    canvases: tuple[int, ...]
    passes: int
    prompt_tokens: int
    cached_tokens: int
    seed: int


def answer_from(
    question: Question, labels: Sequence[str], logits: np.ndarray, calibration: Calibration | None
) -> Answer:
    """The answer to a question, from the logits [R, draws, K] of its labels. The R orders are
    averaged in log space, and the draws as probabilities."""
    count = logits.shape[-1]
    orders = max(1, len(logits) // count * count)
    log_probs = log_softmax(logits[:orders])
    if question.kind == "choice":
        # The option `o` stands at the place (o − shift) of the list, whose label it has.
        shifts = [np.roll(each, shift, axis=-1) for shift, each in enumerate(log_probs)]
        log_probs = np.stack(shifts)
    by_draw = log_softmax(log_probs.mean(axis=0))
    mean, each = pooled(by_draw), by_draw
    own = tuple(labels) if len(logits) == 1 or question.kind != "choice" else ()
    if calibration is not None:
        mean, each = (calibration.applied(question.kind, own, x) for x in (mean, each))
    probabilities, spread = np.exp(mean), np.exp(each).std(axis=0)
    return Answer(question, own, by_draw, tuple(probabilities.tolist()), tuple(spread.tolist()))


def pooled(log_probs: np.ndarray) -> np.ndarray:
    """The logarithm [K] of the mean over the draws, from log-probabilities [draws, K]."""
    most = log_probs.max(axis=0)
    return log_softmax(most + np.log(np.exp(log_probs - most).mean(axis=0)))

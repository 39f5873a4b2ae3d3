"""Making probabilities agree with how often answers are right, per type of question.

A temperature divides the log-probabilities ("On Calibration of Modern Neural Networks",
https://arxiv.org/abs/1706.04599), and a bias by label is added. Both are fitted by log loss, and
what is reported is always held out: each fifth of the requests is judged by a fit on the other
four. Letters: E examples, K options.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlx_diffgemma.editing import files
from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma.reading import parse_object

FOLDS = 5
LEAST = 20
"""Fewest answers of a type for the type to be calibrated, and fewest answers that a label is right
in for the label to get a bias."""
BINS = 10
_FORMAT = "mlx-diffgemma calibration 1"
_RIDGE = 1.0  # penalty on the biases, so that a label that is rare moves little
_NEWTON = 50
_SMALLEST = -50.0  # log-probability below which rounding decides


class Identified(Protocol):
    """A model, as far as a calibration needs it."""

    def identity(self) -> str: ...


@dataclass(frozen=True)
class Example:
    """What a model believed of a question, with the right answer.

    Attributes:
        request: number of the request that asked; examples of one request are held out together.
        kind: the type of question.
        labels: what stood for each option, [K]; empty where no label stood for one of them alone.
        log_probs: [K] the log-probability of each option, in nats.
        right: the number of the right option, from 0.
    """

    request: int
    kind: str
    labels: tuple[str, ...]
    log_probs: np.ndarray
    right: int


@dataclass(frozen=True)
class Marks:
    """How good probabilities are.

    Attributes:
        count: number of answers, E.
        accuracy: share of answers whose most probable option is right.
        log_loss: mean of −ln p of the right option, in nats.
        brier: mean of Σ (p − [right])² over the options.
        error: expected calibration error: the mean distance between the probability of the most
            probable option and how often it is right, over ten bins of equal width.
        bins: of each bin that holds answers its mean probability, how often they are right, and
            how many they are.
    """

    count: int
    accuracy: float
    log_loss: float
    brier: float
    error: float
    bins: tuple[tuple[float, float, int], ...]

    @classmethod
    def of(cls, log_probs: Sequence[np.ndarray], right: Sequence[int]) -> Marks:
        """The marks of E answers, from the log-probabilities [K] of each and the number of its
        right option."""
        p = [np.exp(each) for each in log_probs]
        top = np.array([each.max() for each in p])
        hit = np.array([int(np.argmax(each)) == r for each, r in zip(p, right, strict=True)])
        loss = [-max(each[r], _SMALLEST) for each, r in zip(log_probs, right, strict=True)]
        brier = [float((each**2).sum() - 2 * each[r] + 1) for each, r in zip(p, right, strict=True)]
        at = np.minimum((top * BINS).astype(int), BINS - 1)
        bins = tuple(
            (float(top[at == n].mean()), float(hit[at == n].mean()), int((at == n).sum()))
            for n in range(BINS)
            if (at == n).any()
        )
        error = sum(abs(mean - share) * count for mean, share, count in bins) / len(p)
        return cls(
            len(p), float(hit.mean()), float(np.mean(loss)), float(np.mean(brier)), error, bins
        )


@dataclass(frozen=True)
class Fit:
    """What is done to the answers of one type.

    Attributes:
        temperature: number that log-probabilities are divided by.
        bias: what is added to the log-probability of an option by its label, in nats; empty for
            none.
        before, after: how good the held-out probabilities were without and with the fit.
    """

    temperature: float
    bias: Mapping[str, float]
    before: Marks
    after: Marks


@dataclass(frozen=True)
class Calibration:
    """A fit by type of question, for one model.

    Attributes:
        fits: by type; a type that is missing is left as it is.
        settings: fields of `DecisionSettings` that the questions were asked with when it was
            fitted.
        identity: called for the fingerprint of the model that the calibration is for.
    """

    fits: Mapping[str, Fit]
    settings: Mapping[str, Any]
    identity: Callable[[], str] = field(compare=False)

    @classmethod
    def fitted(cls, examples: Sequence[Example], model: Identified, settings: Any) -> Calibration:
        """The fit of each type that has enough examples.

        Raises:
            UsageError: no type has enough.
        """
        counts = Counter(example.kind for example in examples)
        kinds = [kind for kind, count in counts.items() if count >= LEAST]
        if not kinds:
            had = ", ".join(f"{count} of {kind}" for kind, count in counts.items()) or "none"
            raise UsageError(f"too few answers to calibrate on: {had}; give {LEAST} of a type.")
        fits = {kind: _fit([each for each in examples if each.kind == kind]) for kind in kinds}
        return cls(fits, asdict(settings), model.identity)

    def require_model(self, model: Identified) -> None:
        """Raise UsageError unless this calibration was fitted for `model`, or for one with the same
        weights."""
        # Methods are equal where they are of the same model, and that takes no time to see.
        if self.identity != model.identity and self.identity() != model.identity():
            raise UsageError("this calibration belongs to another model; calibrate this one.")

    def applied(self, kind: str, labels: Sequence[str], log_probs: np.ndarray) -> np.ndarray:
        """Log-probabilities [..., K] of answers, calibrated."""
        fit = self.fits.get(kind)
        if fit is None:
            return log_probs
        return _calibrated(log_probs, 1 / fit.temperature, fit.bias, labels)

    def save(self, path: str | Path) -> None:
        """Write the calibration to a file that `load` reads.

        Raises:
            FileError: the file cannot be written.
        """
        text = json.dumps(
            {
                "format": _FORMAT,
                "model": self.identity(),
                "settings": dict(self.settings),
                "types": {kind: asdict(fit) for kind, fit in self.fits.items()},
            },
            indent=1,
        )
        try:
            Path(path).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise files.FileError(
                f"{path} cannot be written: {error.strerror}; name another."
            ) from None

    @classmethod
    def load(cls, path: str | Path, model: Identified) -> Calibration:
        """Read what `save` wrote for the same model.

        Raises:
            FileError: the file cannot be read.
            CheckpointError: the file holds no calibration, or one for another model.
        """
        try:
            data = parse_object(files.read_text(path), Path(path), mend="calibrate again")
            if data["format"] != _FORMAT:
                raise ValueError(f"its format is {data['format']!r:.60}")
            fits = {
                str(kind): Fit(
                    float(fit["temperature"]),
                    {str(label): float(bias) for label, bias in fit["bias"].items()},
                    _marks(fit["before"]),
                    _marks(fit["after"]),
                )
                for kind, fit in data["types"].items()
            }
            for fit in fits.values():
                if not 0 < fit.temperature < np.inf:
                    raise ValueError("a temperature is not above 0")
                if not np.isfinite(list(fit.bias.values())).all():
                    raise ValueError("a bias is not finite")
            settings, fingerprint = dict(data["settings"]), data["model"]
        except (
            CheckpointError, ValueError, KeyError, TypeError, AttributeError, OverflowError,
        ) as error:  # fmt: skip
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{path} is no calibration ({reason}); name a file that decide calibrate saved."
            ) from None
        if fingerprint != model.identity():
            raise CheckpointError(
                f"{path} was made for another model; make one for this with decide calibrate."
            )
        return cls(fits, settings, model.identity)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """[..., K] -> the logarithms of probabilities in proportion to exp(x)."""
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def _marks(data: Mapping[str, Any]) -> Marks:
    bins = tuple((float(a), float(b), int(n)) for a, b, n in data["bins"])
    return Marks(**{**data, "bins": bins})


def _calibrated(
    log_probs: np.ndarray, inverse: float, bias: Mapping[str, float], labels: Sequence[str]
) -> np.ndarray:
    shift = np.array([bias.get(label, 0.0) for label in labels]) if labels and bias else 0.0
    return log_softmax(np.maximum(log_probs, _SMALLEST) * inverse + shift)


def _fit(examples: Sequence[Example]) -> Fit:
    """The fit for examples of one type: none, a temperature, or a temperature and biases, whichever
    has the least loss on what is held out, and the simpler of two whose loss is alike."""
    folds = np.array([example.request % FOLDS for example in examples])
    if len(set(folds.tolist())) < 2:
        folds = np.arange(len(examples)) % FOLDS
    right = [example.right for example in examples]
    before = Marks.of([example.log_probs for example in examples], right)
    best: tuple[Marks, bool] | None = None
    for biased in (False, True):
        held_out: dict[int, np.ndarray] = {}
        for fold in sorted(set(folds.tolist())):
            rest = [example for example, own in zip(examples, folds, strict=True) if own != fold]
            inverse, bias = fit(rest, biased=biased)
            for n in np.flatnonzero(folds == fold).tolist():
                each = examples[n]
                held_out[n] = _calibrated(each.log_probs, inverse, bias, each.labels)
        marks = Marks.of([held_out[n] for n in range(len(examples))], right)
        if marks.log_loss < (before if best is None else best[0]).log_loss:
            best = marks, biased
    if best is None:
        return Fit(1.0, {}, before, before)
    inverse, bias = fit(examples, biased=best[1])
    return Fit(1 / inverse, bias, before, best[0])


def fit(examples: Sequence[Example], *, biased: bool) -> tuple[float, dict[str, float]]:
    """The inverse of the temperature, and the biases by label in nats, with the least log loss on
    the examples; without biases unless `biased`.

    The loss, with the penalty on the biases, is convex in both: Newton's method finds its minimum.
    Labels that are right fewer than `LEAST` times, or never wrong, get none.
    """
    labels = _labels(examples) if biased else []
    place = {label: n + 1 for n, label in enumerate(labels)}
    widest = max(len(example.log_probs) for example in examples)
    features = np.zeros((len(examples), widest, 1 + len(labels)))
    missing = np.ones((len(examples), widest), bool)
    for n, example in enumerate(examples):
        count = len(example.log_probs)
        features[n, :count, 0] = np.maximum(example.log_probs, _SMALLEST)
        missing[n, :count] = False
        for option, label in enumerate(example.labels):
            if label in place:
                features[n, option, place[label]] = 1.0
    right = np.array([example.right for example in examples])
    own = features[np.arange(len(examples)), right]
    ridge = np.full(1 + len(labels), _RIDGE)
    ridge[0] = 1e-6
    start = np.zeros(1 + len(labels))
    start[0] = 1.0

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        x = np.where(missing, -np.inf, features @ weights)
        log_p = log_softmax(x)
        of_right = log_p[np.arange(len(examples)), right]
        pull = 0.5 * (ridge * (weights - start) ** 2).sum()
        return float(-of_right.sum() + pull), np.exp(log_p)

    weights = start
    value, p = loss(weights)
    for _ in range(_NEWTON):
        mean = np.einsum("ek,ekf->ef", p, features)
        gradient = (mean - own).sum(axis=0) + ridge * (weights - start)
        second = np.einsum("ek,ekf,ekg->fg", p, features, features) - mean.T @ mean
        direction = np.linalg.solve(second + np.diag(ridge), gradient)
        step = 1.0
        while step > 1e-6:
            tried = weights - step * direction
            tried[0] = max(tried[0], 1e-3)
            after, p_after = loss(tried)
            if after < value:
                break
            step /= 2
        else:
            break
        gained, weights, value, p = value - after, tried, after, p_after
        if gained < 1e-10 * len(examples):
            break
    return float(weights[0]), {label: float(weights[place[label]]) for label in labels}


def _labels(examples: Sequence[Example]) -> list[str]:
    """The labels that get a bias."""
    right = Counter(each.labels[each.right] for each in examples if each.labels)
    offered = Counter(label for each in examples for label in each.labels)
    return [label for label, count in right.items() if LEAST <= count < offered[label]]

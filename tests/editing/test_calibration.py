"""Calibration finds what distorted probabilities, and says so on what it has not seen."""

from __future__ import annotations

import json

import numpy as np
import pytest
from small_models import demo, tiny

from mlx_diffgemma.editing import calibration
from mlx_diffgemma.editing.calibration import Calibration, Example, Marks, log_softmax
from mlx_diffgemma.editing.decide import DecisionSettings, calibrate, decide
from mlx_diffgemma.errors import CheckpointError, UsageError


class Someone:
    def __init__(self, name: str = "me") -> None:
        self.name = name

    def identity(self) -> str:
        return self.name


def distorted(count, sharpness, bias, seed=0, kind="choice"):
    """Answers drawn from true probabilities, and what an overconfident, biased model says."""
    rng, labels, examples = np.random.default_rng(seed), ("A", "B", "C"), []
    for request in range(count):
        true = log_softmax(rng.normal(0, 1.5, 3))
        right = int(rng.choice(3, p=np.exp(true)))
        said = log_softmax((true + np.array(bias)) * sharpness)
        examples.append(Example(request, kind, labels, said, right))
    return examples


def test_a_temperature_and_a_bias_are_found_again():
    examples = distorted(4000, 3.0, (0.9, 0.0, -0.9))
    inverse, bias = calibration.fit(examples, biased=True)
    assert 1 / inverse == pytest.approx(3.0, rel=0.1)
    shifts = np.array([bias[label] for label in "ABC"])
    assert shifts - shifts.mean() == pytest.approx([-0.9, 0.0, 0.9], abs=0.15)


def test_held_out_answers_are_calibrated():
    found = Calibration.fitted(distorted(1500, 3.0, (0.9, 0, -0.9)), Someone(), DecisionSettings())
    fit = found.fits["choice"]
    assert fit.bias and fit.after.log_loss < fit.before.log_loss - 0.1
    assert fit.after.brier < fit.before.brier - 0.05
    assert fit.before.error > 0.15 and fit.after.error < 0.05
    fresh = distorted(2000, 3.0, (0.9, 0, -0.9), seed=9)
    after = Marks.of(
        [found.applied("choice", each.labels, each.log_probs) for each in fresh],
        [each.right for each in fresh],
    )
    assert after.error < 0.05 and after.log_loss == pytest.approx(fit.after.log_loss, abs=0.06)


def test_what_is_calibrated_already_stays_as_it_is_and_what_is_rare_has_no_bias():
    honest = Calibration.fitted(distorted(3000, 1.0, (0, 0, 0)), Someone(), DecisionSettings())
    assert honest.fits["choice"].temperature == pytest.approx(1.0, abs=0.1)
    few = Calibration.fitted(distorted(45, 3.0, (0, 0, 0)), Someone(), DecisionSettings())
    assert set(few.fits["choice"].bias) <= {"A", "B", "C"} and few.fits["choice"].temperature > 1.5
    even = np.log([0.5, 0.5])
    assert few.applied("noul", ("yes", "no"), even).tolist() == even.tolist()
    with pytest.raises(UsageError, match=r"too few answers to calibrate on: 19 of choice; give 20"):
        Calibration.fitted(distorted(19, 1.0, (0, 0, 0)), Someone(), DecisionSettings())


def test_figures_are_those_of_their_definitions():
    p = np.log([[0.7, 0.2, 0.1], [0.65, 0.3, 0.05], [0.2, 0.2, 0.6], [0.95, 0.04, 0.01]])
    marks = Marks.of(list(p), [0, 1, 2, 0])
    assert marks.accuracy == 0.75
    brier = [0.09 + 0.04 + 0.01, 0.4225 + 0.49 + 0.0025, 0.04 + 0.04 + 0.16, 0.0025 + 0.0017]
    assert marks.brier == pytest.approx(np.mean(brier))
    assert marks.log_loss == pytest.approx(-np.mean(np.log([0.7, 0.3, 0.6, 0.95])))
    # Bins [.6, .7): 0.65 wrong, 0.6 right; [.7, .8) right; [.9, 1) right.
    assert marks.error == pytest.approx((2 * abs(0.625 - 0.5) + 0.3 + 0.05) / 4)
    assert [count for *_, count in marks.bins] == [2, 1, 1]


def test_a_file_is_for_one_model(tmp_path):
    path = tmp_path / "c.json"
    found = Calibration.fitted(distorted(300, 3.0, (0.9, 0, -0.9)), Someone(), DecisionSettings())
    found.save(path)
    again = Calibration.load(path, Someone())
    assert again == found and again.fits["choice"].after.bins == found.fits["choice"].after.bins
    with pytest.raises(CheckpointError, match="was made for another model; make one for this"):
        Calibration.load(path, Someone("you"))
    for damage in ({"types": {"choice": {"temperature": 0}}}, {"types": 1}, {"format": "x"}):
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
        with pytest.raises(CheckpointError, match="is no calibration"):
            Calibration.load(path, Someone())
    model, tokenizer = demo()
    question = {"q": {"type": "noul"}}
    with pytest.raises(UsageError, match="belongs to another model; calibrate this one"):
        decide(model, tokenizer, "x", question, calibration=found, seed=0, raw=True)


def test_examples_are_looked_at_and_the_fit_is_applied():
    model, tokenizer = tiny(48)
    criteria = {"type": "choice", "criteria": {"a": None, "b": None, "c": None}}
    examples = [
        {"state": f"s{n}", "questions": {"q": criteria}, "answers": {"q": "abc"[n * 7 % 3]}}
        for n in range(24)
    ]
    found = calibrate(model, tokenizer, examples, raw=True, draws=2)
    assert found.settings["draws"] == 2 and found.fits["choice"].before.count == 24
    given = {"seed": 5, "raw": True, "draws": 2}
    plain = decide(model, tokenizer, "s", {"q": criteria}, **given).answers["q"]
    other = decide(model, tokenizer, "s", {"q": criteria}, calibration=found, **given).answers["q"]
    expected = found.applied("choice", plain.labels, np.log(plain.probabilities))
    assert other.probabilities == pytest.approx(np.exp(expected).tolist(), abs=1e-6)
    assert other.probabilities != pytest.approx(plain.probabilities, abs=1e-3)
    wrong = {"state": "s", "questions": {"q": criteria}, "answers": {"q": "d"}}
    with pytest.raises(UsageError, match=r"^example 1: question 'q': the answer 'd' is none of"):
        calibrate(model, tokenizer, [wrong], raw=True)
    with pytest.raises(UsageError, match=r"^example 1 must have a state, questions, and answers"):
        calibrate(model, tokenizer, [{"state": "s"}], raw=True)

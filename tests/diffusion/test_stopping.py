"""When a canvas is done: the loop's own rule, shown drafts and entropies step by step."""

from __future__ import annotations

import numpy as np
import pytest
from mock_model import LENGTH, VOCAB, MockModel, Told

from mlx_diffgemma.diffusion.canvas import Canvas
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.diffusion.noise import SeededNoise

SURE, UNSURE = np.zeros(3), np.full(3, 0.5)
A, B = np.array([1, 2, 3]), np.array([1, 2, 4])


def converged(threshold: int, confidence: float, *rows, counted=None) -> list[list[bool]]:
    """What the rule says of each row [step] that predicts (draft, entropy)."""
    model = MockModel()
    denoiser = Denoiser(model, Told(rows))
    config = DiffusionConfig(
        stability_threshold=threshold, confidence_threshold=confidence, max_denoising_steps=50
    )
    canvases = [
        Canvas.start(config, SeededNoise(0, row), 0, len(steps[0][0]), VOCAB, counted=counted)
        for row, steps in enumerate(rows)
    ]
    found: list[list[bool]] = [[] for _ in rows]
    for _ in rows[0]:
        canvases = denoiser.step(canvases, [model.make_cache().prefix] * len(rows))
        for row, canvas in enumerate(canvases):
            found[row].append(canvas.converged)
            assert canvas.done == canvas.converged
    return found


@pytest.mark.parametrize(
    "threshold, expected",
    [
        (0, [True, True, True, True, True, True]),
        (1, [False, True, False, True, True, True]),
        (2, [False, False, False, False, True, True]),
        (3, [False, False, False, False, False, True]),
    ],
)
def test_stability(threshold, expected):
    """`threshold` is a number of previous steps: 1 needs two equal canvases."""
    assert converged(threshold, 0.1, [(draft, SURE) for draft in (A, A, B, B, B, B)]) == [expected]


def test_an_unsure_step_counts_for_stability():
    assert converged(1, 0.1, [(A, UNSURE), (A, SURE)]) == [[False, True]]


def test_the_mean_entropy_must_lie_below_the_threshold():
    step = (np.zeros(4), np.array([0.25, 0.25, 0.0, 0.0]))
    assert converged(0, 0.125, [step]) == [[False]]
    assert converged(0, 0.126, [step]) == [[True]]


def test_rows_are_judged_apart():
    rows = ([(A, SURE), (A, SURE)], [(A, SURE), (B, SURE)], [(A, SURE), (A, UNSURE)])
    assert converged(1, 0.1, *rows) == [[False, True], [False, False], [False, False]]


def test_only_counted_positions_matter():
    counted = np.array([True, True, False])
    steps = [(A, SURE), (B, np.array([0.0, 0.0, 9.0]))]
    assert converged(1, 0.1, steps, counted=counted) == [[False, True]]
    assert converged(1, 0.1, steps) == [[False, False]]


def test_a_canvas_of_which_nothing_counts_is_done_at_once():
    """All of it may be fixed already."""
    assert converged(0, 0.1, [(A, UNSURE)], counted=np.zeros(3, bool)) == [[True]]


@pytest.mark.parametrize("endless", [False, True])
def test_used_up_steps_end_a_canvas_that_has_not_converged(endless):
    """But for an endless one, which its driver ends, whatever the rule says."""
    model = MockModel()
    steps = [(np.full(LENGTH, 3), np.full(LENGTH, 9.0 if n < 5 else 0.0)) for n in range(7)]
    denoiser = Denoiser(model, Told([steps]))
    config = DiffusionConfig(max_denoising_steps=3, stability_threshold=0)
    canvas = Canvas.start(config, SeededNoise(0), 0, LENGTH, VOCAB, endless=endless)
    found = []
    for _ in steps if endless else steps[:3]:
        (canvas,) = denoiser.step([canvas], [model.make_cache().prefix])
        found.append((canvas.done, canvas.converged))
    if endless:
        assert found == [(False, False)] * 5 + [(False, True)] * 2
    else:
        assert found == [(False, False), (False, False), (True, False)]

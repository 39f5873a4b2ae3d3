"""When a canvas is done."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_diffgemma.diffusion.stopping import StableAndConfident

SURE, UNSURE = np.zeros((1, 3)), np.full((1, 3), 0.5)
A, B = np.array([[1, 2, 3]]), np.array([[1, 2, 4]])


def stops(threshold: int, drafts: list[np.ndarray]) -> list[bool]:
    rule = StableAndConfident(threshold, 0.1)
    return [bool(rule.update(draft, SURE)[0]) for draft in drafts]


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
    assert stops(threshold, [A, A, B, B, B, B]) == expected


def test_an_unsure_step_counts_for_stability():
    rule = StableAndConfident(1, 0.1)
    assert [rule.update(A, UNSURE)[0], rule.update(A, SURE)[0]] == [False, True]


def test_the_mean_entropy_must_lie_below_the_threshold():
    entropies = np.array([[0.25, 0.25, 0.0, 0.0]])
    draft = np.zeros((1, 4))
    assert not StableAndConfident(0, 0.125).update(draft, entropies)[0]
    assert StableAndConfident(0, 0.126).update(draft, entropies)[0]


def test_rows_are_judged_apart():
    rule = StableAndConfident(1, 0.1)
    rule.update(np.concatenate([A, A, A]), np.concatenate([SURE] * 3))
    done = rule.update(np.concatenate([A, B, A]), np.concatenate([SURE, SURE, UNSURE]))
    assert done.tolist() == [True, False, False]


def test_only_counted_positions_matter():
    counted = np.array([[True, True, False]])
    rule = StableAndConfident(1, 0.1)
    rule.update(A, SURE, counted)
    assert rule.update(B, np.array([[0.0, 0.0, 9.0]]), counted)[0]

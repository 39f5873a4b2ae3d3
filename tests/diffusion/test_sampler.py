"""Acceptance by entropy bound, renoising, and the temperature schedule."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.diffusion.predict import entropy
from mlx_diffgemma.diffusion.sampler import renoise
from mlx_diffgemma.diffusion.schedule import LinearTemperature
from mlx_diffgemma.kernels.accept_renoise import entropy_bound_accept


def accept(values, bound: float) -> list[bool]:
    return np.array(entropy_bound_accept(mx.array([values]), bound))[0].tolist()


def naive(values, bound: float) -> list[bool]:
    taken, spent = [False] * len(values), 0.0
    for place in sorted(range(len(values)), key=lambda i: values[i]):
        if spent > bound:
            break
        taken[place] = True
        spent += values[place]
    return taken


@pytest.mark.parametrize(
    "values, bound, expected",
    [
        ([5.0, 4.0, 3.0], 0.1, [False, False, True]),  # the lowest always is
        ([0.0, 0.0, 0.0], 0.1, [True, True, True]),
        ([0.25, 0.25, 0.25, 0.25], 0.5, [True, True, True, False]),  # sum before: 0, ¼, ½, ¾
        ([2.0, 2.0, 2.0], 0.1, [True, False, False]),
        ([1.0, 0.0625, 0.125, 0.5], 0.125, [False, True, True, False]),
        ([1.0, 0.0625, 0.125, 0.5], 0.1875, [False, True, True, True]),  # equal to the bound
        ([3.0], 0.1, [True]),
        ([0.5, 9.0, 0.0], 100.0, [True, True, True]),
    ],
)
def test_accept(values, bound, expected):
    assert accept(values, bound) == expected


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=40, unique=True),
    st.integers(1, 4000),
)
def test_accept_equals_a_naive_rule(entropies, bound):
    """In 1/64 nats, which float32 adds without rounding."""
    values = [value / 64 for value in entropies]
    assert accept(values, bound / 64) == naive(values, bound / 64)


def test_accept_takes_each_row_by_itself():
    rows = np.random.default_rng(0).random((4, 16)).astype(np.float32)
    together = np.array(entropy_bound_accept(mx.array(rows), 0.4))
    for row, taken in zip(rows, together, strict=True):
        assert accept(row.tolist(), 0.4) == taken.tolist()


def test_renoise_takes_draws_where_accepted_and_noise_elsewhere():
    draw, noise = mx.array([[1, 2, 3]]), mx.array([[7, 8, 9]])
    accepted = mx.array([[True, False, True]])
    assert renoise(draw, accepted, noise).tolist() == [[1, 8, 3]]


def test_entropy_in_nats():
    logits = np.random.default_rng(0).normal(0, 5, (3, 4, 50))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -(p * np.log(p)).sum(-1)
    found = np.array(entropy(mx.array(logits.astype(np.float32))))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert entropy(mx.zeros((1, 1, 64))).item() == pytest.approx(np.log(64), abs=1e-5)
    one = mx.where(mx.arange(64) == 3, 0.0, -mx.inf)
    assert entropy(one).item() == 0


@pytest.mark.parametrize(
    "step, expected", [(1, 0.8), (2, 0.4 + 0.4 * 47 / 48), (25, 0.6), (48, 0.4 + 0.4 / 48)]
)
def test_temperature_of_the_default_schedule(step, expected):
    assert LinearTemperature(0.4, 0.8, 48).at(step) == pytest.approx(expected, rel=1e-12)


def test_temperature_of_a_single_step_is_the_highest():
    assert LinearTemperature(0.4, 0.8, 1).at(1) == 0.8


def test_temperature_that_is_constant():
    assert [LinearTemperature(0.7, 0.7, 3).at(step) for step in (1, 2, 3)] == [0.7] * 3

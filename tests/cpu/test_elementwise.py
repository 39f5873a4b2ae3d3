"""The polynomial exp and tanh of the CPU against float64."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.cpu.elementwise import exp_nonpositive, tanh


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    """A GPU has its own functions."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def test_exponentials() -> None:
    x = np.linspace(-87, 0, 400_001).astype(np.float32)
    found = np.array(exp_nonpositive(mx.array(x))).astype(np.float64)
    exact = np.exp(x.astype(np.float64))
    error = np.abs(found / exact - 1)
    assert error.max() < 5e-6  # the rounding of x itself, times 87
    assert error[x > -1].max() < 2e-7
    assert exp_nonpositive(mx.array([0.0])).item() == 1.0


def test_what_is_impossible_has_no_mass_at_all() -> None:
    x = mx.array([-88.1, -100.0, -3e38, -np.inf])
    assert exp_nonpositive(x).tolist() == [0.0] * 4


def test_hyperbolic_tangents() -> None:
    small = np.geomspace(1e-6, 0.3, 100_001)
    x = np.concatenate([small, -small, np.linspace(-40, 40, 400_001)]).astype(np.float32)
    found = np.array(tanh(mx.array(x))).astype(np.float64)
    exact = np.tanh(x.astype(np.float64))
    assert np.abs(found - exact).max() < 2e-7
    near = (np.abs(x) < 0.3) & (x != 0)
    assert np.abs(found[near] / exact[near] - 1).max() < 1e-6
    edges = mx.array([0.0, 1e30, -1e30, np.inf, -np.inf])
    assert tanh(edges).tolist() == [0.0, 1.0, -1.0, 1.0, -1.0]


def test_what_is_not_a_number_stays_so() -> None:
    x = mx.array([np.nan])
    assert np.isnan(exp_nonpositive(x).item()) and np.isnan(tanh(x).item())

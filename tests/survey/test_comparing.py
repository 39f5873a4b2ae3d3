"""What counts as a difference, and how it is said."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.kernels.dispatch import MetalKernel
from mlx_diffgemma.survey.comparing import Case, Comparison, DifferenceError

NAN = float("nan")


@pytest.mark.parametrize(
    ("ours", "theirs", "worst"),
    [
        ([1.0, -2.0], [1.0, -2.0], 0.0),
        ([1.05, NAN], [1.0, NAN], 0.5),
        ([float("inf"), 0.02], [float("inf"), 0.0], 1.0),
        ([], [], 0.0),
    ],
)
def test_values_that_are_near_are_measured_by_what_is_allowed(ours, theirs, worst):
    found = Comparison()
    found.close("it", ours, theirs, rtol=0.08, atol=0.02)
    assert found.worst == pytest.approx(worst)


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        ([1.2, 1.0], [1.0, 1.0], "it: 1 of 2 differ, one is 1.2 and not 1"),
        ([NAN], [1.0], "one is nan and not 1"),
        ([1.0], [NAN], "one is 1 and not nan"),
        ([float("inf")], [1.0], "one is inf and not 1"),
        ([1.0], [float("inf")], "one is 1 and not inf"),
        ([[1.0]], [1.0], "it: the shape is (1, 1), not (1,)"),
        (mx.array([1.0]), mx.array([1.0], mx.bfloat16), "it in mlx.core.bfloat16: it is not so"),
    ],
)
def test_a_difference_is_one_line(ours, theirs, says):
    with pytest.raises(DifferenceError) as raised:
        Comparison().close("it", ours, theirs, rtol=0.1)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_equal_values_are_equal_to_the_last_bit():
    found = Comparison()
    found.equal("it", mx.array([1, 2]), np.array([1, 2]))
    with pytest.raises(DifferenceError):
        found.equal("it", [1.0], [np.nextafter(1.0, 2.0)])


def test_a_kernel_that_was_not_launched_is_a_difference():
    kernel = MetalKernel("some", (), (), "")
    runs = []

    def launching(how, found):
        runs.append(how)
        if how != "mlx":
            how(kernel)

    def launcher(kernel, **arguments):
        return []

    assert Case("g", "n", launching, {"some": 1}).run(launcher) == 0
    with pytest.raises(DifferenceError, match=r"launched were {'some': 1}, not {'some': 2}"):
        Case("g", "n", launching, {"some": 2}).run(launcher)
    assert Case("g", "n", launching, {"some": 2}).run(None) == 0 and runs[-1] == "mlx"

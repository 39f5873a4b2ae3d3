"""Checks of one implementation beside another, which need no test framework."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.kernels.dispatch import Implementation, Launcher, MetalKernel

Values = mx.array | np.ndarray | Sequence[Any]


class DifferenceError(Exception):
    """Two implementations do not give the same; the message is one line."""


@dataclass
class Comparison:
    """What was compared so far.

    Attributes:
        worst: the largest difference, as a share of the one that was allowed.
    """

    worst: float = 0.0

    def equal(self, what: str, ours: Values, theirs: Values) -> None:
        """Compare values that must be equal.

        Raises:
            DifferenceError: they are not, or differ in shape or type.
        """
        self.close(what, ours, theirs, rtol=0.0)

    def close(
        self, what: str, ours: Values, theirs: Values, *, rtol: float, atol: float = 0.0
    ) -> None:
        """Compare values that may differ by `atol` and by `rtol` of theirs. A NaN is equal to a
        NaN.

        Raises:
            DifferenceError: they differ by more, or in shape or type.
        """
        if isinstance(ours, mx.array) and isinstance(theirs, mx.array):
            self.holds(f"{what} in {theirs.dtype}", ours.dtype == theirs.dtype)
        mine, other = _numbers(ours), _numbers(theirs)
        if mine.shape != other.shape:
            raise DifferenceError(f"{what}: the shape is {mine.shape}, not {other.shape}")
        same = (mine == other) | (np.isnan(mine) & np.isnan(other))
        with np.errstate(all="ignore"):
            shares = np.abs(mine - other) / (atol + rtol * np.abs(other))
        shares = np.where(same, 0.0, np.where(np.isnan(shares), np.inf, shares))
        wrong = shares > 1
        if wrong.any():
            place = np.unravel_index(np.argmax(shares), shares.shape)
            raise DifferenceError(
                f"{what}: {wrong.sum()} of {wrong.size} differ, one is {mine[place]:.8g} and not "
                f"{other[place]:.8g}"
            )
        self.worst = max(self.worst, float(shares.max(initial=0.0)))

    def holds(self, what: str, is_so: bool) -> None:
        """Compare nothing, but say that something does not hold.

        Raises:
            DifferenceError: `is_so` is false.
        """
        if not is_so:
            raise DifferenceError(f"{what}: it is not so")


def _numbers(values: Values) -> np.ndarray:
    if isinstance(values, mx.array) and mx.issubdtype(values.dtype, mx.floating):
        values = values.astype(mx.float32)
    return np.asarray(np.array(values), np.float64)


Check = Callable[[Launcher | Implementation, Comparison], None]
"""Runs something in an implementation, and compares what comes out with something else."""


@dataclass(frozen=True)
class Case:
    """One thing to compare.

    Attributes:
        group: name of what is compared.
        name: how it is compared, such as its shapes and types.
        check: does it.
        kernels: how often each kernel is launched in it, by the names of the kernels.
    """

    group: str
    name: str
    check: Check = field(repr=False)
    kernels: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.group}, {self.name}"

    def run(self, launcher: Launcher | None) -> float:
        """The largest difference, as a share of the one that is allowed.

        Args:
            launcher: runs the source of the kernels; None has their twins run.

        Raises:
            DifferenceError: more than that differs, or other kernels were launched.
        """
        launched: Counter[str] = Counter()
        comparison = Comparison()
        if launcher is None:
            self.check("mlx", comparison)
            return comparison.worst
        launch = launcher

        def noted(kernel: MetalKernel, **arguments: Any) -> list[mx.array]:
            launched[kernel.name] += 1
            return launch(kernel, **arguments)

        self.check(noted, comparison)
        if launched != Counter(self.kernels):
            raise DifferenceError(f"launched were {dict(launched)}, not {dict(self.kernels)}")
        return comparison.worst

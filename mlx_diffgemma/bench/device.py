"""The device and what it can do at best, as it is measured on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import mlx.core as mx

from mlx_diffgemma.bench.counting import Cost
from mlx_diffgemma.bench.timing import least_seconds

_LONG = 0.05  # seconds from which a single measurement counts as steady
_LARGEST = 1 << 13  # side of the largest product, which takes 0.2 GB in 16 bits
_COPY_BYTES = 1 << 28


@dataclass(frozen=True)
class Device:
    """The default device of a process, and its peaks.

    Attributes:
        name: of the processor, as MLX gives it.
        mlx: version of MLX.
        dtype: type of the numbers in the product that was measured.
        operations: operations per second, the most of all products tried.
        bandwidth: bytes per second, read and written, of a large copy.
        blas: what OpenBLAS calls itself where it was put under MLX, else None.
    """

    name: str
    mlx: str
    dtype: str
    operations: float
    bandwidth: float
    blas: str | None = None

    def floor(self, cost: Cost) -> float:
        """Seconds that `cost` takes at least, if computing hides all reading or the reverse."""
        return max(cost.operations / self.operations, cost.bytes / self.bandwidth)


def measure_device(dtype: mx.Dtype, blas: str | None = None) -> Device:
    """Measure the default device of this process: products in `dtype`, and a copy. `blas` is what
    OpenBLAS calls itself where it was put under MLX."""
    info = mx.device_info()
    kind = "GPU" if mx.default_device().type == mx.DeviceType.gpu else "CPU"
    return Device(
        name=str(info.get("device_name") or info.get("architecture") or kind),
        mlx=version("mlx"),
        dtype=str(dtype).rpartition(".")[2],
        operations=_product_peak(dtype),
        bandwidth=_copy_peak(),
        blas=blas,
    )


def _product_peak(dtype: mx.Dtype) -> float:
    """Operations per second of square products, doubled in size until one takes long enough."""
    best, side = 0.0, 512
    while True:
        left, right = (mx.full((side, side), value, dtype) for value in (0.5, 0.25))
        mx.eval(left, right)
        taken = least_seconds(partial(_multiply, left, right), repeats=3)
        best = max(best, 2 * side**3 / taken)
        if taken >= _LONG or side >= _LARGEST:
            return best
        side *= 2


def _multiply(left: mx.array, right: mx.array) -> None:
    mx.eval(left @ right)


def _copy_peak() -> float:
    source = mx.zeros((_COPY_BYTES // 4,), mx.float32)
    mx.eval(source)
    return 2 * _COPY_BYTES / least_seconds(lambda: mx.eval(source + 1), repeats=5)


def load_a_core() -> float | None:
    """Average number of runnable processes per core over the last minute; None where the system
    does not say."""
    cores = os.cpu_count()
    return os.getloadavg()[0] / cores if cores and hasattr(os, "getloadavg") else None

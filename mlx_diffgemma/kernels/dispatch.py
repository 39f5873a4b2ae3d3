"""Which implementation of a kernel runs: its Metal source or its plain-MLX twin.

Every kernel asks `launcher_for` and nothing else decides. "auto" takes Metal where the default
device is a Metal GPU. `override` forces a choice on everything that runs inside it, and lets a
caller put its own launcher in Metal's place: the tests run the Metal source on the CPU that way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Protocol

import mlx.core as mx

Implementation = Literal["auto", "metal", "mlx"]


@dataclass(frozen=True)
class MetalKernel:
    """A kernel as `mx.fast.metal_kernel` takes it: the body of a function and its parameters."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    header: str = field(default="", repr=False)


class Launcher(Protocol):
    """Runs a kernel over `grid` threads in groups of `threadgroup`, and returns its outputs."""

    def __call__(
        self,
        kernel: MetalKernel,
        *,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, Any]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]: ...


_override: ContextVar[Implementation | Launcher] = ContextVar("implementation", default="auto")


@contextmanager
def override(choice: Implementation | Launcher) -> Iterator[None]:
    """Inside, every kernel left on "auto" runs as `choice` says: "metal", "mlx" or a launcher."""
    token = _override.set(choice)
    try:
        yield
    finally:
        _override.reset(token)


def launcher_for(implementation: Implementation | Launcher) -> Launcher | None:
    """What runs the Metal source, or None where the plain-MLX twin is to run."""
    choice = _override.get() if implementation == "auto" else implementation
    if choice == "auto":
        on_gpu = mx.default_device().type == mx.DeviceType.gpu
        choice = "metal" if on_gpu and mx.metal.is_available() else "mlx"
    if choice == "mlx":
        return None
    return launch_on_metal if choice == "metal" else choice


def launch_on_metal(kernel: MetalKernel, **arguments: Any) -> list[mx.array]:
    """A `Launcher` that runs the kernel on the GPU."""
    return _compiled(kernel)(**arguments)


@cache
def _compiled(kernel: MetalKernel) -> Any:
    return mx.fast.metal_kernel(
        name=f"diffgemma_{kernel.name}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=kernel.source,
        header=kernel.header,
    )

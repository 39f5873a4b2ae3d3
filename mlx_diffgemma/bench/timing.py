"""Stopwatches: seconds and bytes of something that is run again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import mlx.core as mx

from mlx_diffgemma.bench.counted import replaced

Clock = Callable[[], float]


def seconds(run: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Seconds of one call, until the device has done all that the call gave it. Otherwise, what a
    step queues for the next one would count as part of whatever is timed after it."""
    start = clock()
    run()
    mx.synchronize()
    return clock() - start


def median_seconds(run: Callable[[], object], repeats: int, warmup: int = 1) -> float:
    """Median seconds of `repeats` calls, after `warmup` calls that do not count."""
    for _ in range(warmup):
        run()
    return median(seconds(run) for _ in range(repeats))


def least_seconds(run: Callable[[], object], repeats: int) -> float:
    """Least seconds of `repeats` calls, after one that does not count: what the device can do when
    nothing disturbs it."""
    run()
    return min(seconds(run) for _ in range(repeats))


def alternate(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each of several things, run in turns so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            taken = seconds(run, clock)
            if turn >= warmup:
                times[name].append(taken)
    return times


@dataclass
class Spent:
    """Time and arguments of the calls of one function.

    Attributes:
        seconds: taken by all calls together.
        calls: the positional arguments of each call.
    """

    seconds: float = 0.0
    calls: list[tuple[Any, ...]] = field(default_factory=list)


@contextmanager
def spent_in(
    owner: Any, name: str, *, waits_for: Callable[..., object] | None = None
) -> Iterator[Spent]:
    """Inside, every call of `owner.name` is timed, until the arrays that it returns are there.

    Args:
        waits_for: gives, from the arguments of a call, the arrays that must be there before its
            time begins; None where there are none.
    """
    spent, own = Spent(), getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        if waits_for is not None:
            mx.eval(waits_for(*args, **kwargs))
        start = time.perf_counter()
        found = own(*args, **kwargs)
        if isinstance(found, mx.array):
            mx.eval(found)
        spent.seconds += time.perf_counter() - start
        spent.calls.append(args)
        return found

    with replaced(owner, name, timed):
        yield spent


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that MLX holds during a call, those included that it held before."""
    mx.clear_cache()
    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory()


def milliseconds(seconds: float) -> str:
    """Seconds as a number of milliseconds, of four digits below 10 s."""
    return f"{seconds * 1e3:.4g}" if seconds < 10 else f"{seconds * 1e3:.0f}"

"""How long prompts take to encode."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlx_diffgemma.bench.counting import Weights, prefill_cost
from mlx_diffgemma.bench.device import Device
from mlx_diffgemma.bench.random_model import weight_bytes
from mlx_diffgemma.bench.steps import encoded
from mlx_diffgemma.bench.timing import median_seconds, peak_bytes
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma


@dataclass(frozen=True)
class PrefillReport:
    """How long prompts of one length took to encode.

    Attributes:
        length: tokens of each prompt.
        seconds: median for all sequences together.
        tokens_per_second: tokens of all sequences per second.
        floor_seconds: seconds that the operations and bytes take at the device's peaks.
        beyond_weights: most bytes held beside the weights, the prefixes included.
    """

    length: int
    seconds: float
    tokens_per_second: float
    floor_seconds: float
    beyond_weights: int


def measure_prefill(
    model: DiffusionGemma,
    lengths: Iterable[int],
    weights: Weights,
    device: Device,
    *,
    batch: int = 1,
    repeats: int = 3,
    seed: int = 0,
) -> tuple[PrefillReport, ...]:
    """Encode random prompts of several lengths, `batch` of them one after the other."""
    reports = []
    for length in lengths:
        # The first run warms up, and its memory is measured.
        peak = peak_bytes(lambda n=length: encoded(model, n, batch, seed))  # type: ignore[misc]
        seconds = median_seconds(
            lambda n=length: encoded(model, n, batch, seed),  # type: ignore[misc]
            repeats,
            warmup=0,
        )
        floor = device.floor(prefill_cost(weights, length, model.prefill_step_size, batch))
        reports.append(
            PrefillReport(
                length, seconds, batch * length / seconds, floor, peak - weight_bytes(model)
            )
        )
    return tuple(reports)

"""What running a model will need, and whether this machine has it.

Sizes in bytes; 1 GB is 1e9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_diffgemma.config import TextConfig
from mlx_diffgemma.errors import MemoryShortageError

_LOGIT_COPIES = 5  # float32 copies of a canvas's logits alive at once in a denoising step


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a generation holds at its peak."""

    weights: int
    prefix: int
    step: int

    @property
    def total(self) -> int:
        return self.weights + self.prefix + self.step


def estimate(
    config: TextConfig,
    weights: int,
    *,
    canvas_length: int,
    positions: int = 0,
    batch: int = 1,
    activation_bytes: int = 2,
) -> MemoryEstimate:
    """Memory for `weights` bytes of weights, a prefix of `positions` tokens for each of `batch`
    sequences, and one denoising step."""
    prefix = 0
    for layer in config.attention:
        kept = min(positions, config.sliding_window - 1) if layer.is_sliding else positions
        entry = 2 * layer.num_kv_heads * layer.head_dim * activation_bytes
        prefix += batch * (kept + canvas_length) * entry
    step = batch * canvas_length * config.vocab_size * 4 * _LOGIT_COPIES
    return MemoryEstimate(weights, prefix, step)


def available_memory() -> int | None:
    """Bytes that a model may take on this machine: on a Mac what the GPU may hold, elsewhere what
    is free. None where the system does not say."""
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "free_memory"):
        if info.get(key):
            return int(info[key])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def require(needed: MemoryEstimate, name: str, available: int | None) -> None:
    """Stop before a load that cannot end well.

    Raises:
        MemoryShortageError: with the numbers, and what to do.
    """
    if available is None or needed.total <= available:
        return
    raise MemoryShortageError(
        f"{name} needs about {_gb(needed.total)} (weights {_gb(needed.weights)}, prefix "
        f"{_gb(needed.prefix)}, denoising step {_gb(needed.step)}) and this machine offers "
        f"{_gb(available)}; choose weights in fewer bits or a shorter prompt."
    )


def wire_model() -> None:
    """Let Metal keep the weights resident, as mlx-lm does; nothing elsewhere."""
    if mx.metal.is_available():
        recommended = mx.device_info().get("max_recommended_working_set_size")
        if recommended:
            mx.set_wired_limit(int(recommended))


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"

"""Forms for a CPU alone: of layers, of the pass over the vocabulary and of what training
differentiates. A model that is loaded for a CPU gets them from `use`; no model, kernel or loop asks
whether it runs on one."""

import mlx.core as mx

from mlx_diffgemma.cpu.forms import use

__all__ = ["is_device", "use"]


def is_device() -> bool:
    """Whether MLX computes on a CPU by default."""
    return mx.default_device().type == mx.DeviceType.cpu

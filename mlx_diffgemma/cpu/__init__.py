"""Forms for a CPU alone: of layers, of the pass over the vocabulary and of what training
differentiates. A model that is loaded for a CPU gets them from `use`; no model, kernel or loop asks
whether it runs on one."""

import mlx.core as mx
import mlx.nn as nn

__all__ = ["is_device", "use"]


def use(model: nn.Module) -> None:
    """Give `model` and all that is in it the forms for a CPU, weights unchanged."""
    # What asks for the device alone, as a conversion does, need not read all layers of mlx-lm.
    from mlx_diffgemma.cpu.forms import use_forms

    use_forms(model)


def is_device() -> bool:
    """Whether MLX computes on a CPU by default."""
    return mx.default_device().type == mx.DeviceType.cpu

"""The activation of gated MLPs."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_diffgemma.kernels import differentiable
from mlx_diffgemma.kernels.dispatch import training_on_cpu


def gated_gelu(gate: mx.array, up: mx.array) -> mx.array:
    """GELU(gate) · up, with the tanh approximation."""
    if training_on_cpu():
        return differentiable.gated_gelu(gate, up)
    return nn.gelu_approx(gate) * up

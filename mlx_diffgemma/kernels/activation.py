"""The activation of gated MLPs, and the softcap of the head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn


@partial(mx.compile, shapeless=True)
def gated_gelu(gate: mx.array, up: mx.array) -> mx.array:
    """GELU(gate) · up, with the tanh approximation; all three have one shape, which may be any."""
    return nn.gelu_approx(gate) * up


def softcap(
    raw: mx.array,
    cap: float,
    scale: float | mx.array | None = None,
    tanh: Callable[[mx.array], mx.array] = mx.tanh,
) -> mx.array:
    """Products with the head as logits in float32, tanh(raw / cap) · cap.

    `raw` and the result have one shape, which may be any. `scale` takes the place of the last
    factor: cap / temperature gives the logits after the temperature. `tanh` is the function to
    compute with.
    """
    return tanh(raw.astype(mx.float32) / cap) * (cap if scale is None else scale)

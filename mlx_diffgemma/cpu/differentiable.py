"""Forms with a gradient that are fast on a CPU, for training there.

MLX's CPU back end calls scalar exp, tanh and pow for each element. The functions here compute with
the polynomials of `elementwise`, and their gradients are spelled out, for MLX cannot trace one
through the bits of a float.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_diffgemma.cpu import elementwise

# By MLX's type stub, a function that it makes returns `object`.
custom_function: Any = mx.custom_function

_ROOT = 0.7978845608028654  # √(2/π)
_CUBE = 0.044715


@custom_function
def tanh(x: mx.array) -> mx.array:
    """Hyperbolic tangent of float32 x."""
    return elementwise.tanh(x)


@tanh.vjp
def _tanh_vjp(x: mx.array, gradient: mx.array, y: mx.array) -> mx.array:
    return gradient * (1.0 - y * y)


@custom_function
def gated_gelu(gate: mx.array, up: mx.array) -> mx.array:
    """GELU(gate) · up, with the tanh approximation."""
    return 0.5 * gate * (1.0 + _gelu_tanh(gate)) * up


@gated_gelu.vjp
def _gated_gelu_vjp(
    primals: tuple[mx.array, mx.array], gradient: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    gate, up = primals
    t = _gelu_tanh(gate)
    cumulative = 0.5 * (1.0 + t)
    slope = 0.5 * gate * (1.0 - t * t) * (_ROOT + (3 * _CUBE * _ROOT) * (gate * gate))
    return gradient * up * (cumulative + slope), gradient * gate * cumulative


def _gelu_tanh(gate: mx.array) -> mx.array:
    return elementwise.tanh(gate * (_ROOT + (_CUBE * _ROOT) * (gate * gate)))


@custom_function
def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis of float32 x."""
    shares = elementwise.exp_nonpositive(x - x.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


@softmax.vjp
def _softmax_vjp(x: mx.array, gradient: mx.array, y: mx.array) -> mx.array:
    pull = gradient * y
    return pull - y * pull.sum(axis=-1, keepdims=True)

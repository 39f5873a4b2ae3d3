"""exp and tanh over whole tiles.

MLX's CPU back end calls scalar exp and tanh for each element (14 to 18 ns), but vectorizes sums and
products (0.2 ns). So both are computed from a polynomial here, which saves 1.0 s over a canvas of
256 and a vocabulary of 262,144.
"""

from __future__ import annotations

import mlx.core as mx

# 2^r = 1 + r · (...) for |r| ≤ 1/2, fitted to the least largest relative error, 2e-9.
_POWER_OF_TWO = (
    0.6931471824645996,
    0.24022647738456726,
    0.055503323674201965,
    0.00961843691766262,
    0.0013398875016719103,
    0.00015353361959569156,
)
_LOG2_E = 1.4426950408889634
_ROUNDER = 1.5 * 2**23  # adding it leaves no bits for a fraction: float32 is rounded to an integer
_BITS_OF_ONE = 0x3F800000
_SATURATED = 13.0  # an |x| large enough that tanh is ±1 in float32


def exp_nonpositive(x: mx.array) -> mx.array:
    """Exponential of float32 x ≤ 0; exactly 0 below −88.03."""
    # At −127 the bits that are put together below are those of 0.
    power, integer = _power_of_two(mx.maximum(x * _LOG2_E, -127.0))
    return ((power + 1.0).view(mx.int32) + integer).view(mx.float32)


def tanh(x: mx.array) -> mx.array:
    """Hyperbolic tangent of float32 x."""
    # tanh x = m / (m + 2) with m = e^2x − 1: of a small m the polynomial cancels no digits.
    power, integer = _power_of_two(mx.clip(x, -_SATURATED, _SATURATED) * (2 * _LOG2_E))
    scale = (integer + _BITS_OF_ONE).view(mx.float32)
    m = power * scale + (scale - 1.0)
    return m / (m + 2.0)


def _power_of_two(x: mx.array) -> tuple[mx.array, mx.array]:
    """−127 ≤ x < 127 as an integer n and a rest r: (2^r − 1, n in the exponent bits of a float)."""
    rounded = x + _ROUNDER
    rest = x - (rounded - _ROUNDER)
    power = mx.array(_POWER_OF_TWO[-1], mx.float32)
    for coefficient in reversed(_POWER_OF_TWO[:-1]):
        power = power * rest + coefficient
    return power * rest, rounded.view(mx.int32) << 23

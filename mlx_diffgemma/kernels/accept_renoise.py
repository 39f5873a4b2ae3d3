"""The entropy-bound sampler's decision which positions take the draw; the others get noise.

Letters: R rows, C canvas.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_diffgemma.kernels.dispatch import Implementation, Launcher, MetalKernel, launcher_for


def accept_renoise(
    entropy: mx.array,
    draw: mx.array,
    noise: mx.array,
    bound: float,
    *,
    implementation: Implementation | Launcher = "auto",
) -> tuple[mx.array, mx.array]:
    """Entropies [R, C] in nats, draws and noise [R, C] -> the next canvas [R, C] int32, and which
    of its positions hold a draw.

    A position is accepted while the entropies of those before it, in ascending order, sum to at
    most `bound`; of equals the first comes first. From https://arxiv.org/abs/2505.24857.
    """
    launch = launcher_for(implementation)
    if launch is None:
        return _in_mlx(entropy, draw, noise, bound)
    rows, canvas = entropy.shape
    threads = min(256, -(-canvas // 32) * 32)
    next_canvas, accepted = launch(
        KERNEL,
        inputs=[
            entropy.astype(mx.float32),
            draw.astype(mx.int32),
            noise.astype(mx.int32),
            mx.array(bound, mx.float32),
        ],
        template=[],
        grid=(-(-canvas // threads) * threads, rows, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[entropy.shape, entropy.shape],
        output_dtypes=[mx.int32, mx.bool_],
    )
    return next_canvas, accepted


# Each thread computes one position. No sort is needed: the entropies before one are those below it.
KERNEL = MetalKernel(
    "accept_renoise",
    inputs=("entropy", "draw", "noise", "bound"),
    outputs=("canvas", "accepted"),
    source="""
    const uint length = entropy_shape[1];
    const uint own = thread_position_in_grid.x;
    const uint row = thread_position_in_grid.y * length;
    if (own < length) {
      const float mine = entropy[row + own];
      float before = 0;
      for (uint i = 0; i < length; i++) {
        const float other = entropy[row + i];
        if (other < mine || (other == mine && i < own)) before += other;
      }
      // An entropy that is not a number is never accepted.
      const bool accept = before <= bound && mine == mine;
      accepted[row + own] = accept;
      canvas[row + own] = accept ? draw[row + own] : noise[row + own];
    }
    """,
)


def _in_mlx(
    entropy: mx.array, draw: mx.array, noise: mx.array, bound: float
) -> tuple[mx.array, mx.array]:
    accepted = entropy_bound_accept(entropy.astype(mx.float32), bound)
    return mx.where(accepted, draw, noise).astype(mx.int32), accepted


def entropy_bound_accept(entropy: mx.array, bound: float) -> mx.array:
    """Which positions `accept_renoise` accepts: entropies [R, C] in nats -> booleans [R, C]."""
    order = mx.argsort(entropy, axis=-1)
    ascending = mx.take_along_axis(entropy, order, axis=-1)
    accepted = mx.cumsum(ascending, axis=-1) - ascending <= bound
    return mx.take_along_axis(accepted, mx.argsort(order, axis=-1), axis=-1)

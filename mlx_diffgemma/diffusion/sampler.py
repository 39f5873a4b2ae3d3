"""Which positions of a canvas take the model's draw, and what the others get.

Pure arithmetic on a batch of canvases. Letters: R rows, C canvas.
"""

from __future__ import annotations

import mlx.core as mx


def entropy_bound_accept(entropy: mx.array, bound: float) -> mx.array:
    """Accept the most certain positions, as many as are nearly independent: [R, C] nats -> [R, C].

    Sorted by entropy, a position is accepted while the entropies before it sum to at most `bound`;
    the most certain one always is. From https://arxiv.org/abs/2505.24857, as the reference's
    `EntropyBoundSampler.accept_canvas`.
    """
    order = mx.argsort(entropy, axis=-1)
    ascending = mx.take_along_axis(entropy, order, axis=-1)
    accepted = mx.cumsum(ascending, axis=-1) - ascending <= bound
    return mx.take_along_axis(accepted, mx.argsort(order, axis=-1), axis=-1)


def renoise(draw: mx.array, accepted: mx.array, noise: mx.array) -> mx.array:
    """The next canvas [R, C]: the draw where it was accepted, fresh noise everywhere else."""
    return mx.where(accepted, draw, noise)

"""The outputs of the experts, sorted by expert, as one vector a token.

Letters: N tokens, K experts per token, P = N · K pairs, D hidden.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_diffgemma.kernels.dispatch import Implementation, Launcher, MetalKernel, launcher_for


def expert_combine(
    outputs: mx.array,
    places: mx.array | None,
    weights: mx.array,
    *,
    implementation: Implementation | Launcher = "auto",
) -> mx.array:
    """Outputs of the pairs [P, D], the place of each pair among them [P], and the weights [N, K] of
    the experts of each token -> Σ weight · output [N, D], in the type of `outputs`.

    `places` undoes the sort: it is `argsort(order)` for pairs sorted by `order`; None if they were
    not sorted. The sum is in float32.
    """
    launch = launcher_for(implementation)
    if launch is None:
        return _in_mlx(outputs, places, weights)
    pairs, width = outputs.shape
    count, top_k = weights.shape
    if places is None:
        places = mx.arange(pairs)
    threads = 256
    return launch(
        KERNEL,
        inputs=[outputs, places.astype(mx.int32), weights.astype(mx.float32)],
        template=[("T", outputs.dtype), ("TOP_K", top_k)],
        grid=(-(-width // threads) * threads, count, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(count, width)],
        output_dtypes=[outputs.dtype],
    )[0]


# Each thread sums one column of one token; neighbouring threads read neighbouring columns.
KERNEL = MetalKernel(
    "expert_combine",
    inputs=("outputs", "places", "weights"),
    outputs=("combined",),
    source="""
    const uint width = outputs_shape[1];
    const uint column = thread_position_in_grid.x;
    const uint token = thread_position_in_grid.y;
    if (column < width) {
      float sum = 0;
      for (uint k = 0; k < TOP_K; k++) {
        const uint pair = token * TOP_K + k;
        sum += weights[pair] * float(outputs[size_t(places[pair]) * width + column]);
      }
      combined[size_t(token) * width + column] = static_cast<T>(sum);
    }
    """,
)


def _in_mlx(outputs: mx.array, places: mx.array | None, weights: mx.array) -> mx.array:
    if places is not None:
        outputs = outputs[places]
    pairs = outputs.reshape(*weights.shape, -1)
    return (pairs * weights.astype(mx.float32)[..., None]).sum(axis=1).astype(outputs.dtype)

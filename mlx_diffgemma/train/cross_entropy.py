"""Cross-entropy over a large vocabulary, a block of rows at a time.

The logits of a long sequence take more memory than all the rest of a step. So the logits of each
block are computed twice, for the loss and for its gradient, and each block waits for the one before
it. Letters: B examples, S sequence positions, N rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

BLOCK = 1 << 24
"""Most logits of a block: 64 rows of the release's vocabulary, 67 MB in float32."""

_Loss = Callable[..., mx.array]


def cross_entropy(model: DiffusionGemma, hidden: mx.array, targets: mx.array) -> mx.array:
    """Cross-entropy [B, S], in nats, of the token ids `targets` [B, S] under the logits of the
    states `hidden` [B, S, D]."""
    rows = max(1, BLOCK // model.config.text.vocab_size)
    if targets.size <= rows:
        return nn.losses.cross_entropy(model.logits(hidden), targets)
    table = model.model.decoder.embed_tokens
    weight = table.trainable_parameters().get("weight")

    def loss(x: mx.array, ids: mx.array, weight: mx.array) -> mx.array:
        if trained:
            table.weight = weight
        return nn.losses.cross_entropy(model.logits(x), ids)

    trained = weight is not None
    blocks = _in_blocks(loss, rows, trained)
    nats = blocks(
        hidden.reshape(-1, hidden.shape[-1]),
        mx.stop_gradient(targets.flatten()),
        weight if trained else mx.zeros(()),
    )
    if trained:
        table.weight = weight
    return nats.reshape(targets.shape)


def _in_blocks(loss: _Loss, rows: int, trained: bool) -> Any:
    """A function that computes `loss` [N] of hidden states [N, D], targets [N] and the head's
    weight, `rows` rows at a time. The weight gets a gradient only where it is `trained`."""

    def forward(hidden: mx.array, targets: mx.array, weight: mx.array) -> mx.array:
        nats: list[mx.array] = []
        for start in range(0, targets.size, rows):
            x = _after(hidden[start : start + rows], nats[-1:])
            nats.append(loss(x, ids=targets[start : start + rows], weight=weight))
        return mx.concatenate(nats)

    def backward(
        primals: tuple[mx.array, mx.array, mx.array], gradient: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        hidden, targets, weight = primals
        targets = mx.stop_gradient(targets)
        pulls: list[mx.array] = []
        on_weight = mx.zeros_like(weight)
        for start in range(0, targets.size, rows):
            along = [gradient[start : start + rows]]
            of_block = partial(loss, ids=targets[start : start + rows])
            earlier = [*pulls[-1:], *([on_weight] if trained else [])]
            x = _after(hidden[start : start + rows], earlier)
            if trained:
                pull, more = mx.vjp(lambda x, w, f=of_block: f(x, weight=w), [x, weight], along)[1]
                on_weight = on_weight + more
            else:
                (pull,) = mx.vjp(partial(of_block, weight=weight), [x], along)[1]
            pulls.append(pull)
        return mx.concatenate(pulls), mx.zeros_like(targets), on_weight

    custom: Any = mx.custom_function
    function = custom(forward)
    function.vjp(backward)
    return function


def _after(x: mx.array, earlier: list[mx.array]) -> mx.array:
    """`x`, made to wait for `earlier`, since MLX would otherwise begin all blocks at once."""
    if not earlier:
        return x
    (later,) = mx.depends([x], earlier)
    return later

"""Gradient checkpointing (https://arxiv.org/abs/1604.06174): keep what goes into a layer, and
compute the rest again for the gradient.

`mx.checkpoint` does so too, but lets the second pass over a layer begin as soon as the first one is
done, and MLX, which goes breadth first, then holds several layers at once. Here the second pass
waits for the gradient that comes from the layer above.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten


def recomputed(layer: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` for this layer: `recomputed(layer, run)(*arguments)` is `run(layer, *arguments)`.

    Gradients go to the layer's trainable parameters and to every argument that is an array of
    floats.
    """

    def call(*arguments: Any) -> Any:
        parameters = tree_flatten(layer.trainable_parameters())
        names = [name for name, _ in parameters]
        places = [n for n, argument in enumerate(arguments) if _is_traced(argument)]

        def pure(*values: mx.array) -> Any:
            given = list(arguments)
            for place, value in zip(places, values[len(names) :], strict=True):
                given[place] = value
            layer.update(tree_unflatten(list(zip(names, values, strict=False))))
            return run(layer, *given)

        def backward(primals: Any, gradients: Any, _: Any) -> Any:
            above = list(gradients) if isinstance(gradients, (list, tuple)) else [gradients]
            inputs = mx.depends(list(primals), above)
            return tuple(mx.vjp(pure, inputs, above)[1])

        function: Any = mx.custom_function(pure)
        function.vjp(backward)
        return function(*(value for _, value in parameters), *(arguments[n] for n in places))

    return call


def _is_traced(argument: Any) -> bool:
    return isinstance(argument, mx.array) and mx.issubdtype(argument.dtype, mx.floating)

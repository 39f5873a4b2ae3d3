"""Muon for a whole model: Muon updates the matrices, and Adam all else.

`mlx.optimizers.Muon` takes a stack of experts for one flat matrix, and norms and the embedding need
another optimizer. Letters: E experts, O output, I input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
from mlx.utils import tree_map, tree_map_with_path

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # as published with Muon


class Muon(optimizers.Optimizer):
    """Steps by orthogonalized momentum, of every matrix [O, I] and every one of a stack [E, O, I],
    as in https://kellerjordan.github.io/posts/muon.

    The embedding, which is looked up and not multiplied, and vectors go by Adam, for which the
    learning rate is `others` times that of the matrices. Weight decay is decoupled and spares
    vectors.

    Args:
        learning_rate: rate of the matrices, whose updates have singular values of about this size
            (times √(O / I), where that is above 1).
        momentum, nesterov, ns_steps: as in `mlx.optimizers.Muon`.
        betas, eps: settings of Adam.
    """

    def __init__(
        self,
        learning_rate: float | Callable[[mx.array], mx.array],
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        nesterov: bool = True,
        ns_steps: int = 5,
        others: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.momentum, self.nesterov, self.ns_steps = momentum, nesterov, ns_steps
        self.weight_decay, self.others = weight_decay, others
        self.betas, self.eps = betas, eps

    def init(self, parameters: dict[str, Any]) -> None:
        super().init(parameters)
        by_adam = tree_map_with_path(
            lambda path, array: array.ndim < 2 or "embed" in path, parameters
        )

        # That a state has a second moment is what says that Adam is to be used.
        def add_second_moment(parameter: mx.array, adam: bool, state: dict[str, mx.array]) -> None:
            if adam and "v" not in state:
                state["v"] = mx.zeros_like(parameter)

        tree_map(add_second_moment, parameters, by_adam, self._state)

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        state["m"] = mx.zeros_like(parameter)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> mx.array:
        rate = self.learning_rate.astype(gradient.dtype)
        if "v" in state:
            rate = rate * self.others
            update = self._adam(gradient, state)
        else:
            update = self._muon(gradient, state)
        if parameter.ndim >= 2 and self.weight_decay:
            parameter = parameter * (1 - rate * self.weight_decay)
        return parameter - rate * update

    def _muon(self, gradient: mx.array, state: dict[str, mx.array]) -> mx.array:
        share = 1 - self.momentum
        state["m"] = self.momentum * state["m"] + share * gradient
        update = state["m"]
        if self.nesterov:
            update = self.momentum * update + share * gradient
        outputs, inputs = gradient.shape[-2:]
        return orthogonalize(update, self.ns_steps) * max(1.0, outputs / inputs) ** 0.5

    def _adam(self, gradient: mx.array, state: dict[str, mx.array]) -> mx.array:
        first, second = self.betas
        state["m"] = first * state["m"] + (1 - first) * gradient
        state["v"] = second * state["v"] + (1 - second) * gradient * gradient
        step = self.step.astype(gradient.dtype)
        mean = state["m"] / (1 - first**step)
        variance = state["v"] / (1 - second**step)
        return mean / (mx.sqrt(variance) + self.eps)


def orthogonalize(matrices: mx.array, steps: int) -> mx.array:
    """Matrices [..., O, I] with their singular values brought near 1, by `steps` of Newton and
    Schulz's iteration."""
    a, b, c = _NEWTON_SCHULZ
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.swapaxes(-1, -2) if is_tall else matrices
    x = x / (mx.linalg.norm(x, axis=[-2, -1], keepdims=True) + 1e-7)
    for _ in range(steps):
        squared = x @ x.swapaxes(-1, -2)
        x = a * x + (b * squared + c * (squared @ squared)) @ x
    return x.swapaxes(-1, -2) if is_tall else x

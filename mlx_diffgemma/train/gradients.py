"""Losses and gradients of the batches of a step, and the optimizer's step on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from math import cos, pi
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_map

from mlx_diffgemma import cpu
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.train import processes
from mlx_diffgemma.train.config import TrainConfig
from mlx_diffgemma.train.examples import Batch
from mlx_diffgemma.train.muon import Muon
from mlx_diffgemma.train.objective import loss

Tree = dict[str, Any]
Losses = tuple[mx.array, mx.array, mx.array]

_CLASSES = {
    "adam": optimizers.Adam,
    "adamw": optimizers.AdamW,
    "muon": Muon,
    "sgd": optimizers.SGD,
    "adafactor": optimizers.Adafactor,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": {"bias_correction": True},
    "adamw": {"bias_correction": True},
    "adafactor": {"relative_step": False, "scale_parameter": False},
}
_DROPOUT = 3  # purpose of a seed, besides the purposes in `batches`
_ARRAYS = [field.name for field in fields(Batch) if field.type == "mx.array"]


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, counted from 1. It rises linearly over `warmup` steps, stays at
    its peak, and falls as the schedule says over the share `decay` of the steps that are left."""
    if step <= config.warmup:
        return config.learning_rate * step / config.warmup
    if config.lr_schedule == "constant":
        return config.learning_rate
    falling = config.decay * (config.iters - config.warmup)
    done = max(0.0, (step - 1 - config.iters + falling) / max(1.0, falling))
    left = (1 + cos(pi * min(1.0, done))) / 2 if config.lr_schedule == "cosine" else 1 - done
    floor = config.final_learning_rate
    return config.learning_rate * (floor + (1 - floor) * max(0.0, left))


def make_optimizer(config: TrainConfig) -> optimizers.Optimizer:
    """The optimizer with its settings; its learning rate is set anew at each step.

    Raises:
        UsageError: `optimizer_config` has a setting that the optimizer does not know.
    """
    settings = {**_DEFAULTS.get(config.optimizer, {}), **config.optimizer_config}
    try:
        return _CLASSES[config.optimizer](learning_rate=config.learning_rate, **settings)
    except TypeError as error:
        raise UsageError(f"optimizer_config of {config.optimizer}: {error}.") from None


@dataclass(frozen=True)
class StepResult:
    """What a step computed; no array is evaluated yet.

    Attributes:
        losses: means over the step's batches, in nats a token: the objective, the canvas loss and
            the encoder loss.
        grad_norm: norm of all gradients together, before clipping.
    """

    parameters: Tree
    optimizer_state: Tree
    losses: Losses
    grad_norm: mx.array


class Stepper:
    """Runs the steps of one model and one optimizer.

    Where several processes train together, each computes its share of the batches of a step.

    Raises:
        UsageError: `optimizer_config` has a setting that the optimizer does not know.
    """

    def __init__(self, model: DiffusionGemma, config: TrainConfig) -> None:
        self._model, self._config = model, config
        self._optimizer = make_optimizer(config)
        given = config.compile
        self._is_compiled = not cpu.is_device() if given is None else given
        self._gradients = lru_cache(maxsize=None)(self._make_gradients)
        self._update = mx.compile(self._updated) if self._is_compiled else self._updated

    def fresh_state(self, parameters: Tree) -> Tree:
        """The optimizer's state before the first step."""
        self._optimizer = make_optimizer(self._config)
        self._optimizer.init(parameters)
        return self._optimizer.state

    def step(
        self, number: int, parameters: Tree, state: Tree, batches: Sequence[Batch]
    ) -> StepResult:
        """Compute the step `number`, counted from 1, on all its batches."""
        results = []
        for place in range(processes.place(), len(batches), processes.count()):
            batch = batches[place]
            gradients = self._gradients(batch.conditioned, batch.columns)
            if self._config.lora_parameters.dropout:
                mx.random.seed(_seed(self._config.seed, number, place))
            results.append(gradients(parameters, *(getattr(batch, name) for name in _ARRAYS)))
        if processes.count() > 1:
            results = [nn.average_gradients(_mean(results))]
        rate = mx.array(learning_rate(self._config, number), mx.float32)
        state = {**state, "learning_rate": rate}  # the other entries are replaced one by one
        return StepResult(*self._update(parameters, state, results))

    def _make_gradients(self, conditioned: int, columns: int) -> Callable[..., Any]:
        model, config = self._model, self._config

        def value(parameters: Tree, batch: Batch) -> Losses:
            model.update(parameters)
            return loss(
                model,
                batch,
                encoder_weight=config.encoder_loss_weight,
                checkpoint=config.grad_checkpoint,
            )

        differentiate = mx.value_and_grad(value)

        def gradients(parameters: Tree, *arrays: mx.array) -> tuple[Losses, Tree]:
            named: dict[str, Any] = dict(zip(_ARRAYS, arrays, strict=True))
            batch = Batch(**named, conditioned=conditioned, columns=columns)
            return differentiate(parameters, batch)

        if not self._is_compiled:
            return gradients
        random = [mx.random.state]  # dropout draws from it
        return mx.compile(gradients, inputs=random, outputs=random)

    def _updated(
        self, parameters: Tree, state: Tree, results: Sequence[tuple[Losses, Tree]]
    ) -> tuple[Tree, Tree, Losses, mx.array]:
        losses, gradients = _mean(results)
        limit = self._config.clip_norm
        gradients, norm = optimizers.clip_grad_norm(
            gradients, float("inf") if limit is None else limit
        )
        self._optimizer.state = state
        updated = self._optimizer.apply_gradients(gradients, parameters)
        return updated, self._optimizer.state, losses, norm


def _mean(results: Sequence[tuple[Losses, Tree]]) -> tuple[Losses, Tree]:
    share = 1 / len(results)

    def mean(*values: mx.array) -> mx.array:
        return sum(values[1:], values[0]) * share if len(values) > 1 else values[0]

    return tree_map(mean, *results)


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence([*numbers, _DROPOUT]).generate_state(1)[0])

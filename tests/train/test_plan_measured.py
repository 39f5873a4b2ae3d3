"""The memory that a plan counts is about what a step takes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma import load_model
from mlx_diffgemma.train import training_memory
from mlx_diffgemma.train.adapt import prepare
from mlx_diffgemma.train.batches import Batches
from mlx_diffgemma.train.config import TrainConfig
from mlx_diffgemma.train.examples import Example
from mlx_diffgemma.train.gradients import Stepper
from mlx_diffgemma.train.loop import sizes_of

LENGTH = 800


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_step_takes_what_was_counted(checkpoint):
    model, _ = load_model("demo")
    config = TrainConfig(batch_size=2, grad_checkpoint=checkpoint)
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    counted = training_memory.estimate(
        model.config, weights, config, length=LENGTH, activation_bytes=4
    )
    prepare(model, config)
    rng = np.random.default_rng(0)
    examples = [Example(tuple(rng.integers(7, 100, LENGTH).tolist()), 100) for _ in range(16)]
    batches = Batches(examples, config, sizes_of(model))
    stepper = Stepper(model, config)
    parameters = model.trainable_parameters()
    state = stepper.fresh_state(parameters)
    mx.eval(parameters, state)
    mx.clear_cache()
    before = mx.get_active_memory() - weights
    mx.reset_peak_memory()
    result = stepper.step(1, parameters, state, [batches[0]])
    mx.eval(result.parameters, result.optimizer_state, result.losses)
    measured = mx.get_peak_memory() - max(0, before)
    # MLX runs ahead of a busy CPU, by a hundred operations at most, whose results wait.
    assert 0.6 < counted.total / measured < 1.6

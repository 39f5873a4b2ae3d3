"""Batches for random tiny models, and gradients by name."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tiny_models import make_config

from mlx_diffgemma import cpu
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.train.examples import Batch, Example
from mlx_diffgemma.train.objective import loss


def random_batch(
    model: DiffusionGemma,
    prefixes: tuple[int, ...] = (3, 11, 25),
    conditioned: int = 0,
    seed: int = 0,
    tail: int = 4,
) -> Batch:
    """A batch of random ids; the sequences go `tail` positions and more beyond their prefixes."""
    rng = np.random.default_rng(seed)
    vocab, canvas = model.config.text.vocab_size, model.config.canvas_length
    batch, length = len(prefixes), max(prefixes) + tail
    counted = np.zeros((batch, length - 1), bool)
    for row, prefix in enumerate(prefixes):
        counted[row, prefix - 1 : prefix + tail - 1] = True
    return Batch(
        sequence=mx.array(rng.integers(7, vocab, (batch, length)), mx.int32),
        prefix=mx.array(prefixes, mx.int32),
        canvas=mx.array(rng.integers(7, vocab, (batch, canvas)), mx.int32),
        corrupted=mx.array(rng.integers(7, vocab, (batch, canvas)), mx.int32),
        noise=mx.full((batch,), 0.5),
        counted=mx.array(counted),
        conditioned=conditioned,
    )


def gradients(model: DiffusionGemma, batch: Batch, **options) -> tuple[list[float], dict]:
    """The three losses, and the gradient of the first by the name of the parameter."""

    def value(parameters):
        model.update(parameters)
        return loss(model, batch, **options)

    parameters = model.trainable_parameters()
    losses, tree = mx.value_and_grad(value)(parameters)
    model.update(parameters)
    named = {name: np.array(gradient) for name, gradient in tree_flatten(tree)}
    return [one.item() for one in losses], named


def furthest(ours: dict, theirs: dict) -> tuple[float, str]:
    """The largest difference of any gradient, by the largest entry of that gradient, and whose.

    Gradients below 1e-5 of the largest are rounding: a norm follows the last layer, so the
    gradient of its scalar is 0.
    """
    assert ours.keys() == theirs.keys()
    size = {name: np.abs(gradient).max() for name, gradient in theirs.items()}
    least = 1e-5 * max(size.values())
    apart = {
        name: np.abs(ours[name] - theirs[name]).max() / (size[name] if size[name] > least else 1.0)
        for name in theirs
    }
    worst = max(apart, key=lambda name: apart[name])
    return float(apart[worst]), worst


def copy_task(number: int, length: int = 4) -> Example:
    """Say the prompt again: bos, `length` of the ids 7 to 14, a mark, the same ids, eos."""
    digits = np.random.default_rng([number, 8]).integers(7, 15, length).tolist()
    return Example((2, *digits, 6, *digits, 1), length + 2)


def small_model(seed: int = 0) -> DiffusionGemma:
    """Two layers with random weights as training from nothing starts from, for `copy_task`."""
    raw = make_config(
        0,
        hidden_size=64,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_experts=4,
        top_k_experts=2,
        vocab_size=64,
        head_dim=16,
        global_head_dim=16,
        num_key_value_heads=2,
        num_global_key_value_heads=2,
        intermediate_size=96,
        moe_intermediate_size=32,
        sliding_window=32,
    )
    mx.random.seed(seed)
    model = DiffusionGemma(ModelConfig.from_dict({**raw, "canvas_length": 8}))
    cpu.use(model)
    mx.eval(model.parameters())
    return model


def copies(first: int, count: int) -> list[Example]:
    """A stream of `copy_task`."""
    return [copy_task(number) for number in range(first, first + count)]

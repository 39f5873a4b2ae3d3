"""The forms for training on a CPU compute what the model does, and have its gradients."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from training import furthest, gradients, random_batch

from mlx_diffgemma import cpu
from mlx_diffgemma.cpu import differentiable
from mlx_diffgemma.cpu.expert_blocks import lay_out, mix_experts
from mlx_diffgemma.cpu.vocabulary import tiled_pass
from mlx_diffgemma.kernels.materialized import whole_pass
from mlx_diffgemma.kernels.vocabulary import vocabulary_pass
from mlx_diffgemma.train.objective import loss


@pytest.mark.parametrize("conditioned", [0, 2, 3])
@pytest.mark.parametrize("seed", [1, 6])
def test_loss_and_gradients_are_those_of_the_plain_forms(tiny_model, seed, conditioned):
    model = tiny_model(seed)
    batch = random_batch(model, conditioned=conditioned, seed=seed)
    losses, expected = gradients(model, batch)
    cpu.use(model)
    fast_losses, fast = gradients(model, batch)
    np.testing.assert_allclose(fast_losses, losses, rtol=1e-5)
    assert furthest(fast, expected)[0] < 1e-3, furthest(fast, expected)
    assert any(np.abs(fast[n] - expected[n]).max() > 0 for n in fast)  # two ways, not one twice


def test_forms_are_taken_in_training_alone(tiny_model, monkeypatch):
    taken = []
    for name in ("tanh", "softmax", "gated_gelu"):
        form = getattr(differentiable, name)
        monkeypatch.setattr(
            differentiable, name, lambda *x, n=name, f=form: taken.append(n) or f(*x)
        )
    model = tiny_model(1)
    batch = random_batch(model, conditioned=2)
    for used, training, expected in (
        (False, True, set()),
        (True, False, set()),
        (True, True, {"tanh", "softmax", "gated_gelu"}),
    ):
        if used:
            cpu.use(model)
        model.train(training)
        mx.eval(loss(model, batch))
        assert set(taken) == expected


def test_a_model_gets_the_pass_over_the_vocabulary_for_a_cpu(tiny_model):
    model = tiny_model(1, vocab_size=9000)  # smaller ones are passed over whole
    assert model.vocabulary_pass is vocabulary_pass
    cpu.use(model)
    assert model.vocabulary_pass is tiled_pass
    model.vocabulary_pass = whole_pass
    cpu.use(model)
    assert model.vocabulary_pass is whole_pass


@pytest.mark.parametrize("rows", [1, 8, 128])
@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_experts_in_blocks(tokens, rows, monkeypatch):
    """Against one product an expert and token, with an expert that nobody chose."""
    experts, top_k, dim, width = 5, 2, 12, 6
    keys = iter(mx.random.split(mx.random.key(tokens), 6))
    x = mx.random.normal((tokens, dim), key=next(keys))
    gate_up = mx.random.normal((experts, 2 * width, dim), key=next(keys))
    down = mx.random.normal((experts, dim, width), key=next(keys))
    weights = mx.random.uniform(shape=(tokens, top_k), key=next(keys))
    scores = mx.random.normal((tokens, experts - 1), key=next(keys))
    chosen = mx.argsort(scores, axis=-1)[:, :top_k]
    pull = mx.random.normal((tokens, dim), key=next(keys))
    monkeypatch.setattr("mlx_diffgemma.cpu.expert_blocks._ROWS", rows)

    def in_blocks(x, weights, gate_up, down):
        return (mix_experts(x, chosen, weights, gate_up, down, _gated) * pull).sum()

    def one_by_one(x, weights, gate_up, down):
        gate, up = mx.split(mx.einsum("nd,nkid->nki", x, gate_up[chosen]), 2, axis=-1)
        out = mx.einsum("nki,nkdi->nkd", _gated(gate, up), down[chosen])
        return ((out * weights[..., None]).sum(axis=1) * pull).sum()

    arguments = (x, weights, gate_up, down)
    value, ours = mx.value_and_grad(in_blocks, argnums=(0, 1, 2, 3))(*arguments)
    expected, theirs = mx.value_and_grad(one_by_one, argnums=(0, 1, 2, 3))(*arguments)
    np.testing.assert_allclose(value.item(), expected.item(), rtol=1e-4)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.array(mine), np.array(other), rtol=1e-3, atol=1e-4)
    assert not ours[2][experts - 1].any().item()


def test_rows_of_blocks_hold_each_pair_once():
    chosen = mx.array([[0, 3], [3, 1], [3, 0], [1, 3]])
    layout = lay_out(chosen, experts=4, rows=3)
    place = np.array(layout.place).ravel()
    assert len(set(place.tolist())) == 8
    assert np.array(layout.filled).sum() == 8 and np.array(layout.filled)[place].all()
    assert np.array(layout.token)[place].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert np.array(layout.expert)[place // 3].tolist() == np.array(chosen).ravel().tolist()


def _gated(gate: mx.array, up: mx.array) -> mx.array:
    return nn.gelu_approx(gate) * up


@pytest.mark.parametrize(
    ("ours", "plain_form"),
    [
        (differentiable.tanh, mx.tanh),
        (differentiable.softmax, lambda x: mx.softmax(x, axis=-1)),
        (lambda x: differentiable.gated_gelu(x, 2 * x), lambda x: _gated(x, 2 * x)),
    ],
    ids=["tanh", "softmax", "gelu"],
)
def test_elementwise(ours, plain_form):
    x = mx.concatenate([mx.linspace(-20, 20, 801), mx.array([-1e30, 0.0, 60.0])]).reshape(12, 67)
    pull = mx.random.normal(x.shape, key=mx.random.key(0))
    if ours is not differentiable.softmax:
        x = mx.clip(x, -20, 20)
    for one, other in zip(
        mx.value_and_grad(lambda x: (ours(x) * pull).sum())(x),
        mx.value_and_grad(lambda x: (plain_form(x) * pull).sum())(x),
        strict=True,
    ):
        scale = mx.abs(other).max().item()
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-5, atol=1e-6 * scale)

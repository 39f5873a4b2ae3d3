"""Our Muon is MLX's on matrices, treats experts one by one, and leaves the rest to Adam."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
import pytest

from mlx_diffgemma.train.muon import Muon, orthogonalize


def gradients(shape: tuple[int, ...], count: int = 4) -> list[mx.array]:
    return [mx.random.normal(shape, key=mx.random.key(number)) for number in range(count)]


def run(optimizer, name: str, start: mx.array, grads: list[mx.array]) -> mx.array:
    parameters = {name: start}
    for gradient in grads:
        parameters = optimizer.apply_gradients({name: gradient}, parameters)
    return parameters[name]


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_matrix_moves_as_by_mlx_s_muon(shape, nesterov):
    start, grads = mx.ones(shape), gradients(shape)
    settings = {"weight_decay": 0.0, "nesterov": nesterov, "momentum": 0.8}
    ours = run(Muon(0.02, **settings), "weight", start, grads)
    theirs = run(optimizers.Muon(0.02, **settings), "weight", start, grads)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert float(mx.abs(ours - start).max()) > 1e-3


def test_every_expert_moves_as_if_it_were_alone():
    grads = gradients((3, 8, 12))
    stack = run(Muon(0.02), "experts.down_proj.weight", mx.ones((3, 8, 12)), grads)
    for expert in range(3):
        alone = run(Muon(0.02), "weight", mx.ones((8, 12)), [g[expert] for g in grads])
        np.testing.assert_allclose(stack[expert], alone, atol=1e-6)


@pytest.mark.parametrize(("name", "shape"), [("norm.weight", (9,)), ("embed_tokens.w", (9, 4))])
def test_vectors_and_the_embedding_move_as_by_adam(name, shape):
    start, grads = mx.ones(shape), gradients(shape)
    ours = run(Muon(0.02, others=0.5, weight_decay=0.0), name, start, grads)
    adam = optimizers.Adam(0.01, betas=[0.9, 0.98], bias_correction=True)
    np.testing.assert_allclose(ours, run(adam, name, start, grads), atol=1e-6)


def test_weight_decay_shrinks_matrices_alone():
    nothing = {"a": mx.zeros((4, 4)), "norm": mx.zeros((4,))}
    ones = {"a": mx.ones((4, 4)), "norm": mx.ones((4,))}
    after = Muon(0.5, weight_decay=0.1).apply_gradients(nothing, ones)
    np.testing.assert_allclose(after["a"], 0.95)
    np.testing.assert_allclose(after["norm"], 1.0)


def test_a_state_that_was_kept_goes_on():
    names = ("layers.0.weight", "embed_tokens.weight")
    pairs = zip(gradients((4, 6)), gradients((5, 4)), strict=True)
    grads = [dict(zip(names, pair, strict=True)) for pair in pairs]
    start = {name: mx.ones(array.shape) for name, array in grads[0].items()}
    whole, first, second = Muon(0.02), Muon(0.02), Muon(0.02)
    expected = start
    for gradient in grads:
        expected = whole.apply_gradients(gradient, expected)
    found = first.apply_gradients(grads[1], first.apply_gradients(grads[0], start))
    second.state = first.state
    found = second.apply_gradients(grads[3], second.apply_gradients(grads[2], found))
    for name in names:
        assert (found[name] == expected[name]).all()


def test_singular_values_come_near_one():
    values = mx.random.normal((2, 40, 16), key=mx.random.key(3)) * 100
    singular = np.linalg.svd(np.array(orthogonalize(values, 5)), compute_uv=False)
    assert singular.shape == (2, 16)
    assert singular.min() > 0.6 and singular.max() < 1.3

"""Acceptance by entropy bound, renoising, and the temperature schedule."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.diffusion.canvas import Canvas, Prediction
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.noise import SeededNoise
from mlx_diffgemma.diffusion.sampler import entropy_bound
from mlx_diffgemma.kernels.accept_renoise import accept_renoise, entropy_bound_accept
from mlx_diffgemma.kernels.vocabulary import Row


def accept(values, bound: float) -> list[bool]:
    return np.array(entropy_bound_accept(mx.array([values]), bound))[0].tolist()


def naive(values, bound: float) -> list[bool]:
    taken, spent = [False] * len(values), 0.0
    for place in sorted(range(len(values)), key=lambda i: values[i]):
        if spent > bound:
            break
        taken[place] = True
        spent += values[place]
    return taken


@pytest.mark.parametrize(
    "values, bound, expected",
    [
        ([5.0, 4.0, 3.0], 0.1, [False, False, True]),  # the lowest always is
        ([0.0, 0.0, 0.0], 0.1, [True, True, True]),
        ([0.25, 0.25, 0.25, 0.25], 0.5, [True, True, True, False]),  # sum before: 0, ¼, ½, ¾
        ([2.0, 2.0, 2.0], 0.1, [True, False, False]),
        ([1.0, 0.0625, 0.125, 0.5], 0.125, [False, True, True, False]),
        ([1.0, 0.0625, 0.125, 0.5], 0.1875, [False, True, True, True]),  # equal to the bound
        ([3.0], 0.1, [True]),
        ([0.5, 9.0, 0.0], 100.0, [True, True, True]),
    ],
)
def test_accept(values, bound, expected):
    assert accept(values, bound) == expected


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=40, unique=True),
    st.integers(1, 4000),
)
def test_accept_equals_a_naive_rule(entropies, bound):
    """In 1/64 nats, which float32 adds without rounding."""
    values = [value / 64 for value in entropies]
    assert accept(values, bound / 64) == naive(values, bound / 64)


def test_accept_takes_each_row_by_itself():
    rows = np.random.default_rng(0).random((4, 16)).astype(np.float32)
    together = np.array(entropy_bound_accept(mx.array(rows), 0.4))
    for row, taken in zip(rows, together, strict=True):
        assert accept(row.tolist(), 0.4) == taken.tolist()


def test_renoise_takes_draws_where_accepted_and_noise_elsewhere():
    draw, noise = mx.array([[1, 2, 3]]), mx.array([[7, 8, 9]])
    tokens, accepted = accept_renoise(mx.array([[0.2, 5.0, 0.2]]), draw, noise, 0.3)
    assert accepted.tolist() == [[True, False, True]]
    assert tokens.tolist() == [[1, 8, 3]]


def test_the_references_sampler_is_these_two():
    """The draw where the bound accepts it, the canvas's own noise elsewhere; the draft is the
    argmax."""
    length, vocab = 12, 40
    noise = SeededNoise(3, 2)
    settings = DiffusionConfig(entropy_bound=0.4)
    canvas = Canvas.start(settings, noise, 1, length, vocab)
    values = np.random.default_rng(0).random(length).astype(np.float32)
    prediction = Prediction(
        argmax=mx.arange(length), draw=mx.arange(length) + 20, entropy=mx.array(values),
        probability=mx.ones((length,)), confidence=mx.zeros((length,)),
        soft_embeddings=None, dropped_mass=mx.zeros((length,)),
    )  # fmt: skip
    proposal = entropy_bound(prediction, canvas)
    taken = naive(values.tolist(), 0.4)
    assert 0 < sum(taken) < length
    fresh = noise.renoise(1, 1, length, vocab).tolist()
    assert proposal.accepted.tolist() == taken
    assert proposal.draft.tolist() == list(range(length))
    assert proposal.tokens.tolist() == [
        place + 20 if taken[place] else fresh[place] for place in range(length)
    ]


def test_entropy_in_nats(tiny_model):
    """What the model's pass over the vocabulary reports, at two temperatures."""
    model = tiny_model(0)
    hidden = mx.random.normal((2 * 4, model.config.text.hidden_size), key=mx.random.key(1)) * 2
    raw = np.array(model.logits(hidden)).astype(np.float64).reshape(2, 4, -1)
    temperatures = [1.0, 0.4]
    expected = []
    for logits, temperature in zip(raw, temperatures, strict=True):
        p = np.exp(logits / temperature)
        p /= p.sum(-1, keepdims=True)
        expected.append(-(p * np.log(p)).sum(-1))
    found = model.predict(hidden, [Row(4, temperature) for temperature in temperatures]).entropy
    np.testing.assert_allclose(np.array(found), np.concatenate(expected), atol=1e-5)
    assert np.concatenate(expected).max() > 1


def test_entropy_of_the_ignorant_and_of_the_bound(tiny_model):
    model = tiny_model(0)
    vocab = model.config.text.vocab_size
    hidden = mx.zeros((2, model.config.text.hidden_size))
    rows = [Row(2, 1.0, fixed=np.array([-1, 3], np.int32))]
    entropy = model.predict(hidden, rows).entropy.tolist()
    assert entropy[0] == pytest.approx(np.log(vocab), abs=1e-5)
    assert entropy[1] == 0


def temperatures(t_min: float, t_max: float, steps: int) -> DiffusionConfig:
    return DiffusionConfig(t_min=t_min, t_max=t_max, max_denoising_steps=steps)


@pytest.mark.parametrize(
    "step, expected", [(1, 0.8), (2, 0.4 + 0.4 * 47 / 48), (25, 0.6), (48, 0.4 + 0.4 / 48)]
)
def test_temperature_of_the_default_schedule(step, expected):
    assert temperatures(0.4, 0.8, 48).temperature(step) == pytest.approx(expected, rel=1e-12)
    assert DiffusionConfig().temperature(step) == pytest.approx(expected, rel=1e-12)


def test_temperature_of_a_single_step_is_the_highest():
    assert temperatures(0.4, 0.8, 1).temperature(1) == 0.8


def test_temperature_that_is_constant():
    assert [temperatures(0.7, 0.7, 3).temperature(step) for step in (1, 2, 3)] == [0.7] * 3


def test_temperature_beyond_the_last_step_is_that_of_the_last():
    config = temperatures(0.4, 0.8, 4)
    assert [config.temperature(step) for step in (4, 5, 99)] == [config.temperature(4)] * 3


def test_a_canvas_knows_the_temperature_of_its_next_pass():
    config = temperatures(0.4, 0.8, 8)
    late = Canvas.start(config, SeededNoise(0), 0, 4, 40, first_step=6)
    assert (late.step, late.temperature) == (6, config.temperature(6))

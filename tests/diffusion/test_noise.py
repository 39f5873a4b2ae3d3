"""Random draws: uniform, repeatable, and each from a stream of its own."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.diffusion.noise import SeededNoise, checked_seed, seeded
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.kernels.vocabulary import Row


def chi_square(tokens: np.ndarray, expected: np.ndarray) -> float:
    """Standardized: about N(0, 1) where the draws follow `expected` (probabilities)."""
    counts = np.bincount(tokens.ravel(), minlength=len(expected))
    means = expected * tokens.size
    statistic = ((counts - means) ** 2 / means).sum()
    freedom = len(expected) - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


def test_noise_is_uniform_over_the_whole_vocabulary():
    noises, vocab = [SeededNoise(11, row) for row in range(40)], 97
    initial = np.array(mx.stack([noise.initial(0, 500, vocab) for noise in noises]))
    fresh = np.array(mx.stack([noise.renoise(0, 1, 500, vocab) for noise in noises]))
    for tokens in (initial, fresh):
        assert tokens.shape == (40, 500)
        assert tokens.min() == 0 and tokens.max() == vocab - 1
        assert abs(chi_square(tokens, np.full(vocab, 1 / vocab))) < 4


def test_noise_is_uniform_across_steps():
    """One position of one row over many steps: the keys themselves are well mixed."""
    noise, vocab = SeededNoise(5), 8
    tokens = np.array([noise.renoise(0, step, 1, vocab).item() for step in range(1, 1501)])
    assert abs(chi_square(tokens, np.full(vocab, 1 / vocab))) < 4
    pairs = tokens[:-1] * vocab + tokens[1:]
    assert abs(chi_square(pairs, np.full(vocab**2, vocab**-2))) < 4


def test_draws_follow_the_distribution(tiny_model):
    """What the model draws with the keys of 20 sequences, 1,000 positions each."""
    model = tiny_model(0)
    hidden = mx.random.normal((model.config.text.hidden_size,), key=mx.random.key(0))
    p = np.array(mx.softmax(model.logits(hidden) / 4.0)).astype(np.float64)
    rows = [
        Row(length=1000, temperature=4.0, key=SeededNoise(2, row).draw_key(0, 1), need_soft=False)
        for row in range(20)
    ]
    draws = model.predict(mx.broadcast_to(hidden, (20_000, hidden.size)), rows).draw
    assert draws.shape == (20_000,)
    assert draws.dtype == mx.int32
    assert p.min() > 1e-4  # all of them are drawn often enough to be counted
    assert abs(chi_square(np.array(draws), p / p.sum())) < 4


def test_draw_of_a_row_depends_on_its_own_key_only(tiny_model):
    model = tiny_model(0)
    hidden = mx.random.normal((3 * 40, model.config.text.hidden_size), key=mx.random.key(0))
    rows = [
        Row(length=40, temperature=0.8, key=SeededNoise(2, row).draw_key(0, 1)) for row in range(3)
    ]
    together = model.predict(hidden, rows).draw.reshape(3, 40).tolist()
    for row in range(3):
        alone = model.predict(hidden[row * 40 : (row + 1) * 40], [rows[row]]).draw
        assert alone.tolist() == together[row]


def test_streams_differ_by_seed_row_canvas_step_and_purpose():
    seen = set()
    for seed, row, canvas, step in itertools.product(range(3), range(3), range(3), range(1, 4)):
        noise = SeededNoise(seed, row)
        seen.add(tuple(noise.draw_key(canvas, step).tolist()))
        seen.add(tuple(noise.renoise(canvas, step, 24, 5000).tolist()))
        seen.add(tuple(noise.uniform(canvas, step, 24).tolist()))
    for seed, row, canvas in itertools.product(range(3), range(3), range(3)):
        seen.add(tuple(SeededNoise(seed, row).initial(canvas, 24, 5000).tolist()))
    assert len(seen) == 3 * 81 + 27


def test_streams_depend_on_nothing_else():
    """Not on what was drawn before, nor on which rows are drawn together."""
    used = [seeded(9)(row) for row in range(3)]
    for step in range(1, 20):
        for noise in used:
            noise.renoise(0, step, 8, 50)
    for row in (2, 0):
        one = used[row].renoise(1, 1, 8, 50).tolist()
        assert one == seeded(9)(row).renoise(1, 1, 8, 50).tolist()
        assert one == SeededNoise(9, row).renoise(1, 1, 8, 50).tolist()


def test_keys_are_those_that_released_versions_drew():
    """A seed that somebody noted down keeps its meaning."""
    stream = np.random.SeedSequence(7, spawn_key=(2, 1, 3, 1))
    key = SeededNoise(7, 2).draw_key(1, 3)
    assert key.tolist() == stream.generate_state(2, np.uint32).tolist()


def test_global_random_state_is_left_alone(tiny_model):
    model = tiny_model(0)
    mx.random.seed(1)
    before = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(1)
    noise = SeededNoise(3)
    noise.initial(0, 8, 50), noise.renoise(0, 1, 8, 50), noise.uniform(0, 1, 8)
    hidden = mx.zeros((4, model.config.text.hidden_size))
    mx.eval(model.predict(hidden, [Row(4, 1.0, key=noise.draw_key(0, 1))]).draw)
    assert mx.random.uniform(shape=(4,)).tolist() == before


def test_fresh_seeds_differ_and_are_short():
    seeds = {checked_seed(None) for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("seed", [0, 7, 2**70])
def test_a_seed_given_is_taken(seed):
    assert checked_seed(seed) == seed
    SeededNoise(seed).initial(0, 8, 50)


@pytest.mark.parametrize("seed", [-1, 1.5, "1", True])
def test_a_seed_that_is_none(seed):
    with pytest.raises(UsageError) as error:
        checked_seed(seed)
    assert str(error.value) == f"seed must be an integer of at least 0, not {seed!r}."

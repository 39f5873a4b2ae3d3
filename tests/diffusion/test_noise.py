"""Random draws: uniform, repeatable, and each from a stream of its own."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diffusion.noise import SeededNoise, draw_categorical, fresh_seed


def chi_square(tokens: np.ndarray, expected: np.ndarray) -> float:
    """Standardized: about N(0, 1) where the draws follow `expected` (probabilities)."""
    counts = np.bincount(tokens.ravel(), minlength=len(expected))
    means = expected * tokens.size
    statistic = ((counts - means) ** 2 / means).sum()
    freedom = len(expected) - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


def test_noise_is_uniform_over_the_whole_vocabulary():
    noise, vocab = SeededNoise(11), 97
    initial = np.array(noise.initial_canvas(range(40), 0, 500, vocab))
    fresh = np.array(noise.renoise(range(40), 0, 1, 500, vocab))
    for tokens in (initial, fresh):
        assert tokens.shape == (40, 500)
        assert tokens.min() == 0 and tokens.max() == vocab - 1
        assert abs(chi_square(tokens, np.full(vocab, 1 / vocab))) < 4


def test_noise_is_uniform_across_steps():
    """One position of one row over many steps: the keys themselves are well mixed."""
    noise, vocab = SeededNoise(5), 8
    tokens = np.array([noise.renoise([0], 0, step, 1, vocab).item() for step in range(1, 1501)])
    assert abs(chi_square(tokens, np.full(vocab, 1 / vocab))) < 4
    pairs = tokens[:-1] * vocab + tokens[1:]
    assert abs(chi_square(pairs, np.full(vocab**2, vocab**-2))) < 4


def test_draws_follow_the_distribution():
    logits = np.random.default_rng(0).normal(0, 1, 30).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    keys = SeededNoise(2).draw_keys(range(20), 0, 1)
    draws = draw_categorical(mx.broadcast_to(mx.array(logits), (20, 1000, 30)), keys)
    assert draws.shape == (20, 1000)
    assert draws.dtype == mx.int32
    assert abs(chi_square(np.array(draws), p / p.sum())) < 4


def test_draw_of_a_row_depends_on_its_own_key_only():
    logits = mx.random.normal((3, 40, 30), key=mx.random.key(0))
    keys = SeededNoise(2).draw_keys([0, 1, 2], 0, 1)
    together = draw_categorical(logits, keys).tolist()
    for row in range(3):
        assert draw_categorical(logits[row : row + 1], keys[row : row + 1]).tolist() == [
            together[row]
        ]


def test_streams_differ_by_seed_row_canvas_step_and_purpose():
    seen = set()
    for seed, row, canvas, step in itertools.product(range(3), range(3), range(3), range(1, 4)):
        noise = SeededNoise(seed)
        seen.add(tuple(noise.draw_keys([row], canvas, step)[0].tolist()))
        seen.add(tuple(noise.renoise([row], canvas, step, 24, 5000)[0].tolist()))
    for seed, row, canvas in itertools.product(range(3), range(3), range(3)):
        seen.add(tuple(SeededNoise(seed).initial_canvas([row], canvas, 24, 5000)[0].tolist()))
    assert len(seen) == 2 * 81 + 27


def test_streams_depend_on_nothing_else():
    """Not on what was drawn before, nor on which rows are drawn together."""
    used, fresh = SeededNoise(9), SeededNoise(9)
    for step in range(1, 20):
        used.renoise([0, 1, 2], 0, step, 8, 50)
    one = used.renoise([2, 0], 1, 1, 8, 50).tolist()
    assert one == fresh.renoise([2, 0], 1, 1, 8, 50).tolist()
    assert one[::-1] == fresh.renoise([0, 2], 1, 1, 8, 50).tolist()
    assert one[:1] == fresh.renoise([2], 1, 1, 8, 50).tolist()


def test_global_random_state_is_left_alone():
    mx.random.seed(1)
    before = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(1)
    noise = SeededNoise(3)
    noise.initial_canvas([0], 0, 8, 50)
    draw_categorical(mx.zeros((1, 4, 9)), noise.draw_keys([0], 0, 1))
    assert mx.random.uniform(shape=(4,)).tolist() == before


def test_fresh_seeds_differ_and_are_short():
    seeds = {fresh_seed() for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**32 for seed in seeds)

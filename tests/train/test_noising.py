"""The corruption of canvases, beside a naive loop."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_diffgemma.train.noising import corrupt, corrupt_at

VOCAB = 50


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def clean(batch: int = 400, length: int = 64) -> np.ndarray:
    """Ids that noise never draws, so that every replaced token shows."""
    return np.full((batch, length), VOCAB + 1)


def test_tokens_are_replaced_with_probability_t():
    canvas = clean(2000)
    corrupted, noise = corrupt(canvas, VOCAB, rng(), min_noise=0.2)
    replaced = (corrupted != canvas).mean(axis=1)
    assert noise.min() >= 0.2 and noise.max() <= 1 and abs(noise.mean() - 0.6) < 0.02
    assert abs((replaced - noise).mean()) < 0.005
    assert np.corrcoef(replaced, noise)[0, 1] > 0.95
    deviation = (replaced - noise) / np.sqrt(noise * (1 - noise) / 64 + 1e-9)
    assert 0.9 < deviation[noise < 0.95].std() < 1.1


def test_noise_is_uniform_over_the_vocabulary():
    corrupted = corrupt_at(clean(), VOCAB, rng(), np.ones(400), np.zeros(400, bool))
    counts = np.bincount(corrupted.ravel(), minlength=VOCAB)
    assert counts.size == VOCAB and counts.min() > 0.7 * counts.mean()


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_spans_are_contiguous_and_of_that_length(t):
    canvas = clean()
    corrupted = corrupt_at(canvas, VOCAB, rng(), np.full(400, t), np.ones(400, bool))
    starts = set()
    for before, after in zip(canvas, corrupted, strict=True):
        places = np.flatnonzero(before != after)
        assert len(places) == round(t * 64)
        if len(places):
            assert places[-1] - places[0] + 1 == len(places)
            starts.add(int(places[0]))
    assert len(starts) == {0.0: 0, 1.0: 1}.get(t, len(starts))
    assert t != 0.3 or len(starts) > 40


def test_share_of_spans():
    canvas = clean(1000)
    corrupted, noise = corrupt(canvas, VOCAB, rng(), span_fraction=0.25)
    replaced = corrupted != canvas
    runs = (np.diff(replaced.astype(int), axis=1) == 1).sum(axis=1) + replaced[:, 0]
    middle = (noise > 0.2) & (noise < 0.8)  # elsewhere scattered tokens may be one run by chance
    assert 0.2 < (runs[middle] == 1).mean() < 0.3


def test_the_same_generator_gives_the_same():
    one, other = corrupt(clean(), VOCAB, rng(5)), corrupt(clean(), VOCAB, rng(5))
    np.testing.assert_array_equal(one[0], other[0])
    assert not np.array_equal(one[0], corrupt(clean(), VOCAB, rng(6))[0])

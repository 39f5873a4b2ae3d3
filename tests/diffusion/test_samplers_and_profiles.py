"""Samplers, stop rules and profiles beyond the reference's, against plain reasoning."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.diffusion.config import SAMPLERS, DiffusionConfig
from mlx_diffgemma.diffusion.noise import SeededNoise, StepNoise
from mlx_diffgemma.diffusion.predict import Prediction
from mlx_diffgemma.diffusion.profiles import DEFAULT, PROFILES, profile_settings
from mlx_diffgemma.diffusion.sampler import (
    BlockRefinement,
    ConfidenceThreshold,
    DiscreteDDIM,
    EntropyBound,
    make_sampler,
)
from mlx_diffgemma.diffusion.stopping import (
    AnyOf,
    ConfidentAfter,
    StableAndConfident,
    UpToEos,
    make_stop_rule,
)
from mlx_diffgemma.errors import UsageError

VOCAB = 50
EOS = 9


def noise(step: int = 1, length: int = 8, seed: int = 0) -> StepNoise:
    return StepNoise(SeededNoise(seed), [0], 0, step, length, VOCAB)


def prediction(confidence, draw=None, argmax=None) -> Prediction:
    confidence = np.atleast_2d(np.array(confidence, np.float32))
    draw = np.arange(confidence.size).reshape(confidence.shape) if draw is None else draw
    argmax = np.full(confidence.shape, 40) if argmax is None else argmax
    return Prediction(
        argmax=mx.array(argmax),
        draw=mx.array(draw),
        entropy=mx.array(-np.log(confidence)),
        soft_embeddings=mx.zeros((*confidence.shape, 4)),
        confidence=mx.array(confidence),
    )


def test_confidence_threshold_accepts_anew_each_step() -> None:
    sampler = ConfidenceThreshold(0.9)
    canvas = mx.zeros((1, 4), mx.int32)
    first = sampler.advance(canvas, prediction([0.95, 0.5, 0.9, 0.1]), noise(length=4))
    assert first.accepted.tolist() == [[True, False, True, False]]
    assert first.canvas[0, 0].item() == 0 and first.canvas[0, 2].item() == 2
    assert first.canvas[0, 1].item() == noise(length=4).tokens()[0, 1].item()
    second = sampler.advance(canvas, prediction([0.2, 0.3, 0.1, 0.1]), noise(2, 4))
    assert second.accepted.tolist() == [[False, True, False, False]]  # the best one, always
    assert second.draft.tolist() == [[40] * 4]


def test_block_refinement_keeps_its_share_for_good() -> None:
    sampler = BlockRefinement(threshold=0.9, max_steps=4)
    canvas = mx.zeros((1, 8), mx.int32)
    first = sampler.advance(canvas, prediction([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]), noise())
    assert first.accepted.tolist() == [[False] * 6 + [True] * 2]
    again = prediction([0.95, 0.2, 0.3, 0.91, 0.92, 0.1, 0.1, 0.1], draw=np.full((1, 8), 30))
    second = sampler.advance(first.canvas, again, noise(2))
    assert second.accepted.tolist() == [[True, False, False, True, True, False, True, True]]
    assert second.canvas[0, 6:].tolist() == [6, 7]  # kept, though drawn otherwise now
    assert second.draft.tolist() == [[30, 40, 40, 30, 30, 40, 6, 7]]


def test_block_refinement_is_complete_after_its_steps() -> None:
    sampler = BlockRefinement(threshold=2.0, max_steps=3)
    canvas = mx.zeros((1, 8), mx.int32)
    for step in (1, 2, 3):
        proposal = sampler.advance(canvas, prediction(np.full(8, 0.1)), noise(step))
        canvas = proposal.canvas
    assert proposal.accepted.all().item()


@pytest.mark.parametrize("step", [1, 2, 5, 7, 8])
@pytest.mark.parametrize("agree", [False, True])
def test_ddim_posterior_against_bayes(step: int, agree: bool) -> None:
    """q(x_after = k | x_before = 3, clean = drawn), by Bayes' rule over the corruption chain."""
    steps, vocab, stands = 8, 7, 3
    drawn = stands if agree else 5
    before, after = (step - 1) / steps, step / steps
    kept = before / after
    weights = np.array(
        [
            (kept * (k == stands) + (1 - kept) / vocab)
            * (after * (k == drawn) + (1 - after) / vocab)
            for k in range(vocab)
        ]
    )
    weights /= weights.sum()
    to_draw, to_stay = DiscreteDDIM(steps, vocab).posterior(step, agree=agree)
    rest = (1 - to_draw - to_stay) / vocab
    got = np.full(vocab, rest)
    got[drawn] += to_draw
    got[stands] += to_stay
    np.testing.assert_allclose(got, weights, atol=1e-12)


def test_ddim_draws_from_its_posterior_and_ends_on_the_draw() -> None:
    length, steps, step = 40_000, 4, 3
    sampler = DiscreteDDIM(steps, VOCAB)
    canvas = mx.full((1, length), 3)
    draw = np.full((1, length), 5)
    result = sampler.advance(canvas, prediction(np.full(length, 0.5), draw), noise(step, length))
    tokens = np.array(result.canvas[0])
    to_draw, to_stay = sampler.posterior(step)
    spread = (1 - to_draw - to_stay) / VOCAB
    for token, share in ((5, to_draw + spread), (3, to_stay + spread), (7, spread)):
        error = np.sqrt(share * (1 - share) / length)
        assert abs((tokens == token).mean() - share) < 5 * error
    last = sampler.advance(canvas, prediction(np.full(length, 0.5), draw), noise(steps, length))
    assert (np.array(last.canvas) == 5).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_can_be_named(name: str) -> None:
    sampler = make_sampler(DiffusionConfig(sampler=name), VOCAB)
    proposal = sampler.advance(mx.zeros((1, 8), mx.int32), prediction(np.full(8, 0.99)), noise())
    assert proposal.canvas.shape == proposal.accepted.shape == proposal.draft.shape == (1, 8)


def test_an_unknown_sampler_is_named() -> None:
    with pytest.raises(UsageError, match="unknown sampler 'x'; known are entropy-bound"):
        DiffusionConfig(sampler="x")


def test_the_default_sampler_is_the_references() -> None:
    assert isinstance(make_sampler(DiffusionConfig(), VOCAB), EntropyBound)


def run(rule, drafts, entropies) -> list[list[bool]]:
    return [
        rule.update(np.array(draft), np.array(entropy, np.float32)).tolist()
        for draft, entropy in zip(drafts, entropies, strict=True)
    ]


def test_confident_after_waits_for_its_floor() -> None:
    sure, unsure = [[0.0, 0.0]], [[1.0, 0.0]]
    drafts = [[[1, 2]], [[3, 4]], [[5, 6]], [[7, 8]]]
    rule = ConfidentAfter(3, 0.01)
    assert run(rule, drafts, [sure, sure, sure, unsure]) == [[False], [False], [True], [False]]


def test_any_of_shows_every_rule_every_step() -> None:
    rule = AnyOf([StableAndConfident(1, 0.01), ConfidentAfter(4, 0.01)])
    sure = [[0.0, 0.0]]
    changing = [[[1, 2]], [[1, 2]], [[3, 4]], [[5, 6]]]
    assert run(rule, changing, [sure] * 4) == [[False], [True], [False], [True]]


def test_up_to_eos_ignores_what_is_cut_off() -> None:
    draft = [[1, EOS, 3, 4]]
    noisy_tail = [[0.0, 0.0, 3.0, 3.0]]
    plain = StableAndConfident(1, 0.01)
    assert run(plain, [draft, draft], [noisy_tail] * 2) == [[False], [False]]
    rule = UpToEos(StableAndConfident(1, 0.01), [EOS], certain=0.1)
    other_tail = [[1, EOS, 7, 8]]
    assert run(rule, [draft, other_tail], [noisy_tail] * 2) == [[False], [True]]


def test_up_to_eos_looks_on_where_the_first_eos_is_uncertain() -> None:
    rule = UpToEos(StableAndConfident(0, 0.2), [EOS], certain=0.1)
    draft = [[1, EOS, 3, EOS]]
    assert run(rule, [draft], [[[0.0, 0.5, 3.0, 0.0]]]) == [[False]]
    assert run(rule, [[[1, 2, 3, 4]]], [[[0.0, 0.0, 0.0, 2.0]]]) == [[False]]


def test_up_to_eos_never_stops_later_than_the_rule_within() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        draft = rng.integers(EOS - 3, EOS + 1, (1, 6))
        entropy = rng.exponential(0.05, (1, 6)).astype(np.float32)
        plain, scoped = (
            StableAndConfident(0, 0.05),
            UpToEos(StableAndConfident(0, 0.05), [EOS], certain=0.1),
        )
        assert scoped.update(draft, entropy)[0] >= plain.update(draft, entropy)[0]


def test_profiles_are_settings() -> None:
    assert profile_settings("exact") == {}
    assert DEFAULT in PROFILES
    for name in PROFILES:
        config = DiffusionConfig().override(**profile_settings(name))
        rule = make_stop_rule(config)  # without any eos, too
        assert not rule.update(np.array([[1, 2]]), np.array([[2.0, 2.0]])).any()
    with pytest.raises(
        UsageError, match="unknown profile 'x'; known are exact, balanced, fast, turbo"
    ):
        profile_settings("x")

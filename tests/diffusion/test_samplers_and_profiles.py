"""Samplers, stop rules and profiles beyond the reference's, against plain reasoning."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mock_model import MockModel, Told

from mlx_diffgemma.diffusion.canvas import Canvas, Prediction
from mlx_diffgemma.diffusion.config import SAMPLERS as NAMES
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.diffusion.noise import SeededNoise
from mlx_diffgemma.diffusion.profiles import DEFAULT, PROFILES, profile_settings
from mlx_diffgemma.diffusion.sampler import (
    SAMPLERS,
    Proposal,
    block_refinement,
    confidence_threshold,
    ddim_posterior,
    discrete_ddim,
    entropy_bound,
    probability,
    propose,
)
from mlx_diffgemma.errors import UsageError

VOCAB = 50
EOS = 9


def canvas_of(tokens, passes: int = 0, **settings) -> Canvas:
    """A canvas that holds these tokens after so many passes."""
    started = Canvas.start(
        DiffusionConfig(**settings), SeededNoise(0), 0, len(tokens), VOCAB, initial=tokens
    )
    return replace(started, passes=passes)


def after(canvas: Canvas, proposal: Proposal) -> Canvas:
    """The canvas that the loop makes of a proposal."""
    return replace(
        canvas,
        passes=canvas.passes + 1,
        tokens=proposal.tokens,
        accepted=np.array(proposal.accepted),
    )


def fresh(step: int, length: int) -> list[int]:
    return SeededNoise(0).renoise(0, step, length, VOCAB).tolist()


def prediction(confidence, draw=None, argmax=None) -> Prediction:
    confidence = np.array(confidence, np.float32)
    draw = np.arange(confidence.size) if draw is None else draw
    argmax = np.full(confidence.shape, 40) if argmax is None else argmax
    return Prediction(
        argmax=mx.array(argmax),
        probability=mx.array(confidence) / 2,
        draw=mx.array(draw),
        entropy=mx.array(-np.log(confidence)),
        soft_embeddings=mx.zeros((*confidence.shape, 4)),
        confidence=mx.array(confidence),
        dropped_mass=mx.zeros(confidence.shape),
    )


def test_confidence_threshold_accepts_anew_each_step() -> None:
    canvas = canvas_of([0] * 4, accept_threshold=0.9)
    first = confidence_threshold(prediction([0.95, 0.5, 0.9, 0.1]), canvas)
    assert first.accepted.tolist() == [True, False, True, False]
    assert first.tokens[0].item() == 0 and first.tokens[2].item() == 2
    assert first.tokens[1].item() == fresh(1, 4)[1]
    second = confidence_threshold(prediction([0.2, 0.3, 0.1, 0.1]), after(canvas, first))
    assert second.accepted.tolist() == [False, True, False, False]  # the best one, always
    assert second.draft.tolist() == [40] * 4
    assert second.tokens[0].item() == fresh(2, 4)[0]


def test_block_refinement_keeps_its_share_for_good() -> None:
    canvas = canvas_of([0] * 8, accept_threshold=0.9, max_denoising_steps=4)
    first = block_refinement(prediction([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]), canvas)
    assert first.accepted.tolist() == [False] * 6 + [True] * 2
    again = prediction([0.95, 0.2, 0.3, 0.91, 0.92, 0.1, 0.1, 0.1], draw=np.full(8, 30))
    second = block_refinement(again, after(canvas, first))
    assert second.accepted.tolist() == [True, False, False, True, True, False, True, True]
    assert second.tokens[6:].tolist() == [6, 7]  # kept, though drawn otherwise now
    assert second.draft.tolist() == [30, 40, 40, 30, 30, 40, 6, 7]
    known = np.array(probability(again, second))
    assert known[:6].tolist() == np.float32([0.95, 0.1, 0.15, 0.91, 0.92, 0.05]).tolist()
    assert np.isnan(known[6:]).all()  # of what was kept, that of the step that drew it counts


def test_block_refinement_is_complete_after_its_steps() -> None:
    canvas = canvas_of([0] * 8, accept_threshold=2.0, max_denoising_steps=3)
    for _ in (1, 2, 3):
        proposal = block_refinement(prediction(np.full(8, 0.1)), canvas)
        canvas = after(canvas, proposal)
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
    to_draw, to_stay = ddim_posterior(step, steps, vocab, agree=agree)
    rest = (1 - to_draw - to_stay) / vocab
    got = np.full(vocab, rest)
    got[drawn] += to_draw
    got[stands] += to_stay
    np.testing.assert_allclose(got, weights, atol=1e-12)


def test_ddim_draws_from_its_posterior_and_ends_on_the_draw() -> None:
    length, steps, step = 40_000, 4, 3
    canvas = canvas_of([3] * length, step - 1, max_denoising_steps=steps)
    draw = np.full(length, 5)
    result = discrete_ddim(prediction(np.full(length, 0.5), draw), canvas)
    tokens = np.array(result.tokens)
    to_draw, to_stay = ddim_posterior(step, steps, VOCAB)
    spread = (1 - to_draw - to_stay) / VOCAB
    for token, share in ((5, to_draw + spread), (3, to_stay + spread), (7, spread)):
        error = np.sqrt(share * (1 - share) / length)
        assert abs((tokens == token).mean() - share) < 5 * error
    last = canvas_of([3] * length, steps - 1, max_denoising_steps=steps)
    ended = discrete_ddim(prediction(np.full(length, 0.5), draw), last)
    assert (np.array(ended.tokens) == 5).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_can_be_named(name: str) -> None:
    proposal = propose(prediction(np.full(8, 0.99)), canvas_of([0] * 8, sampler=name))
    assert proposal.tokens.shape == proposal.accepted.shape == proposal.draft.shape == (8,)
    assert set(SAMPLERS) == set(NAMES)


def test_an_unknown_sampler_is_named() -> None:
    with pytest.raises(UsageError, match="unknown sampler 'x'; known are entropy-bound"):
        DiffusionConfig(sampler="x")


def test_the_default_sampler_is_the_references() -> None:
    assert SAMPLERS[DiffusionConfig().sampler] is entropy_bound


def run(settings: DiffusionConfig, drafts, entropies) -> list[bool]:
    """What the stop rule says after each pass of a canvas with these drafts and entropies."""
    model = MockModel()
    steps = [
        (np.array(draft), np.array(each)) for draft, each in zip(drafts, entropies, strict=True)
    ]
    denoiser = Denoiser(model, Told([steps]))
    canvas = Canvas.start(settings, SeededNoise(0), 0, len(drafts[0]), VOCAB)
    found = []
    for _ in steps:
        (canvas,) = denoiser.step([canvas], [model.make_cache().prefix])
        found.append(canvas.converged)
    return found


def stable(threshold: int, confidence: float, **more) -> DiffusionConfig:
    return DiffusionConfig(stability_threshold=threshold, confidence_threshold=confidence, **more)


NEVER = 1000  # steps that a draft would have to stay the same


def test_confident_after_waits_for_its_floor() -> None:
    sure, unsure = [0.0, 0.0], [1.0, 0.0]
    drafts = [[1, 2], [3, 4], [5, 6], [7, 8]]
    rule = stable(NEVER, 0.01, confident_after=3)
    assert run(rule, drafts, [sure, sure, sure, unsure]) == [False, False, True, False]


def test_stability_and_the_floor_are_each_enough() -> None:
    rule = stable(1, 0.01, confident_after=4)
    changing = [[1, 2], [1, 2], [3, 4], [5, 6]]
    assert run(rule, changing, [[0.0, 0.0]] * 4) == [False, True, False, True]


def test_up_to_eos_ignores_what_is_cut_off() -> None:
    draft = [1, EOS, 3, 4]
    noisy_tail = [0.0, 0.0, 3.0, 3.0]
    plain = stable(1, 0.01, eos_token_ids=(EOS,))
    assert run(plain, [draft, draft], [noisy_tail] * 2) == [False, False]
    rule = replace(plain, stop_at_eos=True, eos_certainty=0.1)
    other_tail = [1, EOS, 7, 8]
    assert run(rule, [draft, other_tail], [noisy_tail] * 2) == [False, True]


def test_up_to_eos_looks_on_where_the_first_eos_is_uncertain() -> None:
    rule = stable(0, 0.2, eos_token_ids=(EOS,), stop_at_eos=True, eos_certainty=0.1)
    draft = [1, EOS, 3, EOS]
    assert run(rule, [draft], [[0.0, 0.5, 3.0, 0.0]]) == [False]
    assert run(rule, [[1, 2, 3, 4]], [[0.0, 0.0, 0.0, 2.0]]) == [False]


def test_up_to_eos_never_stops_later_than_the_rule_within() -> None:
    rng = np.random.default_rng(0)
    plain = stable(0, 0.05, eos_token_ids=(EOS,))
    scoped = replace(plain, stop_at_eos=True, eos_certainty=0.1)
    stopped = 0
    for _ in range(300):
        draft = rng.integers(EOS - 3, EOS + 1, 6)
        entropy = rng.exponential(0.05, 6).astype(np.float32)
        (at_eos,), (without,) = (run(rule, [draft], [entropy]) for rule in (scoped, plain))
        assert at_eos >= without
        stopped += at_eos
    assert 0 < stopped < 300


def test_profiles_are_settings() -> None:
    assert profile_settings("exact") == {}
    assert DEFAULT in PROFILES
    for name in PROFILES:
        config = DiffusionConfig().override(**profile_settings(name))
        assert run(config, [[1, 2]], [[2.0, 2.0]]) == [False]  # without any eos, too
    with pytest.raises(
        UsageError, match="unknown profile 'x'; known are exact, balanced, swift, fast, turbo"
    ):
        profile_settings("x")

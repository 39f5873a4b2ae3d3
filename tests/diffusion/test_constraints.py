"""What a canvas must hold, under every sampler and every profile."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.diffusion.config import SAMPLERS, DiffusionConfig
from mlx_diffgemma.diffusion.constraints import FREE, CanvasConstraint, Layout, token_mask
from mlx_diffgemma.diffusion.denoise import denoise_canvas
from mlx_diffgemma.diffusion.noise import SeededNoise, draw_categorical
from mlx_diffgemma.diffusion.predict import Prediction, entropy, make_predictor
from mlx_diffgemma.diffusion.prefill import prefill
from mlx_diffgemma.diffusion.profiles import PROFILES, profile_settings
from mlx_diffgemma.errors import UsageError

VOCAB, LENGTH, PATTERNS = 41, 11, 40
RUNS = [(sampler, profile) for sampler in SAMPLERS for profile in PROFILES]


class RandomPredictor:
    """Logits that depend on the canvas, restricted as the model's are."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.table = mx.array(rng.normal(0, 3, (VOCAB, VOCAB)).astype(np.float32))
        self.calls = 0

    def __call__(
        self, canvas, cache, soft_embeddings, temperature, keys, constraint=None, last=False
    ):
        self.calls += 1
        logits = self.table[canvas] + mx.roll(self.table[canvas], 1, axis=1)
        processed = constraint.restrict(logits / temperature)
        draw = draw_categorical(processed, keys)
        drawn = mx.take_along_axis(processed, draw[..., None], axis=-1)[..., 0]
        return Prediction(
            argmax=mx.argmax(processed, axis=-1).astype(mx.int32),
            draw=draw,
            entropy=entropy(processed),
            soft_embeddings=mx.zeros((*canvas.shape, 2)),
            confidence=mx.exp(drawn - mx.logsumexp(processed, axis=-1)),
        )


def random_constraint(rng: np.random.Generator, rows: int, length: int, vocab: int):
    """Rows that differ in how much is fixed, and in how much of the rest is restricted."""
    fixed = rng.integers(0, vocab, (rows, length))
    fixed[rng.random((rows, length)) > rng.random((rows, 1))] = FREE
    bits = rng.random((rows, length, vocab)) < rng.random((rows, length, 1))
    bits |= rng.random((rows, length, 1)) < 0.3
    bits[..., 0] |= ~bits.any(axis=-1)
    masks = [[token_mask(np.flatnonzero(each), vocab) for each in row] for row in bits]
    allowed = None if rng.random() < 0.3 else np.array(masks, np.uint32)
    return CanvasConstraint(fixed.astype(np.int32), allowed), bits if allowed is not None else None


def check_run(predictor, cache, config, constraint, bits, vocab, seed):
    """Run a canvas, and hold every step of it against the constraint."""
    rows, length = constraint.fixed.shape
    pinned = constraint.fixed != FREE
    run = denoise_canvas(
        predictor,
        cache,
        config,
        SeededNoise(seed),
        rows=list(range(rows)),
        canvas_index=0,
        canvas_length=length,
        vocab_size=vocab,
        constraint=constraint,
    )
    steps = 0
    for step in run:
        steps += 1
        assert (step.draft[pinned] == constraint.fixed[pinned]).all()
        assert (step.canvas[pinned] == constraint.fixed[pinned]).all()
        assert step.accepted[pinned].all()
        assert (step.entropy[pinned] == 0).all()
        if bits is not None:
            row, place = np.nonzero(~pinned)
            assert bits[row, place, step.draft[row, place]].all()
    assert 1 <= steps <= config.max_denoising_steps


@pytest.mark.parametrize(("sampler", "profile"), RUNS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_sampler_and_no_profile_breaks_a_constraint(sampler, profile, seed):
    """5 batches of 40 random patterns for each of at least 12 runs: 2,400 patterns or more."""
    rng = np.random.default_rng(seed)
    chosen = profile_settings(profile) | {"sampler": sampler, "max_denoising_steps": 5}
    chosen["confident_after"] = 3 if chosen.get("confident_after") else None
    config = DiffusionConfig(eos_token_ids=(1, 5)).override(**chosen)
    constraint, bits = random_constraint(rng, PATTERNS, LENGTH, VOCAB)
    check_run(RandomPredictor(seed), None, config, constraint, bits, VOCAB, seed)


@pytest.mark.parametrize(("sampler", "profile"), RUNS)
def test_the_model_keeps_to_a_constraint(tiny_model, sampler, profile):
    model = tiny_model(3)
    vocab, length = model.config.text.vocab_size, model.config.canvas_length
    rng = np.random.default_rng(11)
    prompt = mx.array(rng.integers(0, vocab, (3, 6)), mx.int32)
    cache = model.make_cache()
    for _ in prefill(model, prompt, cache):
        pass
    chosen = profile_settings(profile) | {"sampler": sampler, "max_denoising_steps": 3}
    config = DiffusionConfig(eos_token_ids=(1, 5)).override(**chosen)
    predictor = make_predictor(model, config.soft_cutoff)
    constraint, bits = random_constraint(rng, 3, length, vocab)
    check_run(predictor, cache, config, constraint, bits, vocab, seed=1)


def test_a_late_start_takes_the_rest_of_the_schedule():
    constraint = CanvasConstraint.free(1, LENGTH)
    config = DiffusionConfig(max_denoising_steps=8, stability_threshold=8)
    run = denoise_canvas(
        RandomPredictor(0), None, config, SeededNoise(0), rows=[0], canvas_index=0,
        canvas_length=LENGTH, vocab_size=VOCAB, constraint=constraint, first_step=6,
    )  # fmt: skip
    steps = list(run)
    assert [step.step for step in steps] == [1, 2, 3]
    assert [step.temperature for step in steps] == pytest.approx([0.55, 0.5, 0.45])


def test_a_confidence_sampler_always_accepts_a_free_position():
    """However many positions are fixed, and so certain."""
    fixed = np.full((1, LENGTH), 3, np.int32)
    fixed[0, 4:7] = FREE
    config = DiffusionConfig(
        sampler="confidence-threshold", accept_threshold=0.999999, max_denoising_steps=3,
        stability_threshold=3,
    )  # fmt: skip
    run = denoise_canvas(
        RandomPredictor(1), None, config, SeededNoise(2), rows=[0], canvas_index=0,
        canvas_length=LENGTH, vocab_size=VOCAB, constraint=CanvasConstraint(fixed),
    )  # fmt: skip
    assert all(step.accepted[0, 4:7].any() for step in run)


def test_fixed_positions_do_not_count_in_the_stop_rule():
    """One open position that is never certain keeps a canvas going, whatever surrounds it."""
    fixed = np.full((1, LENGTH), 3, np.int32)
    fixed[0, 0] = FREE
    config = DiffusionConfig(max_denoising_steps=6, confidence_threshold=0.2, stability_threshold=0)
    predictor = RandomPredictor(4)
    predictor.table = predictor.table * 0.05  # nearly uniform: ln 41 / 11 = 0.34 nats on average
    config = config.override(confidence_threshold=1.0)
    run = denoise_canvas(
        predictor, None, config, SeededNoise(2), rows=[0], canvas_index=0,
        canvas_length=LENGTH, vocab_size=VOCAB, constraint=CanvasConstraint(fixed),
    )  # fmt: skip
    assert len(list(run)) == 6


def test_restrict_equals_a_loop_over_tokens():
    rng = np.random.default_rng(8)
    constraint, bits = random_constraint(rng, 6, 5, 70)
    while bits is None:
        constraint, bits = random_constraint(rng, 6, 5, 70)
    logits = rng.normal(size=(6, 5, 70)).astype(np.float32)
    found = np.array(constraint.restrict(mx.array(logits)))
    for row, place, token in np.ndindex(6, 5, 70):
        fixed = constraint.fixed[row, place]
        may = bits[row, place, token] if fixed == FREE else token == fixed
        assert found[row, place, token] == (logits[row, place, token] if may else -np.inf)


def test_a_constraint_of_layouts():
    few = token_mask([2, 40], VOCAB)
    constraint = CanvasConstraint.of([Layout((FREE, 7)), Layout((FREE, FREE), {1: few})], VOCAB)
    assert constraint.fixed.tolist() == [[FREE, 7], [FREE, FREE]]
    assert constraint.allowed is not None
    assert (constraint.allowed[0, 0] == token_mask(range(VOCAB), VOCAB)).all()
    assert (constraint.allowed[1, 1] == few).all()
    assert CanvasConstraint.of([Layout((FREE, 7))], VOCAB).allowed is None
    assert constraint.rows([1]).fixed.tolist() == [[FREE, FREE]]


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (CanvasConstraint.free(2, 3), "has shape (2, 3); the canvas has (1, 3)."),
        (CanvasConstraint(np.array([[0, 50, 0]])), "outside the vocabulary of 41."),
        (
            CanvasConstraint(np.full((1, 3), FREE), np.zeros((1, 3, 1), np.uint32)),
            "have shape (1, 3, 1); they need (1, 3, 2).",
        ),
        (
            CanvasConstraint(np.full((1, 3), FREE), np.zeros((1, 3, 2), np.uint32)),
            "position 0 of row 0 allows no token at all.",
        ),
    ],
)
def test_errors_say_what_does_not_fit(constraint, message):
    with pytest.raises(UsageError) as error:
        constraint.check(1, 3, VOCAB)
    assert message in str(error.value)

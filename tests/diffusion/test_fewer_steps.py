"""Rules that spend fewer passes than the reference, each against plain reasoning."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_model import LENGTH, VOCAB, MockModel, Told

from mlx_diffgemma.diffusion.canvas import Canvas, Prediction
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.diffusion.encoder_check import first_improbable, worth_checking
from mlx_diffgemma.diffusion.events import CanvasCommitted, Finished
from mlx_diffgemma.diffusion.generate import generate_canvases
from mlx_diffgemma.diffusion.noise import SeededNoise, seeded
from mlx_diffgemma.diffusion.profiles import profile_settings, save_profile
from mlx_diffgemma.diffusion.sampler import along_runs, behind_end, bound_of, entropy_bound
from mlx_diffgemma.diffusion.stopping import as_shown
from mlx_diffgemma.errors import UsageError

EOS, BAD = 9, 30
DRAFT = np.arange(1, LENGTH + 1) % EOS + 10


def canvas_of(length: int = LENGTH, **given) -> Canvas:
    return Canvas.start(DiffusionConfig(**given), SeededNoise(0), 0, length, VOCAB)


def predicted(draft, draw, entropy) -> Prediction:
    return Prediction(
        argmax=draft,
        probability=mx.ones(draft.shape),
        draw=draw,
        entropy=entropy,
        confidence=mx.ones(draft.shape),
        soft_embeddings=None,
        dropped_mass=mx.zeros(draft.shape),
    )


def done_after(steps, **given) -> int:
    """Passes until a canvas is done that predicts (draft, entropy) a pass."""
    model = MockModel()
    denoiser, canvas = Denoiser(model, Told([steps])), canvas_of(len(steps[0][0]), **given)
    while not canvas.done:
        (canvas,) = denoiser.step([canvas], [model.make_cache().prefix])
    assert canvas.converged
    return canvas.passes


def test_entropy_that_sums_to_little_ends_a_canvas_though_it_changed():
    steps = [(DRAFT + n, np.full(LENGTH, h)) for n, h in enumerate((0.5, 0.03, 0.02, 0.001, 0.0))]
    steps.append(steps[-1])
    assert done_after(steps) == 6  # all drafts differ but the last
    assert done_after(steps, certain_below=0.56) == 2  # 9 · 0.03 nats, and twice as many count
    assert done_after(steps, certain_below=0.5) == 4


def test_a_draft_that_stays_ends_a_canvas_however_unsure():
    drafts = [DRAFT, DRAFT, DRAFT + 1, DRAFT + 1, DRAFT + 1, DRAFT + 1]
    steps = [(draft, np.full(LENGTH, 0.7)) for draft in drafts]
    assert done_after(steps, stable_after=1) == 2
    assert done_after(steps, stable_after=2) == 5
    assert done_after(steps, stable_after=3) == 6


def test_the_temperature_falls_over_the_cooling_steps_and_stays():
    quick = DiffusionConfig(max_denoising_steps=10, cooling_steps=4, t_min=0.4, t_max=0.8)
    whole = DiffusionConfig(max_denoising_steps=4, t_min=0.4, t_max=0.8)
    assert [quick.temperature(n) for n in range(1, 5)] == [
        whole.temperature(n) for n in range(1, 5)
    ]
    assert [quick.temperature(n) for n in range(4, 12)] == pytest.approx([0.5] * 8)


def steps_taken(entropies, **given) -> list[int]:
    """The steps of the schedule at which the passes of a canvas are taken that changes at each."""
    model = MockModel()
    told = [(DRAFT + n % 2, np.full(LENGTH, entropy)) for n, entropy in enumerate(entropies)]
    denoiser, canvas, steps = Denoiser(model, Told([told])), canvas_of(**given), []
    while not canvas.done and len(steps) < len(entropies):
        steps.append(canvas.step)
        (canvas,) = denoiser.step([canvas], [model.make_cache().prefix])
    return steps


def test_a_canvas_leaps_over_steps_that_would_bring_it_no_further():
    assert steps_taken([0.7] * 9) == [*range(1, 10)]
    # The first pass has nothing to be compared with.
    assert steps_taken([0.7] * 9, leap_until=12) == [1, 2, 5, 8, 11, 14, 15, 16, 17]
    falling = [0.7 * 0.89**n for n in range(9)]
    assert steps_taken(falling, leap_until=12) == [*range(1, 10)]
    slowly = [0.7 * 0.91**n for n in range(5)]
    assert steps_taken(slowly, leap_until=12) == [1, 2, 5, 8, 11]
    halting = [0.7, 0.7, 0.3, 0.3, 0.1, 0.1]
    assert steps_taken(halting, leap_until=12) == [1, 2, 5, 6, 9, 10]


def test_no_leap_skips_the_last_step():
    for steps in (1, 2, 3, 4, 6, 7, 8):
        taken = steps_taken([0.7] * 9, leap_until=99, max_denoising_steps=steps)
        assert taken[-1] == steps
    assert taken == [1, 2, 5, 8]


def test_a_settled_canvas_accepts_more_from_a_step_on():
    canvas = canvas_of(4, entropy_bound=0.1, settled_bound=0.5, settled_from=4)
    canvas = replace(canvas, accepted=np.array([True, False, True, False]))
    bounds = [bound_of(replace(canvas, passes=passes)) for passes in range(5)]
    np.testing.assert_allclose(bounds, [0.1, 0.1, 0.1, 0.3, 0.3])


def test_the_certainty_that_ends_a_canvas_falls_with_the_passes():
    """What is certain late was hard, and its certainty says less."""
    steps = [(DRAFT + n, np.full(LENGTH, 0.02)) for n in range(3)]
    steps += [(DRAFT, np.full(LENGTH, 0.005)), (DRAFT, np.zeros(LENGTH))]
    assert done_after(steps, certain_below=0.185) == 1  # 9 · 0.02 nats
    assert done_after(steps[2:], certain_below=0.1) == 2  # 9 · 0.005 nats, and twice as many count
    assert done_after(steps, certain_below=0.175) == 5  # four times as many


def test_bounds_move_by_step_and_by_what_is_settled():
    canvas = canvas_of(4, max_denoising_steps=5, entropy_bound=0.1, late_bound=0.5)
    bounds = [bound_of(replace(canvas, passes=passes)) for passes in range(6)]
    np.testing.assert_allclose(bounds, [0.1, 0.18, 0.26, 0.34, 0.42, 0.42])
    canvas = canvas_of(4, entropy_bound=0.1, settled_bound=0.5)
    half = replace(canvas, accepted=np.array([True, False, True, False]))
    np.testing.assert_allclose([bound_of(canvas), bound_of(half)], [0.1, 0.3])
    assert bound_of(canvas_of(4, entropy_bound=0.3)) == 0.3


def bounds_taken(entropies, share: float) -> list[float]:
    """The bounds of the passes after those that find these entropies, each spread over a canvas."""
    model = MockModel()
    told = [(DRAFT + n % 2, np.full(LENGTH, nats / LENGTH)) for n, nats in enumerate(entropies)]
    denoiser, canvas = Denoiser(model, Told([told])), canvas_of(bound_share=share)
    bounds = [bound_of(canvas)]
    for _ in entropies:
        (canvas,) = denoiser.step([canvas], [model.make_cache().prefix])
        bounds.append(bound_of(canvas))
    return bounds


def test_a_canvas_that_comes_on_accepts_a_share_of_what_it_has_left():
    # After the fourth pass it has not lost a tenth; the last has nothing to give.
    expected = [0.1, 0.6, 0.4, 0.2, 0.1, 0.1]
    np.testing.assert_allclose(bounds_taken([30, 20, 10, 9.1, 4], 0.02), expected)
    np.testing.assert_allclose(bounds_taken([400], 0.02), [0.1, 1.0])  # no more than 1 nat
    np.testing.assert_allclose(bounds_taken([400], 0.0001), [0.1, 0.1])  # no less than the bound


def test_draws_take_the_likeliest_from_a_step_on():
    drawing = [replace(canvas_of(likeliest_from=3), passes=passes).draws for passes in range(4)]
    assert drawing == [True, True, False, False]
    assert canvas_of().draws and not canvas_of(draw_likeliest=True).draws


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_runs_grow_from_what_is_accepted_over_what_is_sure(places):
    taken, sure = (list(each) for each in zip(*places, strict=True))
    expected, grown = list(taken), True
    while grown:  # one neighbour after the other
        grown = False
        for at in range(len(places)):
            beside = any(expected[n] for n in (at - 1, at + 1) if 0 <= n < len(places))
            if sure[at] and beside and not expected[at]:
                expected[at] = grown = True
    assert along_runs(mx.array(taken), mx.array(sure)).tolist() == expected


def test_a_run_takes_the_draws_and_the_rest_noise():
    canvas = canvas_of(4, entropy_bound=0.01, run_entropy=0.3)
    entropy = mx.array([0.2, 0.0, 0.25, 2.0])
    prediction = predicted(mx.zeros(4, mx.int32), mx.array([1, 2, 3, 4]), entropy)
    proposal = entropy_bound(prediction, canvas)
    assert proposal.accepted.tolist() == [True, True, True, False]
    fresh = canvas.noise.renoise(0, 1, 4, VOCAB).tolist()
    assert proposal.tokens.tolist() == [1, 2, 3, fresh[3]]


@pytest.mark.parametrize(
    "draft, entropy",
    [
        ([1, EOS, 3, 4], [0.0, 0.0, 5.0, 5.0]),
        ([1, EOS, 3, EOS], [0.0, 1.0, 5.0, 0.0]),  # an uncertain one, then a certain one
        ([1, 2, 3, 4], [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_behind_an_eos_is_where_the_stop_rule_has_it(draft, entropy):
    config = DiffusionConfig(stop_at_eos=True, eos_token_ids=(EOS,), eos_certainty=0.1)
    draft, entropy = np.array(draft), np.array(entropy, np.float32)
    shown, _ = as_shown(config, np.where(draft == EOS, EOS, -draft), entropy)
    behind = behind_end(mx.array(draft), mx.array(entropy), (EOS,), 0.1)
    first = int(np.argmax(draft == EOS)) if EOS in draft else len(draft)
    expected = (shown == EOS) & (np.arange(len(draft)) > first) & (entropy[first:][:1] < 0.1).all()
    assert behind.tolist() == expected.tolist()


def test_what_is_behind_an_eos_takes_nothing_of_the_bound():
    entropy = mx.array([0.06, 0.0, 0.05, 0.05, 0.05])
    draft = mx.array([1, EOS, 3, 4, 5])
    prediction = predicted(draft, draft, entropy)
    given = {"entropy_bound": 0.04, "eos_token_ids": (EOS,)}
    held = entropy_bound(prediction, canvas_of(5, **given)).accepted.tolist()
    freed = entropy_bound(prediction, canvas_of(5, **given, free_behind_eos=True)).accepted
    assert held == [False, True, True, False, False]
    assert freed.tolist() == [True] * 5


def test_a_known_canvas_enters_the_schedule_where_it_is_as_noisy():
    assert [DiffusionConfig(max_denoising_steps=8).step_at(n / 8) for n in range(9)] == [
        8, 8, 7, 6, 5, 4, 3, 2, 1,
    ]  # fmt: skip
    assert DiffusionConfig(max_denoising_steps=48, cooling_steps=8).step_at(0.5) == 5
    model, told = MockModel(), Watched([[(DRAFT, np.zeros(LENGTH))] * 9])
    known = list(range(20, 20 + LENGTH))
    config = DiffusionConfig(max_denoising_steps=9, max_tokens=LENGTH)
    list(
        generate_canvases(
            model, [[1]], config, seeded(0), denoiser=Denoiser(model, told),
            initial_canvas=[known], initial_noise=1 / 3,
        )
    )  # fmt: skip
    first = told.canvases[0]
    fresh = first.noise.initial(0, LENGTH, VOCAB).tolist()
    changed = [n for n, token in enumerate(first.tokens.tolist()) if token != known[n]]
    assert first.step == 7 and 0 < len(changed) <= 3  # noise may hit upon the same token
    assert all(first.tokens[n].item() == fresh[n] for n in changed)


def test_the_encoder_is_not_asked_about_the_end_of_an_answer():
    """Nothing is encoded behind it."""
    config = DiffusionConfig(encoder_check=0.5, eos_token_ids=(EOS,))
    canvas = Canvas.start(config, SeededNoise(0), 0, LENGTH, VOCAB)
    sure = replace(canvas, draft=DRAFT, entropy=np.zeros(LENGTH, np.float32))
    assert worth_checking(sure)
    ended = np.where(np.arange(LENGTH) < LENGTH - 1, DRAFT, EOS)
    assert not worth_checking(replace(sure, draft=ended))
    assert not worth_checking(replace(sure, done=True))


class Opinionated(MockModel):
    """Its encoder finds one token improbable, wherever it stands."""

    def encode(self, ids, prefixes):
        _, longer = super().encode(ids, prefixes)
        return mx.array([token for row in ids for token in row])[:, None], longer

    def predict(self, hidden, rows, standing):
        assert [row.length for row in rows] == [hidden.shape[0]] == [standing.shape[0]]
        improbable = mx.where(standing == BAD, -9.0, -0.01)
        return SimpleNamespace(standing_log_probability=improbable)


class Watched(Told):
    """Keeps the canvases that it was handed, and expects something of every position."""

    def __init__(self, rows) -> None:
        super().__init__(rows)
        self.canvases: list[Canvas] = []

    def __call__(self, canvases, prefixes):
        self.canvases += canvases
        return [
            replace(
                passed,
                prediction=replace(passed.prediction, soft_embeddings=mx.ones((LENGTH, 2))),
            )
            for passed in super().__call__(canvases, prefixes)
        ]


def generated(steps, **given):
    model, told = Opinionated(), Watched([steps])
    given = {"max_tokens": 2 * LENGTH, "encoder_check": 0.5, **given}
    *events, finished = generate_canvases(
        model, [[1, 2]], DiffusionConfig(**given), seeded(0), denoiser=Denoiser(model, told)
    )
    assert isinstance(finished, Finished)
    committed = [event for event in events if isinstance(event, CanvasCommitted)]
    return committed, finished, model.encoded, told.canvases


def test_a_draft_that_the_encoder_confirms_is_committed_and_encoded_once():
    unsure = np.full(LENGTH, 0.1)
    committed, finished, encoded, _ = generated([(DRAFT, unsure)], check_below=1.0)
    assert [event.passes for event in committed] == [1, 1]
    assert all(event.converged for event in committed)
    assert finished.tokens == (tuple(DRAFT.tolist()) * 2,)
    assert encoded == [[1, 2], DRAFT.tolist(), DRAFT.tolist()]
    assert finished.steps == ((1, 1),) and finished.encodings == (2,)


def test_noise_replaces_a_draft_from_its_first_improbable_token_on():
    mixed = DRAFT.copy()
    mixed[[3, 6]] = BAD
    sure = np.full(LENGTH, 0.05)
    steps = [(DRAFT, np.ones(LENGTH)), (mixed, sure), (mixed, sure), (DRAFT, sure)]
    committed, finished, encoded, seen = generated(steps, max_tokens=LENGTH, check_below=1.0)
    assert committed[0].passes == 4 and finished.encodings == (2,)
    # The first draft is too unsure to ask about; the refused one is not asked about again.
    assert encoded[1:] == [mixed.tolist(), DRAFT.tolist()]
    after = seen[2]
    fresh = after.noise.renoise(0, 2, LENGTH, VOCAB).tolist()
    assert after.tokens.tolist() == [*mixed[:3].tolist(), *fresh[3:]]
    assert after.soft_embeddings[:, 0].tolist() == [1.0] * 3 + [0.0] * (LENGTH - 3)


def test_only_what_is_counted_is_checked():
    improbable = np.log([0.9, 0.1, 0.9])
    every = np.ones(4, bool)
    assert first_improbable(improbable, 0.5, every) == 2
    assert first_improbable(improbable, 0.05, every) is None
    assert first_improbable(np.log([0.9, np.nan, 0.9]), 0.5, every) == 2
    pinned = np.array([True, True, False, True])
    assert first_improbable(improbable, 0.5, pinned) is None


def test_a_profile_in_a_file_is_for_the_model_that_it_was_made_for(tmp_path):
    path = tmp_path / "mine.json"
    save_profile(path, {"certain_below": 0.3, "t_min": 0.9}, "this model", {"rule": "sure"})
    assert profile_settings(str(path), lambda: "this model") == {
        "certain_below": 0.3,
        "t_min": 0.9,
    }
    with pytest.raises(UsageError, match="another model"):
        profile_settings(str(path), lambda: "that model")
    path.write_text(path.read_text().replace("certain_below", "certain_bellow"))
    with pytest.raises(UsageError, match="certain_bellow"):
        profile_settings(str(path))
    path.write_text("{}")
    with pytest.raises(UsageError, match="is no profile"):
        profile_settings(str(path))
    with pytest.raises(UsageError, match="cannot be read"):
        profile_settings(str(tmp_path / "other.json"))

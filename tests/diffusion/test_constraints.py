"""What a canvas must hold, under every sampler and every profile."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_model import MockModel

from mlx_diffgemma.diffusion.canvas import Canvas, Passed, Prediction
from mlx_diffgemma.diffusion.config import SAMPLERS, DiffusionConfig
from mlx_diffgemma.diffusion.constraints import FREE, Layout, token_mask
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.diffusion.events import DenoisingStep
from mlx_diffgemma.diffusion.generate import generate_canvases
from mlx_diffgemma.diffusion.noise import SeededNoise, seeded
from mlx_diffgemma.diffusion.profiles import PROFILES, profile_settings
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.kernels.allowed_tokens import every_token, unpack_allowed, words_of
from mlx_diffgemma.kernels.vocabulary import Row

VOCAB, LENGTH, PATTERNS = 41, 11, 40
RUNS = [(sampler, profile) for sampler in SAMPLERS for profile in PROFILES]


class RandomPredict:
    """Logits that depend on the canvas, restricted as the model's are."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.table = mx.array(rng.normal(0, 3, (VOCAB, VOCAB)).astype(np.float32))
        self.calls = 0

    def __call__(self, canvases, prefixes):
        self.calls += 1
        tokens = mx.stack([canvas.tokens for canvas in canvases])
        logits = self.table[tokens] + mx.roll(self.table[tokens], 1, axis=1)
        temperatures = mx.array([canvas.temperature for canvas in canvases])
        processed = mx.where(self.may(canvases), logits / temperatures[:, None, None], -mx.inf)
        draw = mx.stack([
            mx.random.categorical(row, key=canvas.noise.draw_key(canvas.index, canvas.step))
            for row, canvas in zip(processed, canvases, strict=True)
        ]).astype(mx.int32)  # fmt: skip
        log_p = processed - mx.logsumexp(processed, axis=-1, keepdims=True)
        drawn = mx.take_along_axis(log_p, draw[..., None], axis=-1)[..., 0]
        entropy = -mx.where(log_p == -mx.inf, 0.0, mx.exp(log_p) * log_p).sum(axis=-1)
        argmax = mx.argmax(processed, axis=-1).astype(mx.int32)
        zeros, best = mx.zeros(entropy.shape), mx.exp(log_p.max(axis=-1))
        return [
            Passed(Prediction(*row, soft, zeros[0]))
            for row, soft in zip(
                zip(argmax, best, draw, entropy, mx.exp(drawn), strict=True),
                mx.zeros((*tokens.shape, 2)),
                strict=True,
            )
        ]

    def may(self, canvases) -> mx.array:
        """[R, C, V] what each position may hold, said in another way than the layouts do."""
        may = np.ones((len(canvases), len(canvases[0]), VOCAB), bool)
        for row, canvas in enumerate(canvases):
            words = words_of(canvas.layout.allowed, len(canvas), VOCAB)
            may[row] = np.array(unpack_allowed(mx.array(words), VOCAB))
            fixed = canvas.layout.fixed
            may[row, fixed != FREE] = np.eye(VOCAB, dtype=bool)[fixed[fixed != FREE]]
        return mx.array(may)


def random_layouts(rng: np.random.Generator, rows: int, length: int, vocab: int):
    """Layouts that differ in how much is fixed, and in how much of the rest is restricted; and
    [rows, length, vocab] what they allow at positions that are not fixed, or None."""
    fixed = rng.integers(0, vocab, (rows, length))
    fixed[rng.random((rows, length)) > rng.random((rows, 1))] = FREE
    bits = rng.random((rows, length, vocab)) < rng.random((rows, length, 1))
    bits |= rng.random((rows, length, 1)) < 0.3
    bits[..., 0] |= ~bits.any(axis=-1)
    free = rng.random() < 0.3
    layouts = [
        Layout(
            tuple(fixed[row].tolist()),
            {}
            if free
            else {
                place: token_mask(np.flatnonzero(bits[row, place]), vocab)
                for place in range(length)
            },
        )
        for row in range(rows)
    ]
    return layouts, None if free else bits


def check_run(denoiser, prefixes, config, layouts, bits, vocab, seed):
    """Run canvases, and hold every step of them against their layouts."""
    length = len(layouts[0].tokens)
    canvases = {
        row: Canvas.start(config, SeededNoise(seed, row), 0, length, vocab, layout=layout)
        for row, layout in enumerate(layouts)
    }
    for row, canvas in canvases.items():
        pinned = layouts[row].fixed != FREE
        assert (np.array(canvas.tokens)[pinned] == layouts[row].fixed[pinned]).all()
    passes = 0
    while canvases:
        rows = list(canvases)
        stepped = denoiser.step(list(canvases.values()), [prefixes[row] for row in rows])
        passes += 1
        for row, canvas in zip(rows, stepped, strict=True):
            fixed, pinned = layouts[row].fixed, layouts[row].fixed != FREE
            assert (canvas.draft[pinned] == fixed[pinned]).all()
            assert (np.array(canvas.tokens)[pinned] == fixed[pinned]).all()
            assert canvas.accepted[pinned].all()
            assert (canvas.entropy[pinned] == 0).all()
            if bits is not None:
                (places,) = np.nonzero(~pinned)
                assert bits[row, places, canvas.draft[places]].all()
                drawn = places[canvas.accepted[places]]
                if config.sampler != "ddim":  # it may take a random token for a draw, or stay
                    assert bits[row, drawn, np.array(canvas.tokens)[drawn]].all()
            canvases[row] = canvas
        canvases = {row: canvas for row, canvas in canvases.items() if not canvas.done}
    assert 1 <= passes <= config.max_denoising_steps


@pytest.mark.parametrize(("sampler", "profile"), RUNS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_sampler_and_no_profile_breaks_a_constraint(sampler, profile, seed):
    """5 batches of 40 random patterns for each of at least 12 runs: 2,400 patterns or more."""
    rng = np.random.default_rng(seed)
    chosen = profile_settings(profile) | {"sampler": sampler, "max_denoising_steps": 5}
    chosen["confident_after"] = 3 if chosen.get("confident_after") else None
    config = DiffusionConfig(eos_token_ids=(1, 5)).override(**chosen)
    layouts, bits = random_layouts(rng, PATTERNS, LENGTH, VOCAB)
    denoiser, none = random_denoiser(seed)
    check_run(denoiser, [none] * PATTERNS, config, layouts, bits, VOCAB, seed)


@pytest.mark.parametrize(("sampler", "profile"), RUNS)
def test_the_model_keeps_to_a_constraint(tiny_model, sampler, profile):
    model = tiny_model(3)
    vocab, length = model.config.text.vocab_size, model.config.canvas_length
    rng = np.random.default_rng(11)
    prompts = rng.integers(0, vocab, (3, 6)).tolist()
    prefixes = model.encode(prompts, [model.empty_prefix()] * 3)[1]
    chosen = profile_settings(profile) | {"sampler": sampler, "max_denoising_steps": 3}
    config = DiffusionConfig(eos_token_ids=(1, 5)).override(**chosen)
    layouts, bits = random_layouts(rng, 3, length, vocab)
    check_run(Denoiser(model), prefixes, config, layouts, bits, vocab, seed=1)


def random_denoiser(seed: int, scale: float = 1.0):
    """A denoiser with random logits, and a prefix that it does not look at."""
    model, predict = MockModel(), RandomPredict(seed)
    predict.table = predict.table * scale
    return Denoiser(model, predict), model.make_cache().prefix


def steps_of(denoiser, prefix, canvas: Canvas) -> list[Canvas]:
    """A canvas after every pass until it is done."""
    steps = []
    while not canvas.done:
        (canvas,) = denoiser.step([canvas], [prefix])
        steps.append(canvas)
    return steps


def test_a_late_start_takes_the_rest_of_the_schedule():
    config = DiffusionConfig(max_denoising_steps=8, stability_threshold=8)
    canvas = Canvas.start(
        config, SeededNoise(0), 0, LENGTH, VOCAB, layout=Layout((FREE,) * LENGTH), first_step=6
    )
    temperatures = [canvas.temperature]
    steps = steps_of(*random_denoiser(0), canvas)
    temperatures += [step.temperature for step in steps[:-1]]
    assert [step.passes for step in steps] == [1, 2, 3]
    assert temperatures == pytest.approx([0.55, 0.5, 0.45])
    assert [step.is_last_step for step in (canvas, *steps[:-1])] == [False, False, True]


def test_a_confidence_sampler_always_accepts_a_free_position():
    """However many positions are fixed, and so certain."""
    fixed = [3] * LENGTH
    fixed[4:7] = [FREE] * 3
    config = DiffusionConfig(
        sampler="confidence-threshold", accept_threshold=0.999999, max_denoising_steps=3,
        stability_threshold=3,
    )  # fmt: skip
    canvas = Canvas.start(config, SeededNoise(2), 0, LENGTH, VOCAB, layout=Layout(tuple(fixed)))
    steps = steps_of(*random_denoiser(1), canvas)
    assert len(steps) == 3
    assert all(step.accepted[4:7].any() for step in steps)


def test_fixed_positions_take_no_share_of_block_refinement():
    """Nor do they on the steps after the first, when they count as accepted."""
    fixed = tuple([3] * 5 + [FREE] * 6)
    config = DiffusionConfig(
        sampler="block-refinement", accept_threshold=2.0, max_denoising_steps=4,
        stability_threshold=9,
    )  # fmt: skip
    canvas = Canvas.start(config, SeededNoise(2), 0, LENGTH, VOCAB, layout=Layout(fixed))
    steps = steps_of(*random_denoiser(1), canvas)
    assert [int(step.accepted[5:].sum()) for step in steps] == [3, 6, 6, 6]


def test_fixed_positions_do_not_count_in_the_stop_rule():
    """One open position that is never certain keeps a canvas going, whatever surrounds it."""
    fixed = (FREE, *[3] * (LENGTH - 1))
    config = DiffusionConfig(max_denoising_steps=6, confidence_threshold=1.0, stability_threshold=0)
    # Nearly uniform: ln 41 / 11 = 0.34 nats on average.
    denoiser, prefix = random_denoiser(4, scale=0.05)
    canvas = Canvas.start(config, SeededNoise(2), 0, LENGTH, VOCAB, layout=Layout(fixed))
    assert len(steps_of(denoiser, prefix, canvas)) == 6


def test_a_canvas_held_to_another_layout_keeps_to_that_one():
    denoiser, prefix = random_denoiser(4)
    config = DiffusionConfig(max_denoising_steps=6, stability_threshold=9)
    canvas = Canvas.start(config, SeededNoise(2), 0, LENGTH, VOCAB)
    (canvas,) = denoiser.step([canvas.under(Layout((7, *[FREE] * 10)))], [prefix])
    assert canvas.tokens[0].item() == canvas.draft[0] == 7
    canvas = canvas.under(Layout((FREE, 9, *[FREE] * 9)))
    assert canvas.tokens[:2].tolist() == [7, 9]
    (canvas,) = denoiser.step([canvas], [prefix])
    assert canvas.draft[1] == canvas.tokens[1].item() == 9


def test_a_pass_of_the_model_equals_a_loop_over_tokens(tiny_model):
    """Of every token the model says what its logits say, and nothing of those not allowed."""
    model = tiny_model(3, vocab_size=70)
    rng = np.random.default_rng(8)
    layouts, bits = random_layouts(rng, 6, 5, 70)
    while bits is None:
        layouts, bits = random_layouts(rng, 6, 5, 70)
    hidden = mx.random.normal((6 * 5, model.config.text.hidden_size), key=mx.random.key(0))
    logits = np.array(model.logits(hidden)).astype(np.float64).reshape(6, 5, 70)
    for token in range(70):
        rows = [Row(5, 0.7, None, each.fixed, each.allowed, need_soft=False) for each in layouts]
        seen = model.predict(hidden, rows, mx.full((30,), token, mx.int32))
        found = np.array(seen.standing_log_probability).reshape(6, 5)
        for row, place in np.ndindex(6, 5):
            if layouts[row].fixed[place] != FREE:
                assert found[row, place] == 0  # what is fixed is certain, whatever is asked about
            elif bits[row, place, token]:
                kept = logits[row, place][bits[row, place]] / 0.7
                log_sum = kept.max() + np.log(np.exp(kept - kept.max()).sum())
                expected = logits[row, place, token] / 0.7 - log_sum
                assert found[row, place] == pytest.approx(expected, abs=2e-4)
            else:
                assert found[row, place] < -1e3


def test_words_of_a_layout():
    few = token_mask([2, 40], VOCAB)
    layout = Layout((FREE, FREE, 7), {1: few})
    words = words_of(layout.allowed, 3, VOCAB)
    assert words.shape == (3, 2)
    assert (words[0] == every_token(VOCAB)).all()
    assert (words[0] == token_mask(range(VOCAB), VOCAB)).all()
    assert (words[1] == few).all()
    assert layout.open.tolist() == [True, True, False]
    assert layout.pin(mx.array([5, 5, 5])).tolist() == [5, 5, 7]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout((FREE,) * 4), "the layout has 4 positions; the canvas 3."),
        (Layout((FREE,) * 2), "the layout has 2 positions; the canvas 3."),
        (Layout((0, 50, 0)), "outside the vocabulary of 41."),
        (Layout((0, -2, 0)), "outside the vocabulary of 41."),
        (
            Layout((FREE,) * 3, {1: np.zeros(1, np.uint32)}),
            "allowed at position 1 has 1 words; a canvas of 3 and a vocabulary of 41 need 2",
        ),
        (
            Layout((FREE,) * 3, {3: np.ones(2, np.uint32)}),
            "allowed at position 3 has 2 words; a canvas of 3 and a vocabulary of 41 need 2",
        ),
        (
            Layout((FREE,) * 3, {0: np.zeros(2, np.uint32)}),
            "position 0 allows no token at all.",
        ),
    ],
)
def test_errors_say_what_does_not_fit(layout, message):
    canvas = Canvas.start(DiffusionConfig(), SeededNoise(0), 0, 3, VOCAB)
    for tried in (
        lambda: layout.check(3, VOCAB),
        lambda: Canvas.start(DiffusionConfig(), SeededNoise(0), 0, 3, VOCAB, layout=layout),
        lambda: canvas.under(layout),
    ):
        with pytest.raises(UsageError) as error:
            tried()
        assert message in str(error.value)


def test_a_fixed_position_may_have_an_empty_set():
    Layout((3, FREE, FREE), {0: np.zeros(2, np.uint32)}).check(3, VOCAB)


def test_only_the_first_canvas_may_not_begin_with_an_end(tiny_model):
    model = tiny_model(3, vocab_size=70)
    ends = tuple(range(5, 70))
    settings = DiffusionConfig(max_tokens=64, max_denoising_steps=2, eos_token_ids=ends)

    def first_tokens(**how) -> list[tuple[int, int]]:
        """The number of each canvas, and the token that its draft begins with."""
        config = settings.override(**how)
        found = []
        for event in generate_canvases(model, [[7, 8, 9]] * 6, config, seeded(1)):
            if isinstance(event, DenoisingStep) and event.canvas.done:
                found.append((event.canvas.index, int(event.canvas.draft[0])))
        return found

    assert all(token in ends for _, token in first_tokens())
    for sampler in SAMPLERS:
        said = first_tokens(forbid_empty=True, sampler=sampler)
        assert len(said) >= 6
        assert all(token not in ends for index, token in said if index == 0)
    later = first_tokens(forbid_empty=True, eos_token_ids=tuple(range(1, 70)), canvas_length=1)
    assert {token for index, token in later if index == 0} == {0}
    assert any(token in ends for index, token in later if index == 1)


def test_a_constraint_alone_says_how_an_answer_begins():
    """A fixed eos at the first position is an empty answer, and it is what was asked for."""
    model = MockModel()
    layout = Layout((1, *[FREE] * (LENGTH - 1)))
    config = DiffusionConfig(
        max_tokens=20, max_denoising_steps=3, canvas_length=LENGTH, eos_token_ids=(1,),
        forbid_empty=True,
    )  # fmt: skip
    events = generate_canvases(
        model, [[7]], config, seeded(0), denoiser=Denoiser(model, RandomPredict(0)),
        constrain=lambda row, index: layout,
    )  # fmt: skip
    *_, finished = events
    assert finished.tokens == ((),)

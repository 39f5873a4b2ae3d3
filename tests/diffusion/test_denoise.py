"""The denoising loop beside a naive one, on a mock model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from mock_model import LENGTH, VOCAB, MockModel, MockPredict, naive_generate, states_of

from mlx_diffgemma.diffusion.canvas import Canvas
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.diffusion.events import (
    CanvasCommitted,
    DenoisingStep,
    Finished,
    PrefillProgress,
    SequenceFailed,
)
from mlx_diffgemma.diffusion.generate import cut, generate_canvases
from mlx_diffgemma.diffusion.noise import SeededNoise, seeded
from mlx_diffgemma.errors import NumericalError, UsageError

PROMPTS = [[3, 8, 8, 20], [11], [30, 2, 9, 9, 9, 17, 4]]


def run(prompts, settings, seed=0, predict=None, noise=None, model=None, **more):
    model = model or MockModel()
    denoiser = Denoiser(model, predict or MockPredict())
    noise = noise or seeded(seed)
    return list(generate_canvases(model, prompts, settings, noise, denoiser=denoiser, **more))


def of(events, kind):
    return [event for event in events if isinstance(event, kind)]


def settings(**changes) -> DiffusionConfig:
    defaults = {
        "max_tokens": 3 * LENGTH,
        "max_denoising_steps": 12,
        "confidence_threshold": 0.2,
        "entropy_bound": 0.5,
    }
    return DiffusionConfig(**{**defaults, **changes})


@pytest.mark.parametrize("stability", [0, 1, 2, 3])
def test_equals_the_naive_loop(stability):
    config = settings(
        stability_threshold=stability,
        confidence_threshold=0.5,
        max_denoising_steps=20,
        eos_token_ids=(5, 6),
        max_tokens=25,
    )
    early = sum(beside_the_naive_loop(config, seed) for seed in range(5))
    assert early > 0  # the stop rule had its say


def beside_the_naive_loop(config: DiffusionConfig, seed: int) -> int:
    """Compare every step of a batch; returns how many canvases were done before the last step."""
    predict = MockPredict(seed)
    events = run(PROMPTS, config, seed, predict)
    finished, early = events[-1], 0
    assert isinstance(finished, Finished)
    for row, prompt in enumerate(PROMPTS):
        tokens, reason, history = naive_generate(predict, prompt, config, seed, row)
        assert list(finished.tokens[row]) == tokens
        assert finished.finish_reasons[row] == reason
        assert list(finished.steps[row]) == [len(steps) for steps in history]
        seen = 0
        for event in of(events, DenoisingStep):
            if event.row != row:
                continue
            after = event.canvas
            steps = history[after.index]
            draft, accepted, canvas = steps[after.passes - 1]
            assert after.draft.tolist() == draft
            assert after.accepted.tolist() == accepted
            np.testing.assert_allclose(after.probability, np.exp(-after.entropy / 2), rtol=1e-6)
            assert after.tokens.tolist() == canvas
            assert after.done == (after.passes == len(steps))
            if after.passes < config.max_denoising_steps:
                assert after.converged == after.done
            seen += 1
        assert seen == sum(map(len, history))
        early += sum(len(steps) < config.max_denoising_steps for steps in history)
    return early


def test_stability_threshold_counts_previous_steps():
    """With one sure prediction, the canvas is done after threshold + 1 steps."""

    class Sure(MockPredict):
        def row(self, prefix, canvas, soft, temperature, key):
            argmax, draw, entropy, soft = super().row(prefix, canvas, soft, temperature, key)
            return np.full_like(argmax, 7), draw, np.zeros_like(entropy), soft

    for threshold in range(5):
        events = run([[3]], settings(stability_threshold=threshold, max_tokens=1), predict=Sure())
        assert events[-1].steps == ((threshold + 1,),)


@pytest.mark.parametrize("stability", [0, 1, 2])
def test_confidence_is_needed_too(stability):
    class Doubtful(MockPredict):
        def row(self, prefix, canvas, soft, temperature, key):
            argmax, draw, entropy, soft = super().row(prefix, canvas, soft, temperature, key)
            return np.full_like(argmax, 7), draw, np.full_like(entropy, 0.2), soft

    at = settings(stability_threshold=stability, confidence_threshold=0.2, max_tokens=1)
    assert run([[3]], at, predict=Doubtful())[-1].steps == ((12,),)
    above = at.override(confidence_threshold=0.21)
    assert run([[3]], above, predict=Doubtful())[-1].steps == ((stability + 1,),)


def test_the_prediction_knows_the_last_step():
    class Told(MockPredict):
        def __init__(self) -> None:
            super().__init__()
            self.told: list[bool] = []

        def __call__(self, canvases, prefixes):
            self.told += [canvas.is_last_step for canvas in canvases]
            return super().__call__(canvases, prefixes)

    told = Told()
    run([[3]], settings(stability_threshold=99, max_tokens=1), predict=told)
    assert told.told == [False] * 11 + [True]


def test_rows_are_independent():
    """A sequence of a batch gets what it gets alone, to the bit, with the same noise."""
    config = settings(eos_token_ids=(5, 6))
    together = run(PROMPTS, config, 4)
    for row, prompt in enumerate(PROMPTS):
        events = run([prompt], config, noise=lambda _, row=row: SeededNoise(4, row))
        assert events[-1].tokens[0] == together[-1].tokens[row]
        assert events[-1].steps[0] == together[-1].steps[row]
        own = [event.canvas for event in of(together, DenoisingStep) if event.row == row]
        alone = [event.canvas for event in of(events, DenoisingStep)]
        for one, other in zip(alone, own, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.entropy.tolist() == other.entropy.tolist()


def test_rows_are_independent_on_the_model(tiny_model):
    model = tiny_model(3, gain=4.0)
    prompts = [[9, 10, 11], list(range(7, 40)), [50]]
    config = DiffusionConfig(max_tokens=model.config.canvas_length + 5, max_denoising_steps=4)
    together = list(generate_canvases(model, prompts, config, seeded(0)))[-1]
    first = list(generate_canvases(model, prompts[:1], config, seeded(0)))[-1]
    assert first.tokens[0] == together.tokens[0]
    swapped = list(generate_canvases(model, [prompts[0], prompts[2]], config, seeded(0)))[-1]
    assert swapped.tokens[0] == together.tokens[0]


@pytest.mark.parametrize("max_tokens", range(1, 3 * LENGTH + 1))
def test_max_tokens_is_honoured_to_the_token(max_tokens):
    model = MockModel()
    config = settings(max_tokens=max_tokens, max_denoising_steps=2)
    finished = run(PROMPTS, config, model=model)[-1]
    longest = run(PROMPTS, settings(max_denoising_steps=2))[-1]
    assert finished.tokens == tuple(tokens[:max_tokens] for tokens in longest.tokens)
    assert finished.finish_reasons == ("length",) * 3
    canvases = -(-max_tokens // LENGTH)
    assert [len(steps) for steps in finished.steps] == [canvases] * 3
    assert len(model.encoded) == 3 * (1 + canvases - 1)  # the last canvas is not encoded


@pytest.mark.parametrize(
    "canvas, room, expected",
    [
        ([4, 5, 6], 9, ([4, 5, 6], None)),
        ([4, 5, 6], 3, ([4, 5, 6], "length")),
        ([4, 5, 6], 2, ([4, 5], "length")),
        ([4, 1, 6], 9, ([4], "stop")),
        ([4, 1, 2], 9, ([4], "stop")),
        ([2, 1, 1], 9, ([], "stop")),
        ([4, 5, 1], 3, ([4, 5], "stop")),
        ([4, 5, 1], 2, ([4, 5], "length")),
    ],
)
def test_cut(canvas, room, expected):
    assert cut(canvas, (1, 2), room) == expected


def test_eos_ends_only_its_own_sequence():
    """Rows end at different canvases; the others go on and are encoded alone."""
    tried = 0
    for seed in range(30):
        model = MockModel()
        events = run(PROMPTS, settings(eos_token_ids=(5,)), seed, MockPredict(seed), model=model)
        canvases = [len(steps) for steps in events[-1].steps]
        going = [sum(count > index for count in canvases) for index in range(max(canvases))]
        committed = of(events, CanvasCommitted)
        for index, count in enumerate(going):
            assert sum(event.canvas_index == index for event in committed) == count
        assert len(model.encoded) == 3 + sum(going[1:])
        goes_on = [list(event.tokens) for event in committed if event.finish_reason is None]
        assert model.encoded == [*PROMPTS, *goes_on]
        for row, (tokens, reason) in enumerate(
            zip(events[-1].tokens, events[-1].finish_reasons, strict=True)
        ):
            assert 5 not in tokens
            assert (reason == "length") == (len(tokens) == 3 * LENGTH)
            assert events[-1].stop_tokens[row] == (5 if reason == "stop" else None)
        tried += len(set(canvases)) > 1
    assert tried >= 5


def test_events_in_order_with_their_shapes():
    events = run(PROMPTS, settings(max_denoising_steps=3, max_tokens=LENGTH + 1))
    kinds = [type(event) for event in events]
    assert kinds[:6] == [PrefillProgress] * 6
    assert [(e.row, e.done, e.total) for e in of(events, PrefillProgress)] == [
        (row, done, len(prompt)) for row, prompt in enumerate(PROMPTS) for done in (0, len(prompt))
    ]
    one = [DenoisingStep] * 3 * 2 + [DenoisingStep, CanvasCommitted] * 3
    assert kinds[6:] == [*one, *one, Finished]
    for number, event in enumerate(of(events, DenoisingStep)):
        canvas = event.canvas
        canvas_index, step = divmod(number // 3, 3)
        assert (event.row, canvas.index, canvas.passes) == (number % 3, canvas_index, step + 1)
        assert canvas.settings.max_denoising_steps == 3
        assert canvas.settings.temperature(canvas.passes) == pytest.approx(
            [0.8, 0.4 + 0.4 * 2 / 3, 0.4 + 0.4 / 3][step]
        )
        for name in ("draft", "tokens", "entropy", "accepted"):
            assert getattr(canvas, name).shape == (LENGTH,)
        assert np.issubdtype(canvas.draft.dtype, np.integer)
        assert np.issubdtype(np.array(canvas.tokens).dtype, np.integer)
        assert canvas.entropy.dtype == np.float32
        assert canvas.accepted.dtype == bool
        assert canvas.done == (step == 2)
    committed = of(events, CanvasCommitted)
    assert [event.row for event in committed] == [0, 1, 2] * 2
    assert [event.canvas_index for event in committed] == [0] * 3 + [1] * 3
    assert [event.passes for event in committed] == [3] * 6
    assert [len(event.tokens) for event in committed] == [LENGTH] * 3 + [1] * 3
    assert [event.finish_reason for event in committed] == [None] * 3 + ["length"] * 3
    drafts = [event.canvas.draft.tolist() for event in of(events, DenoisingStep)[6:9]]
    assert [list(event.tokens) for event in committed[:3]] == drafts


def test_first_draft_arrives_after_one_step():
    """The loop is lazy: but for the one step that is queued, nothing is computed ahead of who reads
    it, and nothing at all before the first step is asked for."""
    predict = MockPredict(peak=0)
    model = MockModel()
    stream = generate_canvases(
        model, PROMPTS, settings(), seeded(0), denoiser=Denoiser(model, predict)
    )
    assert predict.calls == 0
    assert not model.encoded
    calls = []
    for event in stream:
        if isinstance(event, PrefillProgress):
            assert predict.calls == 0
        if isinstance(event, DenoisingStep):
            calls.append(predict.calls)
    assert calls == [min(step + 1, 36) for step in range(1, 37) for _ in PROMPTS]


def test_prefill_in_chunks_is_the_same_prompt():
    model = MockModel()
    events = run(PROMPTS, settings(max_tokens=1), model=model, prefill_step_size=3)
    assert [(e.row, e.done, e.total) for e in of(events, PrefillProgress)] == [
        (0, 0, 4),
        (0, 3, 4),
        (0, 4, 4),
        (1, 0, 1),
        (1, 1, 1),
        (2, 0, 7),
        (2, 3, 7),
        (2, 6, 7),
        (2, 7, 7),
    ]
    first, second, third = PROMPTS
    chunks = [first[:3], first[3:], second, third[:3], third[3:6], third[6:]]
    assert model.encoded == chunks


def test_prefill_can_be_left_between_chunks():
    """What is left is a shorter prefix, and a true one; the next run goes on from there."""
    for chunks in range(4):
        model = MockModel()
        cache = model.make_cache()
        stream = generate_canvases(
            model, PROMPTS[2:], settings(), seeded(0), caches=[cache], prefill_step_size=3
        )
        for _ in range(chunks + 1):
            event = next(stream)
        stream.close()
        assert event.done == len(cache.prefix) == min(3 * chunks, 7)
        assert states_of(cache.prefix) == list(cache.prefix.ids) == PROMPTS[2][: event.done]
        before = len(model.encoded)
        again = run(PROMPTS[2:], settings(), model=model, caches=[cache])
        assert again[-1].tokens == run(PROMPTS[2:], settings())[-1].tokens
        assert sum(map(len, model.encoded[before:])) == 7 - event.done + 2 * LENGTH


def test_continues_a_given_cache():
    model = MockModel()
    cache = model.make_cache()
    config = settings(max_tokens=LENGTH)
    run([[4, 6]], config, model=model, caches=[cache])
    assert cache.prefix.ids == (4, 6)
    finished = run([[4, 6, 8, 9]], config, seed=1, model=model, caches=[cache])[-1]
    assert cache.prefix.ids == (4, 6, 8, 9)
    assert model.encoded == [[4, 6], [8, 9]]
    whole = run([[4, 6, 8, 9]], config, seed=1)[-1]
    assert finished.tokens == whole.tokens


def test_a_cache_for_each_sequence():
    """Prompts of unequal length with given caches are each continued from their own."""
    model = MockModel()
    caches = [model.make_cache() for _ in PROMPTS]
    config = settings(max_tokens=2 * LENGTH)
    longer = [[*prompt, 7, 12] for prompt in PROMPTS]
    run(PROMPTS, config, model=model, caches=caches)
    model.encoded.clear()
    again = run(longer, config, seed=1, model=model, caches=caches)[-1]
    assert model.encoded[:3] == [[7, 12]] * 3
    assert again == run(longer, config, seed=1)[-1]
    for cache, prompt, tokens in zip(caches, longer, again.tokens, strict=True):
        assert list(cache.prefix.ids) == [*prompt, *tokens[:LENGTH]] == states_of(cache.prefix)


def test_tokens_of_the_cache_are_prompt_and_committed_canvases():
    model = MockModel()
    cache = model.make_cache()
    finished = run([[4, 6]], settings(), model=model, caches=[cache])[-1]
    assert list(cache.prefix.ids) == [4, 6, *finished.tokens[0][: 2 * LENGTH]]
    assert states_of(cache.prefix) == list(cache.prefix.ids)


@pytest.mark.parametrize("at", [1, 4, 14])
def test_a_cache_of_a_broken_run_is_true(at):
    model = MockModel()
    cache = model.make_cache()
    with pytest.raises(NumericalError):
        run([[4, 6]], settings(), predict=MockPredict(0, 0, at), model=model, caches=[cache])
    assert states_of(cache.prefix) == list(cache.prefix.ids)
    assert (
        run([[4, 9]], settings(), model=model, caches=[cache])[-1] == run([[4, 9]], settings())[-1]
    )


@pytest.mark.parametrize("at", [1, 4, 14])
def test_values_that_are_not_finite_stop_with_the_step_named(at):
    predict = MockPredict(peak=0, nan_at=at)
    with pytest.raises(NumericalError) as error:
        run(PROMPTS, settings(), predict=predict)
    canvas, step = divmod(at - 1, 12)
    assert str(error.value) == (
        f"prompt 3, canvas {canvas + 1}, step {step + 1}: the model returned NaN or infinity; "
        "its weights may be damaged (load them with check=True, or add --check)."
    )
    with pytest.raises(NumericalError) as error:
        run(PROMPTS[:1], settings(), predict=MockPredict(peak=0, nan_at=at))
    assert str(error.value).startswith(f"canvas {canvas + 1}, step {step + 1}: the model ")


@pytest.mark.parametrize("at", [1, 4, 14])
def test_a_sequence_may_fail_by_itself(at):
    """The others become what they become without it."""
    sound = run(PROMPTS, settings(), predict=MockPredict(peak=0))[-1]
    events = run(PROMPTS, settings(), predict=MockPredict(peak=0, nan_at=at), keep_sound=True)
    (failed,) = of(events, SequenceFailed)
    canvas, step = divmod(at - 1, 12)
    assert failed.row == 2
    assert str(failed.error).startswith(f"prompt 3, canvas {canvas + 1}, step {step + 1}: ")
    finished = events[-1]
    assert finished.finish_reasons == ("length", "length", "error")
    assert finished.tokens == (*sound.tokens[:2], sound.tokens[2][: canvas * LENGTH])
    assert not of(events[events.index(failed) :], PrefillProgress)
    later = of(events[events.index(failed) :], DenoisingStep)
    assert {event.row for event in later} == {0, 1}
    (alone,) = of(run(PROMPTS[:1], settings(), predict=MockPredict(nan_at=at), keep_sound=True),
                  SequenceFailed)  # fmt: skip
    assert alone.row == 0


def test_damaged_weights_stop_at_the_first_step(tiny_model):
    model = tiny_model(1)
    model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    with pytest.raises(NumericalError, match=r"^canvas 1, step 1: "):
        list(generate_canvases(model, [[9, 10]], DiffusionConfig(), seeded(0)))


def test_initial_canvas_is_used_once():
    predict = MockPredict(peak=0)
    start = (np.arange(3 * LENGTH).reshape(3, LENGTH) % VOCAB).tolist()
    run(PROMPTS, settings(), predict=predict, initial_canvas=start)
    assert predict.canvases[0] == start
    second = [SeededNoise(0, row).initial(1, LENGTH, VOCAB).tolist() for row in range(3)]
    assert predict.canvases[12] == second


def test_initial_canvas_of_a_wrong_length():
    with pytest.raises(UsageError) as error:
        run(PROMPTS, settings(), initial_canvas=[[0] * LENGTH, [0] * LENGTH, [0] * (LENGTH + 1)])
    assert str(error.value) == (
        f"initial_canvas has {LENGTH + 1} tokens, and the canvas has {LENGTH}; give as many."
    )


def test_initial_canvases_of_a_wrong_number():
    for count in (2, 4):
        with pytest.raises(UsageError) as error:
            run(PROMPTS, settings(), initial_canvas=[[0] * LENGTH] * count)
        assert str(error.value) == (
            f"initial_canvas has {count} canvases; there are 3 prompts, and each takes one."
        )


@pytest.mark.parametrize("token", [VOCAB, -1, 2**30])
def test_initial_canvas_of_ids_from_outside(token):
    start = [0] * (LENGTH - 2) + [token, 0]
    with pytest.raises(UsageError) as error:
        run(PROMPTS[:1], settings(), initial_canvas=[start])
    assert str(error.value) == (
        f"initial_canvas: token {LENGTH - 2} is {token}; ids go from 0 to {VOCAB - 1}."
    )


@pytest.mark.parametrize("steps", [1, 2, 48])
def test_step_cap(steps):
    predictor = MockPredict(peak=0)
    finished = run([[3]], settings(max_denoising_steps=steps), predict=predictor)[-1]
    assert finished.steps == ((steps,) * 3,)
    assert predictor.calls == 3 * steps


def test_seeds_repeat_and_differ():
    def tokens(seed):
        predictor = MockPredict(peak=0.3)
        return run(PROMPTS, settings(max_denoising_steps=3), seed, predictor)[-1].tokens

    assert tokens(1) == tokens(1)
    assert len({tokens(seed) for seed in range(8)}) == 8


def test_a_row_that_is_done_takes_no_further_step():
    """Its draft is committed as it stood; the others go on, and its next canvas joins them."""
    kept = joined = 0
    for seed in range(6):
        done: dict[tuple[int, int], list[int]] = {}
        events = run(PROMPTS, settings(), seed, MockPredict(seed))
        for event in of(events, DenoisingStep):
            name = (event.canvas.index, event.row)
            assert name not in done
            if event.canvas.done:
                done[name] = event.canvas.draft.tolist()
        for event in of(events, CanvasCommitted):
            assert list(event.tokens) == done[event.canvas_index, event.row][: len(event.tokens)]
            kept += 1
        steps = of(events, DenoisingStep)
        joined += sum(
            one.row < two.row and one.canvas.passes != two.canvas.passes
            for one, two in itertools.pairwise(steps)
        )
    assert kept > 10 and joined > 10


def test_each_sequence_has_its_own_settings():
    """In a batch each has its own number of tokens, steps, temperatures, bound and canvas."""
    configs = [
        settings(max_tokens=LENGTH - 2, max_denoising_steps=3),
        settings(max_tokens=3 * LENGTH, t_min=0.1, t_max=0.9, eos_token_ids=(5,)),
        settings(max_tokens=2 * LENGTH, entropy_bound=3.0, stability_threshold=0),
    ]
    together = run(PROMPTS, configs, 3)[-1]
    assert len({len(tokens) for tokens in together.tokens}) > 1
    for row, (prompt, config) in enumerate(zip(PROMPTS, configs, strict=True)):
        tokens, reason, history = naive_generate(MockPredict(), prompt, config, 3, row)
        assert list(together.tokens[row]) == tokens
        assert together.finish_reasons[row] == reason
        assert list(together.steps[row]) == [len(steps) for steps in history]


def test_a_canvas_that_used_up_its_steps_says_so():
    """`converged` is whether the stop rule was met: also in the last step, and never without it."""

    class SureAt(MockPredict):
        def row(self, prefix, canvas, soft, temperature, key):
            argmax, draw, entropy, soft = super().row(prefix, canvas, soft, temperature, key)
            sure = self.calls >= self.sure_at
            return np.full_like(argmax, 7), draw, np.full_like(entropy, 0.0 if sure else 1.0), soft

        sure_at = 0

    for sure_at, expected in ((5, True), (12, True), (13, False)):
        predict = SureAt()
        predict.sure_at = sure_at
        events = run([[3]], settings(max_tokens=1), predict=predict)
        (committed,) = of(events, CanvasCommitted)
        assert committed.converged is expected
        assert committed.passes == min(sure_at, 12)
        assert of(events, DenoisingStep)[-1].canvas.converged is expected
        assert not any(event.canvas.converged for event in of(events, DenoisingStep)[:-1])


@pytest.mark.parametrize(("eos", "expected"), [((7, 9), 7), ((9, 7), 7), ((8,), None)])
def test_the_token_that_ended_a_sequence_is_named(eos, expected):
    class Sure(MockPredict):
        def row(self, prefix, canvas, soft, temperature, key):
            _argmax, draw, entropy, soft = super().row(prefix, canvas, soft, temperature, key)
            return np.array([4, 4, *[7] * (LENGTH - 2)]), draw, np.zeros_like(entropy), soft

    events = run([[3]], settings(max_tokens=LENGTH, eos_token_ids=eos), predict=Sure())
    (committed,) = of(events, CanvasCommitted)
    assert committed.stop_token == events[-1].stop_tokens[0] == expected
    assert committed.finish_reason == ("length" if expected is None else "stop")
    assert len(committed.tokens) == (LENGTH if expected is None else 2)


def test_a_canvas_can_be_kept_forked_and_continued():
    """A canvas is a value: stepping it again from any moment gives the same."""
    model = MockModel()
    denoiser = Denoiser(model, MockPredict())
    prefix = model.encode([PROMPTS[0]], [model.make_cache().prefix])[1][0]
    canvas = Canvas.start(settings(), SeededNoise(5), 0, LENGTH, VOCAB)
    history = [canvas]
    while not canvas.done:
        (canvas,) = denoiser.step([canvas], [prefix])
        history.append(canvas)
    assert len(history) > 3
    for before, after in itertools.pairwise(history):
        (again,) = denoiser.step([before], [prefix])
        assert again.tokens.tolist() == after.tokens.tolist()
        assert again.draft.tolist() == after.draft.tolist()
        assert (again.passes, again.done) == (after.passes, after.done)


def test_a_sequence_may_be_ended_from_outside():
    config = settings(max_tokens=4 * LENGTH)
    whole = run(PROMPTS, config)[-1]
    asked: list[tuple[int, int]] = []

    def ends(row, tokens):
        asked.append((row, len(tokens)))
        return row == 1 and asked.count((1, LENGTH)) == 2

    *events, finished = run(PROMPTS, config, ends=ends)
    assert finished.finish_reasons == ("length", "stop", "length")
    assert finished.stop_tokens == (None, None, None)
    assert finished.tokens[1] == whole.tokens[1][: 2 * LENGTH]
    assert (finished.tokens[0], finished.tokens[2]) == (whole.tokens[0], whole.tokens[2])
    assert [event.row for event in of(events, CanvasCommitted)].count(1) == 2

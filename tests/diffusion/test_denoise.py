"""The denoising loop beside a naive one, on a mock model."""

from __future__ import annotations

from typing import ClassVar

import mlx.core as mx
import numpy as np
import pytest
from mock_model import LENGTH, VOCAB, MockModel, MockPredictor, naive_generate

from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.denoise import cut, generate_canvases
from mlx_diffgemma.diffusion.events import (
    CanvasCommitted,
    DenoisingStep,
    Finished,
    PrefillProgress,
)
from mlx_diffgemma.diffusion.noise import SeededNoise
from mlx_diffgemma.errors import NumericalError, UsageError

PROMPTS = [[3, 8, 8, 20], [11], [30, 2, 9, 9, 9, 17, 4]]


def run(prompts, settings, seed=0, predictor=None, noise=None, model=None, **more):
    model = model or MockModel()
    predictor = predictor or MockPredictor()
    noise = noise or SeededNoise(seed)
    return list(generate_canvases(model, prompts, settings, noise, predictor=predictor, **more))


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
    predictor = MockPredictor(seed)
    events = run(PROMPTS, config, seed, predictor)
    finished, early = events[-1], 0
    assert isinstance(finished, Finished)
    for row, prompt in enumerate(PROMPTS):
        tokens, reason, history = naive_generate(predictor, prompt, config, seed, row)
        assert list(finished.tokens[row]) == tokens
        assert finished.finish_reasons[row] == reason
        assert list(finished.steps[row]) == [len(steps) for steps in history]
        seen = 0
        for event in of(events, DenoisingStep):
            steps = history[event.canvas_index] if row in event.rows else []
            if event.step > len(steps):
                continue  # the others go on
            place = event.rows.index(row)
            draft, accepted, canvas = steps[event.step - 1]
            assert event.draft[place].tolist() == draft
            assert event.accepted[place].tolist() == accepted
            assert event.canvas[place].tolist() == canvas
            if event.step < config.max_denoising_steps:
                assert event.done[place] == (event.step == len(steps))
            seen += 1
        assert seen == sum(map(len, history))
        early += sum(len(steps) < config.max_denoising_steps for steps in history)
    return early


def test_stability_threshold_counts_previous_steps():
    """With one sure prediction, the canvas is done after threshold + 1 steps."""

    class Sure(MockPredictor):
        def row(self, prefix, canvas, soft, temperature, key):
            argmax, draw, entropy, soft = super().row(prefix, canvas, soft, temperature, key)
            return np.full_like(argmax, 7), draw, np.zeros_like(entropy), soft

    for threshold in range(5):
        events = run([[3]], settings(stability_threshold=threshold, max_tokens=1), predictor=Sure())
        assert events[-1].steps == ((threshold + 1,),)


@pytest.mark.parametrize("stability", [0, 1, 2])
def test_confidence_is_needed_too(stability):
    class Doubtful(MockPredictor):
        def row(self, prefix, canvas, soft, temperature, key):
            argmax, draw, entropy, soft = super().row(prefix, canvas, soft, temperature, key)
            return np.full_like(argmax, 7), draw, np.full_like(entropy, 0.2), soft

    at = settings(stability_threshold=stability, confidence_threshold=0.2, max_tokens=1)
    assert run([[3]], at, predictor=Doubtful())[-1].steps == ((12,),)
    above = at.override(confidence_threshold=0.21)
    assert run([[3]], above, predictor=Doubtful())[-1].steps == ((stability + 1,),)


def test_the_predictor_knows_the_last_step():
    class Told(MockPredictor):
        told: ClassVar[list[bool]] = []

        def __call__(self, *arguments):
            self.told.append(arguments[-1])
            return super().__call__(*arguments)

    run([[3]], settings(stability_threshold=99, max_tokens=1), predictor=Told())
    assert Told.told == [False] * 11 + [True]


def test_rows_are_independent():
    """A sequence of a batch gets what it gets alone, to the bit, with the same noise."""

    class OneRow(SeededNoise):
        def __init__(self, seed, row):
            super().__init__(seed)
            self.row = row

        def _keys(self, rows, canvas, step, purpose):
            return super()._keys([self.row for _ in rows], canvas, step, purpose)

    config = settings(eos_token_ids=(5, 6))
    together = run(PROMPTS, config, 4)
    for row, prompt in enumerate(PROMPTS):
        alone = run([prompt], config, noise=OneRow(4, row))[-1]
        assert alone.tokens[0] == together[-1].tokens[row]
        assert alone.steps[0] == together[-1].steps[row]


def test_rows_are_independent_on_the_model(tiny_model):
    model = tiny_model(3, gain=4.0)
    prompts = [[9, 10, 11], list(range(7, 40)), [50]]
    config = DiffusionConfig(max_tokens=model.config.canvas_length + 5, max_denoising_steps=4)
    together = list(generate_canvases(model, prompts, config, SeededNoise(0)))[-1]
    first = list(generate_canvases(model, prompts[:1], config, SeededNoise(0)))[-1]
    assert first.tokens[0] == together.tokens[0]
    swapped = list(generate_canvases(model, [prompts[0], prompts[2]], config, SeededNoise(0)))[-1]
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
    assert len(model.encoded) == 1 + canvases - 1  # the last canvas is not encoded


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
        events = run(PROMPTS, settings(eos_token_ids=(5,)), seed, MockPredictor(seed), model=model)
        canvases = [len(steps) for steps in events[-1].steps]
        going = [sum(count > index for count in canvases) for index in range(max(canvases))]
        assert [len(event.rows) for event in of(events, CanvasCommitted)] == going
        assert [len(ids) for ids in model.encoded] == [3, *going[1:]]
        for tokens, reason in zip(events[-1].tokens, events[-1].finish_reasons, strict=True):
            assert 5 not in tokens
            assert (reason == "length") == (len(tokens) == 3 * LENGTH)
        tried += len(set(canvases)) > 1
    assert tried >= 5


def test_events_in_order_with_their_shapes():
    events = run(PROMPTS, settings(max_denoising_steps=3, max_tokens=LENGTH + 1))
    kinds = [type(event) for event in events]
    assert kinds[:2] == [PrefillProgress, PrefillProgress]
    assert [(e.done, e.total) for e in of(events, PrefillProgress)] == [(0, 7), (7, 7)]
    one = [DenoisingStep] * 3 + [CanvasCommitted]
    assert kinds[2:] == [*one, *one, Finished]
    for number, event in enumerate(of(events, DenoisingStep)):
        assert (event.canvas_index, event.step) == (number // 3, number % 3 + 1)
        assert event.max_steps == 3
        assert event.temperature == pytest.approx(
            [0.8, 0.4 + 0.4 * 2 / 3, 0.4 + 0.4 / 3][number % 3]
        )
        assert event.rows == (0, 1, 2)
        for name in ("draft", "canvas", "entropy", "accepted"):
            assert getattr(event, name).shape == (3, LENGTH)
        assert event.done.shape == (3,)
        assert np.issubdtype(event.draft.dtype, np.integer)
        assert np.issubdtype(event.canvas.dtype, np.integer)
        assert event.accepted.dtype == event.done.dtype == bool
    first, second = of(events, CanvasCommitted)
    assert [len(tokens) for tokens in first.tokens] == [LENGTH] * 3
    assert first.finish_reasons == (None,) * 3
    assert [len(tokens) for tokens in second.tokens] == [1] * 3
    assert second.finish_reasons == ("length",) * 3
    drafts = of(events, DenoisingStep)[2].draft
    assert first.tokens == tuple(map(tuple, drafts.tolist()))


def test_first_draft_arrives_after_one_step():
    """The loop is lazy: nothing is computed ahead of who reads it."""
    predictor = MockPredictor(peak=0)
    stream = generate_canvases(
        MockModel(), PROMPTS, settings(), SeededNoise(0), predictor=predictor
    )
    assert predictor.calls == 0
    calls = []
    for event in stream:
        if isinstance(event, PrefillProgress):
            assert predictor.calls == 0
        if isinstance(event, DenoisingStep):
            calls.append(predictor.calls)
    assert calls == list(range(1, 3 * 12 + 1))


def test_prefill_in_chunks_is_the_same_prompt():
    model = MockModel()
    events = run(PROMPTS, settings(max_tokens=1), model=model, prefill_step_size=3)
    assert [(e.done, e.total) for e in of(events, PrefillProgress)] == [
        (0, 7),
        (3, 7),
        (6, 7),
        (7, 7),
    ]
    ids = np.concatenate(model.encoded, axis=1)
    for row, prompt in zip(ids.tolist(), PROMPTS, strict=True):
        assert row == [0] * (7 - len(prompt)) + prompt


def test_continues_a_given_cache():
    model = MockModel()
    cache = model.make_cache()
    cache.tokens = [[]]
    config = settings(max_tokens=LENGTH)
    run([[4, 6]], config, model=model, cache=cache)
    finished = run([[8, 9]], config, seed=1, model=model, cache=cache)[-1]
    assert cache.tokens == [[4, 6, 8, 9]]
    whole = run([[4, 6, 8, 9]], config, seed=1)[-1]
    assert finished.tokens == whole.tokens


def test_tokens_of_the_cache_are_prompt_and_committed_canvases():
    model = MockModel()
    cache = model.make_cache()
    cache.tokens = [[]]
    finished = run([[4, 6]], settings(), model=model, cache=cache)[-1]
    assert cache.tokens == [[4, 6, *finished.tokens[0][: 2 * LENGTH]]]
    assert np.array(cache.layers[0].keys)[0, 0, : cache.offset, 0].tolist() == cache.tokens[0]


@pytest.mark.parametrize("at", [1, 4, 14])
def test_values_that_are_not_finite_stop_with_the_step_named(at):
    predictor = MockPredictor(peak=0, nan_at=at)
    with pytest.raises(NumericalError) as error:
        run(PROMPTS, settings(), predictor=predictor)
    canvas, step = divmod(at - 1, 12)
    assert str(error.value) == (
        f"canvas {canvas + 1}, step {step + 1}: the model returned NaN or infinity; "
        "its weights are damaged (check them with --check)."
    )


def test_damaged_weights_stop_at_the_first_step(tiny_model):
    model = tiny_model(1)
    model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    with pytest.raises(NumericalError, match=r"^canvas 1, step 1: "):
        list(generate_canvases(model, [[9, 10]], DiffusionConfig(), SeededNoise(0)))


def test_initial_canvas_is_used_once():
    predictor = MockPredictor(peak=0)
    start = np.arange(3 * LENGTH).reshape(3, LENGTH) % VOCAB
    noise = SeededNoise(0)
    run(PROMPTS, settings(), predictor=predictor, noise=noise, initial_canvas=mx.array(start))
    assert predictor.canvases[0].tolist() == start.tolist()
    second = np.array(noise.initial_canvas([0, 1, 2], 1, LENGTH, VOCAB))
    assert predictor.canvases[12].tolist() == second.tolist()


def test_initial_canvas_of_a_wrong_shape():
    with pytest.raises(UsageError) as error:
        run(PROMPTS, settings(), initial_canvas=mx.zeros((2, LENGTH), mx.int32))
    assert str(error.value) == (
        f"initial_canvas has shape (2, {LENGTH}); it must be (3, {LENGTH}): prompts, canvas length."
    )


@pytest.mark.parametrize("steps", [1, 2, 48])
def test_step_cap(steps):
    predictor = MockPredictor(peak=0)
    finished = run([[3]], settings(max_denoising_steps=steps), predictor=predictor)[-1]
    assert finished.steps == ((steps,) * 3,)
    assert predictor.calls == 3 * steps


def test_seeds_repeat_and_differ():
    def tokens(seed):
        predictor = MockPredictor(peak=0.3)
        return run(PROMPTS, settings(max_denoising_steps=3), seed, predictor)[-1].tokens

    assert tokens(1) == tokens(1)
    assert len({tokens(seed) for seed in range(8)}) == 8


def test_a_row_that_is_done_keeps_its_draft():
    kept = 0
    for seed in range(6):
        done: dict[tuple[int, int], list[int]] = {}
        for event in of(run(PROMPTS, settings(), seed, MockPredictor(seed)), DenoisingStep):
            for place, row in enumerate(event.rows):
                draft = event.draft[place].tolist()
                if (event.canvas_index, row) in done:
                    assert done[event.canvas_index, row] == draft
                    assert event.done[place]
                    kept += 1
                elif event.done[place]:
                    done[event.canvas_index, row] = draft
    assert kept > 10

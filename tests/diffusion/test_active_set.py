"""Positions that have settled are computed rarely, and nothing is committed on stale ground."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.diffusion.canvas import Canvas
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import not_at_first
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.diffusion.events import CanvasCommitted, DenoisingStep, Finished
from mlx_diffgemma.diffusion.generate import generate_canvases
from mlx_diffgemma.diffusion.noise import SeededNoise, seeded
from mlx_diffgemma.diffusion.predict import Predictor
from mlx_diffgemma.model.diffusion_gemma import CanvasView

CLOSE = {"atol": 2e-4}


def encoded(model, *prompts):
    return model.encode(prompts, [model.empty_prefix()] * len(prompts))[1]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_pass_over_every_position_by_name_is_a_full_pass(tiny_model, rows: int) -> None:
    model = tiny_model(seed=5)
    prefixes = encoded(model, *[[7, 8, 9, 10]] * rows)
    rng = np.random.default_rng(0)
    length = model.config.canvas_length
    tokens = mx.array(rng.integers(0, 90, (rows, length)))
    views = [CanvasView(*both) for both in zip(tokens, prefixes, strict=True)]
    full, layers = model.decode_keeping(views)
    again, others = model.decode_keeping(
        [
            replace(view, places=np.arange(length), layers=kept)
            for view, kept in zip(views, layers, strict=True)
        ]
    )
    np.testing.assert_allclose(np.array(again), np.array(full), **CLOSE)
    for one, other in zip(layers, others, strict=True):
        for (keys, values), (new_keys, new_values) in zip(one, other, strict=True):
            np.testing.assert_allclose(np.array(new_keys), np.array(keys), **CLOSE)
            np.testing.assert_allclose(np.array(new_values), np.array(values), **CLOSE)


def test_a_partial_pass_sees_the_others_as_they_were(tiny_model) -> None:
    """With an unchanged canvas nothing is stale in the first layer, and a partial pass over the
    whole model differs from a full one only where later layers would have seen other keys."""
    model = tiny_model(seed=5)
    (prefix,) = encoded(model, [7, 8, 9, 10])
    length = model.config.canvas_length
    canvas = mx.arange(20, 20 + length)
    full, (layers,) = model.decode_keeping([CanvasView(canvas, prefix)])
    places = np.array([1, 4, 7])
    part = model.decode([CanvasView(canvas, prefix, None, places, layers)])
    np.testing.assert_allclose(np.array(part), np.array(full[mx.array(places)]), **CLOSE)
    changed = mx.array(canvas)
    changed[4] = 3
    moved = model.decode([CanvasView(changed, prefix, None, places, layers)])
    assert mx.abs(moved[1] - full[4]).max().item() > 1e-2
    assert mx.abs(moved[0] - full[1]).max().item() > 1e-6  # it sees the changed token


def test_partial_and_full_passes_in_one_batch(tiny_model) -> None:
    """Each canvas is computed as it is alone."""
    model = tiny_model(seed=5)
    prefixes = encoded(model, [7, 8, 9, 10], list(range(20, 50)))
    length = model.config.canvas_length
    canvas, other = mx.arange(20, 20 + length), mx.arange(40, 47)
    _, (layers,) = model.decode_keeping([CanvasView(canvas, prefixes[0])])
    soft = mx.random.normal((length, model.config.text.hidden_size), key=mx.random.key(0))
    views = [
        CanvasView(other, prefixes[1]),
        CanvasView(canvas, prefixes[0], soft, np.array([2, 5, 9]), layers),
        CanvasView(canvas, prefixes[1], soft),
    ]
    together = np.array(model.decode(views))
    alone = np.concatenate([np.array(model.decode([view])) for view in views])
    assert together.shape[0] == 7 + 3 + length
    np.testing.assert_allclose(together, alone, **CLOSE)


class Passes:
    """Counts the positions of each pass, and answers with certainty where it is told to."""

    def __init__(self, model, *certain: np.ndarray) -> None:
        """`certain` [C] says where each pass is; the last one also speaks for those that follow."""
        self.inner, self.certain, self.sizes = Predictor(model), certain, []

    def __call__(self, canvases, prefixes):
        found = []
        decode = self.inner.model.decode_keeping

        def counting(views):
            self.sizes += [
                len(view.tokens) if view.places is None else len(view.places) for view in views
            ]
            return decode(views)

        self.inner.model.decode_keeping = counting
        try:
            passed = self.inner(canvases, prefixes)
        finally:
            del self.inner.model.decode_keeping
        for each in passed:
            certain = self.certain[min(len(self.sizes), len(self.certain)) - 1]
            entropy = mx.array(np.where(certain, 0.0, 1.0), mx.float32)
            prediction = replace(each.prediction, entropy=entropy, argmax=mx.arange(len(certain)))
            found.append(replace(each, prediction=prediction))
        return found


def drive(tiny_model, certain: np.ndarray, steps: int, mask: bool = False) -> list[int]:
    model = tiny_model(seed=5, num_experts=4, top_k_experts=2)  # eight positions fill the experts
    (prefix,) = encoded(model, [7, 8, 9, 10])
    passes = Passes(model, certain)
    config = DiffusionConfig(
        settled_after=2, t_min=0.8, t_max=0.8, confidence_threshold=1e-9, stability_threshold=99
    )
    vocab = model.config.text.vocab_size
    layout = not_at_first([3], len(certain), vocab) if mask else None
    canvas = Canvas.start(config, SeededNoise(0), 0, len(certain), vocab, layout=layout)
    denoiser = Denoiser(model, passes)
    for _ in range(steps):
        (canvas,) = denoiser.step([canvas], [prefix])
        assert canvas.draft.tolist() == list(range(len(certain)))
        assert canvas.soft_embeddings.shape[0] == len(certain)
    return passes.sizes


def test_settled_positions_are_left_out_until_the_next_full_pass(tiny_model) -> None:
    certain = np.array([True] * 24 + [False] * 8)
    for mask in (False, True):
        assert drive(tiny_model, certain, 8, mask) == [32, 32, 8, 8, 8, 8, 32, 8]


def test_a_canvas_that_looks_done_is_passed_over_whole(tiny_model) -> None:
    assert set(drive(tiny_model, np.array([True] * 16), 5)) == {16}


def test_an_uncertain_canvas_is_never_cut(tiny_model) -> None:
    assert set(drive(tiny_model, np.array([False] * 16), 5)) == {16}


def test_the_active_set_fills_the_experts(tiny_model) -> None:
    """A few positions cost no less than the four an expert from which tokens are grouped."""
    model = tiny_model(seed=5, num_experts=8, top_k_experts=2)
    (prefix,) = encoded(model, [7, 8, 9, 10])
    passes = Passes(model, np.array([True] * 30 + [False] * 2))
    config = DiffusionConfig(
        settled_after=1, t_min=0.8, t_max=0.8, confidence_threshold=1e-9, stability_threshold=99
    )
    canvas = Canvas.start(config, SeededNoise(0), 0, 32, model.config.text.vocab_size)
    for _ in range(3):
        (canvas,) = Denoiser(model, passes).step([canvas], [prefix])
    assert passes.sizes == [32, 16, 16]


def test_nothing_is_committed_on_stale_ground(tiny_model) -> None:
    """What looks done after a pass over a part is at once looked at in full, and ends only then."""
    model = tiny_model(seed=5, num_experts=4, top_k_experts=2)
    (prefix,) = encoded(model, [7, 8, 9, 10])
    some, every = np.array([True] * 24 + [False] * 8), np.array([True] * 32)
    config = DiffusionConfig(settled_after=1, confidence_threshold=0.1, stability_threshold=0)
    for sight, sizes in ((every, [32, 8, 32]), (some, [32, 8, 32, 8, 8, 8])):
        passes = Passes(model, some, every, sight)
        canvas = Canvas.start(config, SeededNoise(0), 0, 32, model.config.text.vocab_size)
        for _ in sizes:
            assert not canvas.done
            (canvas,) = Denoiser(model, passes).step([canvas], [prefix])
        assert passes.sizes == sizes
        assert canvas.done == canvas.converged == (sight is every)


def test_the_last_pass_of_a_schedule_is_whole(tiny_model) -> None:
    model = tiny_model(seed=5, num_experts=4, top_k_experts=2)
    (prefix,) = encoded(model, [7, 8, 9, 10])
    passes = Passes(model, np.array([True] * 24 + [False] * 8))
    config = DiffusionConfig(settled_after=1, confidence_threshold=1e-9, max_denoising_steps=4)
    canvas = Canvas.start(config, SeededNoise(0), 0, 32, model.config.text.vocab_size)
    while not canvas.done:
        (canvas,) = Denoiser(model, passes).step([canvas], [prefix])
    assert passes.sizes == [32, 8, 8, 32]


def test_the_loop_runs_with_it(tiny_model) -> None:
    model = tiny_model(seed=5, gain=4.0)
    prompts = [[7, 8, 9], [10, 11, 12]]
    config = DiffusionConfig(max_tokens=30, max_denoising_steps=12, settled_after=1)
    *events, finished = generate_canvases(model, prompts, config, seeded(0))
    assert isinstance(finished, Finished)
    assert [len(row) for row in finished.tokens] == [30, 30]
    assert any(isinstance(event, DenoisingStep) for event in events)
    assert {event.row for event in events if isinstance(event, CanvasCommitted)} == {0, 1}

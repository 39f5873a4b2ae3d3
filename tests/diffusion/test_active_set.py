"""Positions that have settled are computed rarely, and nothing is committed on stale ground."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.diffusion.active_set import ActiveSetPredictor
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.denoise import generate_canvases
from mlx_diffgemma.diffusion.events import DenoisingStep, Finished
from mlx_diffgemma.diffusion.noise import SeededNoise
from mlx_diffgemma.diffusion.predict import MaterializedPredictor


@pytest.mark.parametrize("rows", [1, 3])
def test_a_pass_over_every_position_by_name_is_a_full_pass(tiny_model, rows: int) -> None:
    model = tiny_model(seed=5)
    cache = model.make_cache()
    model.encode(mx.array([[7, 8, 9, 10]] * rows), cache)
    rng = np.random.default_rng(0)
    length = model.config.canvas_length
    canvas = mx.array(rng.integers(0, 90, (rows, length)))
    full = model.decode(canvas, cache)
    again = model.decode(canvas, cache, None, mx.arange(length))
    np.testing.assert_allclose(np.array(again), np.array(full), atol=2e-4)


def test_a_partial_pass_sees_the_others_as_they_were(tiny_model) -> None:
    """With an unchanged canvas nothing is stale in the first layer, and a partial pass over the
    whole model differs from a full one only where later layers would have seen other keys."""
    model = tiny_model(seed=5)
    cache = model.make_cache()
    model.encode(mx.array([[7, 8, 9, 10]]), cache)
    length = model.config.canvas_length
    canvas = mx.arange(20, 20 + length)[None]
    full = model.decode(canvas, cache)
    places = mx.array([1, 4, 7])
    part = model.decode(canvas, cache, None, places)
    np.testing.assert_allclose(np.array(part), np.array(full[:, places]), atol=2e-4)
    changed = mx.array(canvas)
    changed[0, 4] = 3
    moved = model.decode(changed, cache, None, places)
    assert mx.abs(moved[0, 1] - full[0, 4]).max().item() > 1e-2
    assert mx.abs(moved[0, 0] - full[0, 1]).max().item() > 1e-6  # it sees the changed token


class Passes:
    """Counts the positions of each pass, and answers with certainty where it is told to."""

    def __init__(self, model, certain: np.ndarray) -> None:
        self.inner, self.certain, self.sizes = MaterializedPredictor(model), certain, []

    def __call__(
        self, canvas, cache, soft, temperature, keys, constraint=None, last=False, places=None
    ):
        prediction = self.inner(canvas, cache, soft, temperature, keys, constraint, last, places)
        chosen = np.arange(canvas.shape[1]) if places is None else np.array(places)
        self.sizes.append(len(chosen))
        entropy = np.where(self.certain[chosen], 0.0, 1.0)[None].repeat(canvas.shape[0], 0)
        object.__setattr__(prediction, "entropy", mx.array(entropy, mx.float32))
        object.__setattr__(
            prediction, "argmax", mx.array(chosen)[None] + mx.zeros_like(canvas[:, :1])
        )
        return prediction


def drive(tiny_model, certain: np.ndarray, steps: int) -> list[int]:
    model = tiny_model(seed=5)
    cache = model.make_cache()
    model.encode(mx.array([[7, 8, 9, 10]]), cache)
    passes = Passes(model, certain)
    predictor = ActiveSetPredictor(passes, settled_after=2, confidence=0.005)
    soft, canvas = None, mx.zeros((1, len(certain)), mx.int32)
    keys = mx.random.split(mx.random.key(0), 1)
    for _ in range(steps):
        prediction = predictor(canvas, cache, soft, 0.8, keys)
        assert prediction.argmax.shape == (1, len(certain))
        assert prediction.argmax.tolist()[0] == list(range(len(certain)))
        soft = prediction.soft_embeddings
    return passes.sizes


def test_settled_positions_are_left_out_until_the_next_full_pass(tiny_model) -> None:
    certain = np.array([True] * 12 + [False] * 4)
    assert drive(tiny_model, certain, 8) == [16, 16, 4, 4, 4, 4, 16, 4]


def test_a_canvas_that_looks_done_is_passed_over_whole(tiny_model) -> None:
    assert set(drive(tiny_model, np.array([True] * 16), 5)) == {16}


def test_an_uncertain_canvas_is_never_cut(tiny_model) -> None:
    assert set(drive(tiny_model, np.array([False] * 16), 5)) == {16}


def test_the_loop_runs_with_it(tiny_model) -> None:
    model = tiny_model(seed=5, gain=4.0)
    prompts = [[7, 8, 9], [10, 11, 12]]
    config = DiffusionConfig(max_tokens=30, max_denoising_steps=12, settled_after=1)
    *events, finished = generate_canvases(model, prompts, config, SeededNoise(0))
    assert isinstance(finished, Finished)
    assert [len(row) for row in finished.tokens] == [30, 30]
    assert any(isinstance(event, DenoisingStep) for event in events)

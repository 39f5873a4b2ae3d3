"""A prediction in tiles is the prediction from whole logits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.diffusion.constraints import CanvasConstraint, token_mask
from mlx_diffgemma.diffusion.predict import (
    MaterializedPredictor,
    TiledPredictor,
    entropy,
    make_predictor,
)

VOCAB = 300


@pytest.fixture(scope="module")
def setting(request):
    from tiny_models import make_config, make_model, make_weights

    from mlx_diffgemma.config import ModelConfig

    config = ModelConfig.from_dict(make_config(seed=3, vocab_size=VOCAB))
    model = make_model(config, make_weights(config, seed=3))
    cache = model.make_cache()
    model.encode(mx.array([[7, 8, 9], [20, 21, 22]]), cache)
    rng = np.random.default_rng(0)
    canvas = mx.array(rng.integers(0, VOCAB, (2, config.canvas_length)))
    soft = mx.array(rng.normal(0, 1, (*canvas.shape, config.text.hidden_size)), mx.float32)
    return model, cache, canvas, soft


def constraint(canvas: mx.array) -> CanvasConstraint:
    rng = np.random.default_rng(1)
    fixed = np.full(canvas.shape, -1, np.int32)
    fixed[0, 2], fixed[1, 5] = 17, 0
    allowed = np.stack(
        [
            [token_mask(rng.choice(VOCAB, 5, replace=False), VOCAB) for _ in row]
            for row in canvas.tolist()
        ]
    )
    return CanvasConstraint(fixed, allowed)


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("temperature", [0.4, 0.8])
@pytest.mark.parametrize("cutoff", [None, 10.0])
def test_tiles_and_whole_logits_agree(
    setting, constrained: bool, temperature: float, cutoff: float | None
) -> None:
    model, cache, canvas, soft = setting
    bound = constraint(canvas) if constrained else None
    keys = mx.random.split(mx.random.key(4), 2)
    whole, tiled = (
        predictor(canvas, cache, soft, temperature, keys, bound)
        for predictor in (MaterializedPredictor(model, cutoff), TiledPredictor(model, cutoff))
    )
    assert mx.array_equal(whole.argmax, tiled.argmax)
    np.testing.assert_allclose(np.array(tiled.entropy), np.array(whole.entropy), atol=2e-5)
    scale = float(mx.abs(whole.soft_embeddings).max().item())
    # A tile is cut by the maximum so far, which keeps a few unlikely tokens more.
    np.testing.assert_allclose(
        np.array(tiled.soft_embeddings),
        np.array(whole.soft_embeddings),
        atol=(1e-5 if cutoff is None else 2e-3) * scale,
    )
    logits = model.logits(model.decode(canvas, cache, soft)) / temperature
    if bound is not None:
        logits = bound.restrict(logits)
    probabilities = mx.softmax(logits, axis=-1)
    free = bound.open if bound is not None else np.ones(canvas.shape, bool)
    for prediction in (whole, tiled):
        drawn = mx.take_along_axis(probabilities, prediction.draw[..., None], axis=-1)[..., 0]
        assert drawn.min().item() > 0  # a token that is not allowed has no chance
        np.testing.assert_allclose(
            np.array(prediction.confidence)[free], np.array(drawn)[free], rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("form", [MaterializedPredictor, TiledPredictor])
def test_the_last_step_leaves_out_the_soft_embeddings_alone(setting, form) -> None:
    model, cache, canvas, soft = setting
    keys = mx.random.split(mx.random.key(4), 2)
    before, last = (
        form(model, 10.0)(canvas, cache, soft, 0.5, keys, constraint(canvas), last)
        for last in (False, True)
    )
    assert before.soft_embeddings is not None and last.soft_embeddings is None
    for name in ("argmax", "draw", "entropy", "confidence"):
        assert mx.array_equal(getattr(before, name), getattr(last, name))


def test_draws_follow_the_distribution(setting) -> None:
    model, cache, canvas, soft = setting
    draws = []
    for seed in range(300):
        keys = mx.random.split(mx.random.key(seed), 2)
        draws.append(np.array(TiledPredictor(model)(canvas, cache, soft, 0.8, keys).draw))
    p = np.array(mx.softmax(model.logits(model.decode(canvas, cache, soft)) / 0.8, axis=-1))
    best = p.argmax(axis=-1)
    expected = np.take_along_axis(p, best[..., None], axis=-1)[..., 0]
    share = (np.stack(draws) == best).mean(axis=0)
    error = np.sqrt(expected * (1 - expected) / len(draws)) + 1e-6
    assert (np.abs(share - expected) / error).max() < 5


def test_nan_shows_in_the_entropy(setting) -> None:
    model, cache, canvas, soft = setting
    keys = mx.random.split(mx.random.key(0), 2)
    broken = soft * float("nan")
    for predictor in (MaterializedPredictor(model), TiledPredictor(model)):
        assert np.isnan(np.array(predictor(canvas, cache, broken, 0.8, keys).entropy)).any()


def test_a_cutoff_drops_only_what_is_unlikely(setting) -> None:
    model, cache, canvas, soft = setting
    keys = mx.random.split(mx.random.key(0), 2)
    exact = MaterializedPredictor(model)(canvas, cache, soft, 0.8, keys).soft_embeddings
    near = MaterializedPredictor(model, 12.0)(canvas, cache, soft, 0.8, keys).soft_embeddings
    far = MaterializedPredictor(model, 0.5)(canvas, cache, soft, 0.8, keys).soft_embeddings
    scale = float(mx.abs(exact).max().item())
    assert mx.abs(near - exact).max().item() < 1e-2 * scale
    assert mx.abs(far - exact).max().item() > 1e-1 * scale


def test_entropy_of_certainty_is_zero() -> None:
    logits = mx.array([[0.0, -mx.inf, -mx.inf], [1.0, 1.0, -mx.inf]])
    np.testing.assert_allclose(np.array(entropy(logits)), [0.0, np.log(2)], atol=1e-6)


def test_large_vocabularies_go_in_tiles(tiny_model) -> None:
    small, large = tiny_model(vocab_size=300), tiny_model(vocab_size=9000)
    for cutoff in (None, 10.0):
        assert isinstance(make_predictor(small, cutoff), MaterializedPredictor)
        assert isinstance(make_predictor(large, cutoff), TiledPredictor)

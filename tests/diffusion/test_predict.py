"""What a step asks of the model, and what comes back: alike from tiles and from whole logits."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.diffusion.canvas import Canvas, Passed, Prediction
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import FREE, Layout, token_mask
from mlx_diffgemma.diffusion.noise import SeededNoise
from mlx_diffgemma.diffusion.predict import Predictor, split
from mlx_diffgemma.kernels.allowed_tokens import unpack_allowed, words_of
from mlx_diffgemma.kernels.materialized import whole_pass
from mlx_diffgemma.kernels.vocabulary import vocabulary_pass
from mlx_diffgemma.model.diffusion_gemma import CanvasView

VOCAB = 300
FORMS = {"whole": whole_pass, "tiles": vocabulary_pass}


@pytest.fixture(scope="module")
def setting(request):
    """A model, two prefixes of unequal length, tokens and soft embeddings of a canvas for each."""
    from tiny_models import make_config, make_model, make_weights

    from mlx_diffgemma.config import ModelConfig

    config = ModelConfig.from_dict(make_config(seed=3, vocab_size=VOCAB))
    model = make_model(config, make_weights(config, seed=3))
    prefixes = model.encode([[7, 8, 9], [20, 21, 22, 23, 24]], [model.empty_prefix()] * 2)[1]
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (2, config.canvas_length)).astype(np.int32)
    soft = rng.normal(0, 1, (*tokens.shape, config.text.hidden_size)).astype(np.float32)
    return model, prefixes, tokens, soft


def canvases_of(setting, temperature, cutoff=None, layouts=None, seed=4, soft=None, **changes):
    """Canvases whose next pass is at this temperature."""
    _, _, tokens, given = setting
    soft = given if soft is None else soft
    config = DiffusionConfig(
        t_min=temperature, t_max=temperature, soft_cutoff=cutoff, max_denoising_steps=9
    )
    canvases = []
    for row in range(2):
        canvas = Canvas.start(
            config, SeededNoise(seed, row), 0, len(tokens[row]), VOCAB,
            initial=tokens[row].tolist(), layout=None if layouts is None else layouts[row],
        )  # fmt: skip
        canvases.append(
            replace(
                canvas, tokens=mx.array(tokens[row]), soft_embeddings=mx.array(soft[row]), **changes
            )
        )
    return canvases


def joined(passed: list[Passed]) -> Prediction:
    """The predictions of all canvases, one behind the other."""
    assert all(each.whole for each in passed)
    values = {}
    for name in Prediction.__dataclass_fields__:
        parts = [getattr(each.prediction, name) for each in passed]
        values[name] = None if parts[0] is None else mx.concatenate(parts)
    return Prediction(**values)


def predicted(form: str, model, canvases, prefixes) -> Prediction:
    before, model.vocabulary_pass = model.vocabulary_pass, FORMS[form]
    try:
        found = joined(Predictor(model)(canvases, prefixes))
        mx.eval([getattr(found, name) for name in Prediction.__dataclass_fields__])
    finally:
        model.vocabulary_pass = before
    return found


def layouts_of(length: int) -> list[Layout]:
    rng = np.random.default_rng(1)
    layouts = []
    for place, token in ((2, 17), (5, 0)):
        fixed = [FREE] * length
        fixed[place] = token
        allowed = {
            at: token_mask(rng.choice(VOCAB, 5, replace=False), VOCAB) for at in range(length)
        }
        layouts.append(Layout(tuple(fixed), allowed))
    return layouts


def probabilities(setting, temperature, layouts=None) -> np.ndarray:
    """What the model says of every token, [2 · C, V], from its logits."""
    model, prefixes, tokens, soft = setting
    views = [
        CanvasView(mx.array(tokens[row]), prefixes[row], mx.array(soft[row])) for row in range(2)
    ]
    logits = model.logits(model.decode(views)) / temperature
    if layouts is not None:
        words = np.concatenate(
            [words_of(layout.allowed, len(layout.tokens), VOCAB) for layout in layouts]
        )
        logits = mx.where(unpack_allowed(mx.array(words), VOCAB), logits, -mx.inf)
    return np.array(mx.softmax(logits, axis=-1))


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("temperature", [0.4, 0.8])
@pytest.mark.parametrize("cutoff", [None, 10.0])
def test_tiles_and_whole_logits_agree(
    setting, constrained: bool, temperature: float, cutoff: float | None
) -> None:
    model, prefixes, tokens, _ = setting
    layouts = layouts_of(tokens.shape[1]) if constrained else None
    canvases = canvases_of(setting, temperature, cutoff, layouts)
    whole, tiled = (predicted(form, model, canvases, prefixes) for form in FORMS)
    assert mx.array_equal(whole.argmax, tiled.argmax)
    np.testing.assert_allclose(np.array(tiled.entropy), np.array(whole.entropy), atol=2e-5)
    scale = float(mx.abs(whole.soft_embeddings).max().item())
    # A tile is cut by the maximum so far, which keeps a few unlikely tokens more.
    np.testing.assert_allclose(
        np.array(tiled.soft_embeddings),
        np.array(whole.soft_embeddings),
        atol=(1e-5 if cutoff is None else 2e-3) * scale,
    )


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("temperature", [0.4, 0.8])
@pytest.mark.parametrize("form", FORMS)
def test_predictions_are_those_of_the_logits(setting, form, temperature, constrained) -> None:
    model, prefixes, tokens, _ = setting
    layouts = layouts_of(tokens.shape[1]) if constrained else None
    found = predicted(form, model, canvases_of(setting, temperature, None, layouts), prefixes)
    p = probabilities(setting, temperature, layouts)
    free = np.ones(len(p), bool)
    if layouts is not None:
        free = np.concatenate([layout.open for layout in layouts])
        fixed = np.concatenate([layout.fixed for layout in layouts])
        assert (np.array(found.argmax) == fixed)[~free].all()
        assert (np.array(found.draw) == fixed)[~free].all()
        assert (np.array(found.entropy) == 0)[~free].all()
        assert (np.array(found.confidence) == 1)[~free].all()
    assert (np.array(found.argmax) == p.argmax(-1))[free].all()
    entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(-1)
    np.testing.assert_allclose(np.array(found.entropy)[free], entropy[free], atol=2e-5)
    drawn = np.take_along_axis(p, np.array(found.draw)[:, None], axis=-1)[:, 0]
    assert drawn[free].min() > 0  # a token that is not allowed has no chance
    np.testing.assert_allclose(np.array(found.confidence)[free], drawn[free], rtol=1e-3, atol=1e-6)
    table = np.array(model.model.decoder.embed_tokens.weight)
    expected = p @ table * model.config.text.hidden_size**0.5
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        np.array(found.soft_embeddings)[free], expected[free], atol=1e-5 * scale
    )


@pytest.mark.parametrize("form", FORMS)
def test_the_last_step_leaves_out_the_soft_embeddings_alone(setting, form) -> None:
    """No soft embeddings are asked for in the last step of a schedule, unless somebody else ends
    the canvas."""
    model, prefixes, tokens, _ = setting
    layouts = layouts_of(tokens.shape[1])
    asked = []
    inner = model.vocabulary_pass
    before = canvases_of(setting, 0.5, 10.0, layouts)
    last = [replace(canvas, first_step=9) for canvas in before]
    # The key of the draws depends on the step; here both draw with the same.
    last = [replace(canvas, noise=_SameKey(canvas.noise)) for canvas in last]
    before = [replace(canvas, noise=_SameKey(canvas.noise)) for canvas in before]
    early, late = (predicted(form, model, each, prefixes) for each in (before, last))
    assert all(canvas.is_last_step for canvas in last)
    assert early.soft_embeddings is not None and late.soft_embeddings is None
    for name in ("argmax", "draw", "entropy", "confidence"):
        assert mx.array_equal(getattr(early, name), getattr(late, name))

    def listening(hidden, table, rows, **more):
        asked.append([row.need_soft for row in rows])
        return inner(hidden, table, rows, **more)

    model.vocabulary_pass = listening
    try:
        mixed = [before[0], last[1]]
        Predictor(model)(before, prefixes), Predictor(model)(last, prefixes)
        Predictor(model)(mixed, prefixes)
        Predictor(model)([replace(canvas, endless=True) for canvas in last], prefixes)
    finally:
        model.vocabulary_pass = inner
    assert asked == [[True, True], [False, False], [True, False], [True, True]]


class _SameKey:
    def __init__(self, noise) -> None:
        self.noise = noise

    def draw_key(self, canvas: int, step: int) -> mx.array:
        return self.noise.draw_key(canvas, 1)


@pytest.mark.parametrize("form", FORMS)
def test_draws_follow_the_distribution(setting, form) -> None:
    model, prefixes, _, _ = setting
    draws = []
    for start in range(0, 300, 30):  # thirty seeds at a time
        some = [
            c for seed in range(start, start + 30) for c in canvases_of(setting, 0.8, seed=seed)
        ]
        found = predicted(form, model, some, [*prefixes] * 30).draw
        draws += np.array(found).reshape(30, -1).tolist()
    p = probabilities(setting, 0.8)
    best = p.argmax(axis=-1)
    expected = np.take_along_axis(p, best[..., None], axis=-1)[..., 0]
    share = (np.array(draws) == best).mean(axis=0)
    error = np.sqrt(expected * (1 - expected) / len(draws)) + 1e-6
    assert (np.abs(share - expected) / error).max() < 5


@pytest.mark.parametrize("form", FORMS)
def test_nan_shows_in_the_entropy(setting, form) -> None:
    model, prefixes, _, soft = setting
    broken = canvases_of(setting, 0.8, soft=soft * float("nan"))
    assert np.isnan(np.array(predicted(form, model, broken, prefixes).entropy)).any()


def test_a_cutoff_drops_only_what_is_unlikely(setting) -> None:
    model, prefixes, _, _ = setting
    exact, near, far = (
        predicted("whole", model, canvases_of(setting, 0.8, cutoff), prefixes).soft_embeddings
        for cutoff in (None, 12.0, 0.5)
    )
    scale = float(mx.abs(exact).max().item())
    assert mx.abs(near - exact).max().item() < 1e-2 * scale
    assert mx.abs(far - exact).max().item() > 1e-1 * scale


def test_each_canvas_is_asked_at_its_own_temperature(setting) -> None:
    model, prefixes, _, _ = setting
    cold, warm = canvases_of(setting, 0.3), canvases_of(setting, 1.2)
    mixed = predicted("whole", model, [cold[0], warm[1]], prefixes)
    length = len(cold[0])
    for canvases, part in ((cold, slice(0, length)), (warm, slice(length, None))):
        own = predicted("whole", model, canvases, prefixes)
        np.testing.assert_allclose(
            np.array(mixed.entropy)[part], np.array(own.entropy)[part], atol=1e-5
        )
        assert mixed.draw[part].tolist() == own.draw[part].tolist()


def test_entropy_of_certainty_is_zero(setting) -> None:
    """A position that allows one token, and one that allows two alike."""
    model, prefixes, tokens, _ = setting
    length = tokens.shape[1]
    allowed = {0: token_mask([7], VOCAB), 1: token_mask([7, 8], VOCAB)}
    layout = Layout((FREE,) * length, allowed)
    table = model.model.decoder.embed_tokens
    weight = table.weight
    table.weight = mx.array(np.where(np.arange(VOCAB)[:, None] == 8, weight[7], weight))
    try:
        canvases = canvases_of(setting, 0.8, layouts=[layout, layout])
        found = predicted("whole", model, canvases, prefixes).entropy.reshape(2, length)
    finally:
        table.weight = weight
    np.testing.assert_allclose(np.array(found[:, :2]), [[0.0, np.log(2)]] * 2, atol=1e-6)


def test_split_gives_each_canvas_its_own(setting) -> None:
    whole = Prediction(
        argmax=mx.arange(9), probability=mx.arange(9), draw=mx.arange(9), entropy=mx.arange(9),
        confidence=mx.arange(9), soft_embeddings=mx.arange(18).reshape(9, 2),
        dropped_mass=mx.arange(9),
    )  # fmt: skip
    parts = split(whole, [4, 2, 3])
    assert [part.draw.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5], [6, 7, 8]]
    assert parts[1].soft_embeddings.tolist() == [[8, 9], [10, 11]]
    without = split(replace(whole, soft_embeddings=None), [4, 5])
    assert [part.soft_embeddings for part in without] == [None, None]
    assert split(whole, [9]) == [whole]


def test_large_vocabularies_go_in_tiles(tiny_model) -> None:
    small, large = tiny_model(vocab_size=300), tiny_model(vocab_size=9000)
    assert small.vocabulary_pass is whole_pass
    assert large.vocabulary_pass is not whole_pass


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("likeliest", [{"draw_likeliest": True}, {"likeliest_from": 1}])
def test_the_likeliest_tokens_are_drawn_alone_and_beside_draws(
    setting, form: str, likeliest: dict[str, int]
) -> None:
    model, prefixes, *_ = setting
    drawn = canvases_of(setting, 0.8)
    sure = [replace(each, settings=each.settings.override(**likeliest)) for each in drawn]
    for canvases in (sure, [drawn[0], sure[1]]):
        found = predicted(form, model, canvases, prefixes)
        draw, argmax = (np.array(each).reshape(2, -1) for each in (found.draw, found.argmax))
        assert draw[1].tolist() == argmax[1].tolist()
        assert (draw[0] == argmax[0]).all() == (canvases is sure)
        seen, best = (np.array(p).reshape(2, -1) for p in (found.confidence, found.probability))
        np.testing.assert_allclose(seen[1], best[1], rtol=1e-5)

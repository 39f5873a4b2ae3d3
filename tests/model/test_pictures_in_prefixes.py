"""A prefix knows its pictures by what they show, and no chunk cuts one."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_config, make_model, make_weights
from tiny_pictures import PLAIN, drawn, make_vision, make_vision_weights

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.diffusion.encode import chunks, encode
from mlx_diffgemma.errors import PromptError, UsageError
from mlx_diffgemma.model.cache import PrefixCache
from mlx_diffgemma.pictured import PicturedIds, PictureSpan, followed_by, pictures_of
from mlx_diffgemma.text.pictures import read_picture

IMAGE = 6


@pytest.fixture
def model():
    raw = make_config(2)
    config = ModelConfig.from_dict(raw)
    model = make_model(config, make_weights(config, 2))
    width = config.text.hidden_size

    def see(span: PictureSpan) -> mx.array:
        model.seen.append(span.key)
        rng = np.random.default_rng(list(span.key.encode()))
        return mx.array(rng.normal(0, 1, (len(span), width)).astype(np.float32))

    model.seen = []
    model.embed_picture = see
    return model


def prompt(*parts: int | str) -> PicturedIds:
    """So many tokens for a number, and a picture of five for a text."""
    ids, spans = [], []
    for number, part in enumerate(parts):
        if isinstance(part, int):
            ids += [7 + (number * 31 + place) % 80 for place in range(part)]
        else:
            spans.append(PictureSpan(len(ids), len(ids) + 5, part))
            ids += [IMAGE] * 5
    return PicturedIds(ids, spans)


def encoded(model, cache, ids, step_size=None):
    totals = [progress.total for progress in encode(model, cache, ids, step_size=step_size)]
    return totals[0]


def states(model, ids) -> list[np.ndarray]:
    cache = model.make_cache()
    encoded(model, cache, ids)
    return [np.array(array) for layer in cache.prefix.layers for array in layer.held()]


def test_equal_ids_with_another_picture_are_another_prefix(model):
    first, second = prompt(6, "a", 9, "b", 4), prompt(6, "a", 9, "c", 4)
    assert first == second  # as lists of ids
    cache = model.make_cache()
    assert encoded(model, cache, first) == len(first)
    assert encoded(model, cache, first) == 0 and model.seen == ["a", "b"]
    encoded(model, cache, second)
    assert model.seen[-1] == "c" and cache.prefix.pictures == second.pictures
    held = [np.array(array) for layer in cache.prefix.layers for array in layer.held()]
    for ours, alone in zip(held, states(model, second), strict=True):
        np.testing.assert_allclose(ours, alone, atol=1e-5)
    apart = zip(held, states(model, first), strict=True)
    assert max(np.abs(a - b).max() for a, b in apart) > 1e-3


def test_a_known_picture_is_not_read_again(model):
    cache = model.make_cache()
    encoded(model, cache, prompt(2, "a", 2))
    model.seen.clear()
    longer = prompt(2, "a", 2, "b", 1)
    assert encoded(model, cache, longer) == 6 and model.seen == ["b"]


def test_a_prefix_goes_back_to_before_a_picture_of_another_length(model):
    cache = model.make_cache()
    short = PicturedIds([7, *[IMAGE] * 3, 9], [PictureSpan(1, 4, "a")])
    long = PicturedIds([7, *[IMAGE] * 5, 9], [PictureSpan(1, 6, "a")])
    encoded(model, cache, short)
    assert encoded(model, cache, long) == len(long) - 1


def test_a_saved_prefix_knows_its_pictures(model, tmp_path):
    cache, ids = model.make_cache(), prompt(3, "a", 2)
    encoded(model, cache, ids)
    cache.save(tmp_path / "prefix.safetensors")
    loaded = PrefixCache.load(tmp_path / "prefix.safetensors", model)
    assert loaded.prefix.pictures == ids.pictures
    assert encoded(model, loaded, ids) == 0
    assert encoded(model, loaded, prompt(3, "b", 2)) == 7


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 9) | st.just("p"), min_size=1, max_size=9), st.integers(1, 12))
def test_chunks_cover_a_prompt_and_cut_no_picture(parts, size):
    ids = prompt(*parts)
    cut = chunks([0, len(ids)], size, ids.pictures)
    assert [place for a, b in cut for place in range(a, b)] == list(range(len(ids)))
    for span in ids.pictures:
        assert any(a <= span.start and span.stop <= b for a, b in cut)
    assert all(b - a <= max(size, 5) for a, b in cut)


def test_in_any_chunks_the_same_comes_out(model):
    ids = prompt(4, "a", 1, "b", 30, "c", 2)
    whole = states(model, ids)
    for step_size in (1, 4, 11):
        cache = model.make_cache()
        encoded(model, cache, ids, step_size)
        held = [np.array(array) for layer in cache.prefix.layers for array in layer.held()]
        for ours, expected in zip(held, whole, strict=True):
            np.testing.assert_allclose(ours, expected, atol=2e-4)


def test_rows_with_and_without_pictures_go_together(model):
    pictured, plain = prompt(3, "a", 2), [8, 9, 10]
    seen = [{span: model.embed_picture(span) for span in pictured.pictures}, {}]
    empty = [model.empty_prefix()] * 2
    together, prefixes = model.encode([pictured, plain], empty, seen)
    alone = [
        model.encode([ids], empty[:1], [row])[0]
        for ids, row in zip([pictured, plain], seen, strict=True)
    ]
    np.testing.assert_allclose(np.array(together), np.array(mx.concatenate(alone)), atol=1e-5)
    assert prefixes[0].pictures == pictured.pictures and not prefixes[1].pictures


def test_a_picture_that_is_cut_is_refused(model):
    ids = prompt(1, "a")
    seen = {ids.pictures[0]: mx.zeros((5, model.config.text.hidden_size))}
    with pytest.raises(UsageError, match="cut"):
        model.encode([ids[:4]], [model.empty_prefix()], [seen])


def test_ids_keep_their_pictures_when_they_go_on():
    ids = prompt(1, "a")
    assert pictures_of(followed_by(ids, [7])) == ids.pictures and not pictures_of([7])


def test_a_model_without_a_tower_refuses_pictures():
    config = ModelConfig.from_dict(make_config(2))
    picture = PictureSpan(0, 1, "a", np.zeros((9, 48), np.uint8), 3)
    with pytest.raises(PromptError, match="no vision tower"):
        make_model(config, make_weights(config, 2)).embed_picture(picture)


def test_memory_stays_flat_from_one_picture_to_twenty():
    raw = make_config(1, sliding_window=64, max_position_embeddings=20_000)
    raw["vision_config"] = {**PLAIN, "hidden_size": 64, "intermediate_size": 128}
    config = ModelConfig.from_dict(raw)
    model = make_model(config, make_weights(config, 1))
    width = config.text.hidden_size
    weights = make_vision_weights(config.vision, width, 0)
    model.load_vision = lambda: make_vision(config.vision, width, weights)
    model.require_vision()
    peaks = []
    for count in (1, 20):
        ids, spans = [], []
        for number in range(count):
            seen = read_picture(drawn(96, 128, number), config.vision, 70)
            end = len(ids) + seen.soft_tokens
            spans.append(PictureSpan(len(ids), end, seen.key, seen.patches, seen.columns))
            ids += [IMAGE] * seen.soft_tokens
        cache = model.make_cache()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        encoded(model, cache, PicturedIds(ids, spans), step_size=256)
        peaks.append(mx.get_peak_memory() - before - cache.nbytes)
    assert peaks[1] <= 1.05 * peaks[0]

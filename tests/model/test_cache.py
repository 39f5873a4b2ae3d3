"""The prefix cache: what it keeps, and that reading it changes nothing."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.model.cache import LayerCache, PrefixCache

CLOSE = {"rtol": 2e-4, "atol": 2e-4}


def tokens(seed: int, *shape: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(7, 90, shape))


def numbered(start: int, stop: int) -> mx.array:
    """Keys [1, 1, S, 1] that bear their position."""
    return mx.arange(start, stop, dtype=mx.float32)[None, None, :, None]


def positions(keys: mx.array) -> list[int]:
    return [int(p) for p in keys[0, 0, :, 0].tolist()]


@pytest.mark.parametrize("chunks", [[5], [1] * 12, [3, 4, 5], [4], [3], [20, 1, 1], [300, 300]])
def test_sliding_layer_keeps_the_last_window_less_one(chunks):
    window, cache, end = 4, LayerCache(4), 0
    for size in chunks:
        before = end
        seen, values = cache.extend(numbered(end, end + size), -numbered(end, end + size))
        end += size
        assert positions(seen) == list(range(max(0, before - (window - 1)), end))
        assert positions(-values) == positions(seen)
        assert cache.length == min(end, window - 1)
        seen, _ = cache.with_canvas(numbered(1000, 1006), numbered(1000, 1006))
        kept = list(range(max(0, end - (window - 1)), end))
        assert positions(seen) == kept + list(range(1000, 1006))


@pytest.mark.parametrize("chunks", [[5], [1] * 12, [255, 1, 1], [256, 256, 3], [700]])
def test_full_layer_keeps_everything(chunks):
    cache, end = LayerCache(), 0
    for size in chunks:
        seen, values = cache.extend(numbered(end, end + size), -numbered(end, end + size))
        end += size
        assert positions(seen) == positions(-values) == list(range(end))
        seen, _ = cache.with_canvas(numbered(1000, 1006), numbered(1000, 1006))
        assert positions(seen) == list(range(end)) + list(range(1000, 1006))
        assert cache.length == end


def test_reserved_room_is_taken_once_and_holds_the_same():
    cache = LayerCache()
    cache.reserve(700)
    for start in range(0, 700, 100):
        seen, _ = cache.extend(numbered(start, start + 100), numbered(start, start + 100))
        assert positions(seen) == list(range(start + 100))
        assert cache.keys is not None and cache.keys.shape[2] == 768
    sliding = LayerCache(8)
    sliding.reserve(700)
    sliding.extend(numbered(0, 100), numbered(0, 100))
    assert sliding.keys is not None and sliding.keys.shape[2] == 7


@pytest.mark.parametrize("window", [None, 8])
def test_canvas_leaves_the_prefix_alone_and_needs_no_new_room(window):
    cache = LayerCache(window)
    cache.extend(numbered(0, 20), numbered(0, 20))
    cache.with_canvas(numbered(500, 510), numbered(500, 510))
    mx.eval(cache.arrays())
    size = cache.keys.shape
    for start in (600, 700, 800):
        seen, _ = cache.with_canvas(numbered(start, start + 10), numbered(start, start + 10))
        assert positions(seen)[-10:] == list(range(start, start + 10))
        assert positions(seen)[:-10] == list(range(0 if window is None else 13, 20))
        assert cache.keys.shape == size  # the scratch behind the prefix is used again
    seen, _ = cache.extend(numbered(20, 23), numbered(20, 23))
    assert positions(seen) == list(range(0 if window is None else 13, 23))


@pytest.mark.parametrize("chunk", [1, 3, 7, 10, 26])
@pytest.mark.parametrize("pads", [None, [0, 9]], ids=["even", "padded"])
def test_chunked_prefill_equals_the_whole(tiny_model, chunk, pads):
    model = tiny_model(0, sliding_window=10)
    ids, canvas = tokens(0, 2, 26), tokens(1, 2, 12)
    whole, pieces = model.make_cache(pads), model.make_cache(pads)
    expected = model.encode(ids, whole)
    found = [model.encode(ids[:, at : at + chunk], pieces) for at in range(0, 26, chunk)]
    real = np.arange(26) >= np.array(pads or [0, 0])[:, None]
    np.testing.assert_allclose(
        np.array(mx.concatenate(found, axis=1))[real], np.array(expected)[real], **CLOSE
    )
    assert pieces.offset == whole.offset == 26
    np.testing.assert_allclose(
        np.array(model.decode(canvas, pieces)), np.array(model.decode(canvas, whole)), **CLOSE
    )


def test_decoding_twice_gives_the_same_and_encoding_goes_on(tiny_model):
    model = tiny_model(1)
    ids, canvas, other = tokens(0, 1, 30), tokens(1, 1, 12), tokens(2, 1, 12)
    used, fresh = model.make_cache(), model.make_cache()
    model.encode(ids, used), model.encode(ids, fresh)
    first = model.decode(canvas, used).tolist()
    model.decode(other, used)
    assert model.decode(canvas, used).tolist() == first
    assert used.offset == 30
    after = model.encode(other, used)
    assert after.tolist() == model.encode(other, fresh).tolist()


def test_the_prefix_matters(tiny_model):
    """In every layer kind: a change far back, and one inside the window, change the canvas."""
    model = tiny_model(1, sliding_window=8)
    canvas, results = tokens(1, 1, 12), []
    for changed in (None, 0, 28):
        ids = tokens(0, 1, 30)
        if changed is not None:
            ids[0, changed] = 95
        cache = model.make_cache()
        model.encode(ids, cache)
        results.append(np.array(model.decode(canvas, cache)))
    for other in results[1:]:
        assert np.abs(results[0] - other).max() > 1e-3


def test_snapshot_and_restore(tiny_model):
    model = tiny_model(2)
    cache = model.make_cache()
    cache.tokens = [[1, 2]]
    ids, canvas = tokens(0, 1, 21), tokens(1, 1, 12)
    model.encode(ids, cache)
    before = model.decode(canvas, cache).tolist()
    copy = cache.snapshot()
    model.encode(tokens(3, 1, 40), cache)
    cache.tokens[0].append(3)
    assert model.decode(canvas, cache).tolist() != before
    assert model.decode(canvas, copy).tolist() == before
    assert copy.tokens == [[1, 2]]
    cache.restore(copy)
    assert (cache.offset, cache.tokens) == (21, [[1, 2]])
    assert model.decode(canvas, cache).tolist() == before
    model.encode(tokens(4, 1, 9), cache)
    assert model.decode(canvas, copy).tolist() == before  # the snapshot stays usable


def test_clear_forgets_everything(tiny_model):
    model = tiny_model(2)
    cache, fresh = model.make_cache([0, 3]), model.make_cache()
    model.encode(tokens(0, 2, 21), cache)
    cache.clear()
    assert (cache.offset, cache.pads, cache.tokens, cache.nbytes) == (0, None, [], 0)
    ids = tokens(5, 1, 6)
    assert model.encode(ids, cache).tolist() == model.encode(ids, fresh).tolist()


def test_keep_rows(tiny_model):
    model = tiny_model(3)
    cache = model.make_cache([0, 7, 2])
    cache.tokens = [[1], [2], [3]]
    model.encode(tokens(0, 3, 20), cache)
    canvas = tokens(1, 3, 12)
    whole = np.array(model.decode(canvas, cache))
    cache.keep_rows([2, 1])
    assert cache.tokens == [[3], [2]]
    assert cache.pads.tolist() == [2, 7]
    np.testing.assert_allclose(
        np.array(model.decode(canvas[mx.array([2, 1])], cache)), whole[[2, 1]], **CLOSE
    )


@pytest.mark.parametrize("pads", [None, [0, 5]], ids=["even", "padded"])
def test_save_and_load(tiny_model, tmp_path, pads):
    model = tiny_model(4)
    cache = model.make_cache(pads)
    cache.tokens = [[4, 5], [6]]
    model.encode(tokens(0, 2, 25), cache)
    canvas = tokens(1, 2, 12)
    expected = model.decode(canvas, cache).tolist()
    cache.save(tmp_path / "prefix.safetensors")
    loaded = PrefixCache.load(tmp_path / "prefix.safetensors")
    assert loaded.tokens == cache.tokens
    assert loaded.offset == 25
    assert model.decode(canvas, loaded).tolist() == expected
    more = tokens(2, 2, 9)
    assert model.encode(more, loaded).tolist() == model.encode(more, cache).tolist()


def test_save_and_load_an_empty_cache(tiny_model, tmp_path):
    tiny_model(4).make_cache().save(tmp_path / "empty.safetensors")
    assert PrefixCache.load(tmp_path / "empty.safetensors").offset == 0


def test_load_what_is_no_cache(tmp_path):
    missing = tmp_path / "missing.safetensors"
    with pytest.raises(CheckpointError, match=r"missing.safetensors is not a saved prefix cache"):
        PrefixCache.load(missing)
    other = tmp_path / "other.safetensors"
    mx.save_safetensors(str(other), {"x": mx.zeros(3)})
    with pytest.raises(CheckpointError, match=r"other.safetensors is not a saved prefix cache"):
        PrefixCache.load(other)
    text = tmp_path / "text.safetensors"
    text.write_text("no")
    with pytest.raises(CheckpointError, match=r"text.safetensors is not a saved prefix cache"):
        PrefixCache.load(text)


def test_memory_grows_with_the_full_layers_only(tiny_model):
    model = tiny_model(0, sliding_window=8)
    cache = model.make_cache()
    for seed in range(40):
        model.encode(tokens(seed, 1, 16), cache)
        model.decode(tokens(seed, 1, 12), cache)
    mx.eval(cache.arrays())
    for layer in cache.layers:
        if layer.window is not None:
            assert layer.keys.shape[2] <= 256
        else:
            assert 640 <= layer.keys.shape[2] <= 640 + 256
    assert cache.nbytes == sum(array.nbytes for array in cache.arrays()) > 0

"""The prefix: what it keeps, that no later one changes it, and that it is always true."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.diffusion.encode import encode
from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma.model import attention
from mlx_diffgemma.model.cache import LayerPrefix, Prefix, PrefixCache
from mlx_diffgemma.model.diffusion_gemma import CanvasView

CLOSE = {"rtol": 2e-4, "atol": 2e-4}


def tokens(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(7, 90, length).tolist()


def canvas(seed: int, length: int = 12) -> mx.array:
    return mx.array(tokens(seed, length), mx.int32)


def numbered(start: int, stop: int) -> mx.array:
    """Keys [1, 1, S, 1] that bear their position."""
    return mx.arange(start, stop, dtype=mx.float32)[None, None, :, None]


def positions(keys: mx.array) -> list[int]:
    return [int(p) for p in keys[0, 0, :, 0].tolist()]


def encoded(model, ids: list[int], prefix: Prefix | None = None) -> Prefix:
    """A prefix, or none, with these ids behind it."""
    before = model.empty_prefix() if prefix is None else prefix
    return model.encode([ids], [before])[1][0]


def decoded(model, tokens: mx.array, prefix: Prefix) -> np.ndarray:
    return np.array(model.decode([CanvasView(tokens, prefix)]))


def run(progress) -> list:
    return list(progress)


class Kept:
    """A prefix beside a copy of all it held when it was made."""

    def __init__(self, prefix: Prefix) -> None:
        self.prefix, self.ids = prefix, tuple(prefix.ids)
        self.arrays = [
            np.array(array)
            for layer in prefix.layers
            if layer.length
            for array in layer.held()
        ]  # fmt: skip
        self.marks = copy.copy(prefix.marks)

    def check(self) -> None:
        again = Kept(self.prefix)
        assert again.ids == self.ids and again.marks == self.marks
        for one, other in zip(again.arrays, self.arrays, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("chunks", [[5], [1] * 12, [3, 4, 5], [4], [3], [20, 1, 1], [300, 300]])
def test_sliding_layer_keeps_the_last_window_less_one(chunks):
    window, layer, end = 4, LayerPrefix(4), 0
    for size in chunks:
        before = end
        layer, seen, values = layer.extended(numbered(end, end + size), -numbered(end, end + size))
        end += size
        assert positions(seen) == list(range(max(0, before - (window - 1)), end))
        assert positions(-values) == positions(seen)
        assert layer.length == min(end, window - 1)
        seen, _ = layer.followed_by(numbered(1000, 1006), numbered(1000, 1006))
        kept = list(range(max(0, end - (window - 1)), end))
        assert positions(seen) == kept + list(range(1000, 1006))


@pytest.mark.parametrize("chunks", [[5], [1] * 12, [255, 1, 1], [256, 256, 3], [700]])
def test_full_layer_keeps_everything(chunks):
    layer, end = LayerPrefix(), 0
    for size in chunks:
        layer, seen, values = layer.extended(numbered(end, end + size), -numbered(end, end + size))
        end += size
        assert positions(seen) == positions(-values) == list(range(end))
        seen, _ = layer.followed_by(numbered(1000, 1006), numbered(1000, 1006))
        assert positions(seen) == list(range(end)) + list(range(1000, 1006))
        assert layer.length == end


def test_reserved_room_is_taken_once_and_holds_the_same():
    layer = LayerPrefix()
    for start in range(0, 700, 100):
        new = numbered(start, start + 100)
        layer, seen, _ = layer.extended(new, new, room=700)
        assert positions(seen) == list(range(start + 100))
        assert layer.keys is not None and layer.keys.shape[2] == 768
    sliding, _, _ = LayerPrefix(8).extended(numbered(0, 100), numbered(0, 100), room=700)
    assert sliding.keys is not None and sliding.keys.shape[2] == 7


@pytest.mark.parametrize("window", [None, 8])
def test_canvas_leaves_the_prefix_alone_and_needs_no_new_room(window):
    layer, _, _ = LayerPrefix(window).extended(numbered(0, 20), numbered(0, 20))
    mx.eval(layer.arrays())
    size = layer.keys.shape
    for start in (500, 600, 700, 800):
        seen, _ = layer.followed_by(numbered(start, start + 10), numbered(start, start + 10))
        assert positions(seen)[-10:] == list(range(start, start + 10))
        assert positions(seen)[:-10] == list(range(0 if window is None else 13, 20))
        assert layer.keys.shape == size
    _, seen, _ = layer.extended(numbered(20, 23), numbered(20, 23))
    assert positions(seen) == list(range(0 if window is None else 13, 23))


@pytest.mark.parametrize("chunk", [1, 3, 7, 10, 26])
@pytest.mark.parametrize("lengths", [[26], [26, 17]], ids=["one", "two"])
def test_chunked_prefill_equals_the_whole(tiny_model, chunk, lengths):
    """Sequences of unequal length in one call, each behind its own prefix."""
    model = tiny_model(0, sliding_window=10)
    ids = [tokens(row, length) for row, length in enumerate(lengths)]
    whole, pieces, found = [], [model.empty_prefix() for _ in ids], [[] for _ in ids]
    expected = []
    for row in ids:
        hidden, (prefix,) = model.encode([row], [model.empty_prefix()])
        whole.append(prefix)
        expected.append(np.array(hidden))
    for at in range(0, 26, chunk):
        parts = {n: row[at : at + chunk] for n, row in enumerate(ids) if row[at : at + chunk]}
        hidden, longer = model.encode(list(parts.values()), [pieces[n] for n in parts])
        start = 0
        for n, prefix in zip(parts, longer, strict=True):
            pieces[n] = prefix
            found[n].append(np.array(hidden[start : start + len(parts[n])]))
            start += len(parts[n])
    for n, row in enumerate(ids):
        np.testing.assert_allclose(np.concatenate(found[n]), expected[n], **CLOSE)
        assert pieces[n].ids == whole[n].ids == tuple(row)
        np.testing.assert_allclose(
            decoded(model, canvas(1), pieces[n]), decoded(model, canvas(1), whole[n]), **CLOSE
        )


def test_decoding_twice_gives_the_same_and_encoding_goes_on(tiny_model):
    model = tiny_model(1)
    ids = tokens(0, 30)
    used, fresh = encoded(model, ids), encoded(model, ids)
    first = decoded(model, canvas(1), used).tolist()
    decoded(model, canvas(2), used)
    assert decoded(model, canvas(1), used).tolist() == first
    assert len(used) == 30
    after, _ = model.encode([tokens(2, 12)], [used])
    assert after.tolist() == model.encode([tokens(2, 12)], [fresh])[0].tolist()


def test_the_prefix_matters(tiny_model):
    """In every layer kind: a change far back, and one inside the window, change the canvas."""
    model = tiny_model(1, sliding_window=8)
    results = []
    for changed in (None, 0, 28):
        ids = tokens(0, 30)
        if changed is not None:
            ids[changed] = 95
        results.append(decoded(model, canvas(1), encoded(model, ids)))
    for other in results[1:]:
        assert np.abs(results[0] - other).max() > 1e-3


def test_a_prefix_is_not_changed_by_what_comes_after(tiny_model):
    model = tiny_model(2, sliding_window=9)
    prefix = encoded(model, tokens(0, 21))
    kept, before = Kept(prefix), decoded(model, canvas(1), prefix).tolist()
    longer = encoded(model, tokens(3, 40), prefix)
    assert (len(prefix), len(longer)) == (21, 61)
    assert decoded(model, canvas(1), longer).tolist() != before
    other = encoded(model, tokens(4, 9), prefix)  # the shorter one stays usable
    kept_longer, kept_other = Kept(longer), Kept(other)
    assert decoded(model, canvas(1), prefix).tolist() == before
    encoded(model, tokens(5, 30), longer), encoded(model, tokens(6, 30), other)
    for each in (kept, kept_longer, kept_other):
        each.check()
    assert decoded(model, canvas(1), prefix).tolist() == before


@pytest.mark.parametrize("act", ["decode on it", "encode into it", "encode into both"])
def test_a_snapshot_and_its_origin_do_not_see_each_other(tiny_model, act):
    model = tiny_model(2, sliding_window=9)
    first = model.make_cache()
    run(encode(model, first, tokens(0, 21), room=64))
    before = decoded(model, canvas(1), first.prefix)
    second = first.snapshot()
    assert second.prefix is first.prefix
    decoded(model, canvas(2), second.prefix)
    if act != "decode on it":
        run(encode(model, second, [*tokens(0, 21), *tokens(3, 20)]))
    if act == "encode into both":
        run(encode(model, first, [*tokens(0, 21), *tokens(4, 20)]))
        expected = encoded(model, [*tokens(0, 21), *tokens(4, 20)])
        np.testing.assert_allclose(
            decoded(model, canvas(1), first.prefix), decoded(model, canvas(1), expected), **CLOSE
        )
        expected = encoded(model, [*tokens(0, 21), *tokens(3, 20)])
        np.testing.assert_allclose(
            decoded(model, canvas(1), second.prefix), decoded(model, canvas(1), expected), **CLOSE
        )
    else:
        assert decoded(model, canvas(1), first.prefix).tolist() == before.tolist()


def test_clear_forgets_everything(tiny_model):
    model = tiny_model(2)
    cache = model.make_cache()
    for length in (5, 21, 60):  # shorter and longer than a window
        run(encode(model, cache, tokens(0, length), marks=[3, length]))
        cache.clear()
        assert (cache.offset, cache.prefix.ids, cache.prefix.marks, cache.nbytes) == (0, (), (), 0)
    hidden, _ = model.encode([tokens(5, 6)], [cache.prefix])
    assert hidden.tolist() == model.encode([tokens(5, 6)], [model.empty_prefix()])[0].tolist()


def test_prefixes_in_any_order_and_number(tiny_model):
    """Sequences join and leave a batch without anything being copied or padded."""
    model = tiny_model(3, sliding_window=9)
    prefixes = [encoded(model, tokens(n, length)) for n, length in enumerate((20, 13, 3, 1))]
    whole = [decoded(model, canvas(n), prefix) for n, prefix in enumerate(prefixes)]
    for order in ([2, 1], [0, 1, 2, 3], [3], [3, 0, 3]):
        views = [CanvasView(canvas(n), prefixes[n]) for n in order]
        np.testing.assert_allclose(
            np.array(model.decode(views)), np.concatenate([whole[n] for n in order]), **CLOSE
        )


@pytest.mark.parametrize("length", [4, 25, 300])
def test_save_and_load(tiny_model, tmp_path, length):
    model = tiny_model(4)
    cache = model.make_cache()
    run(encode(model, cache, tokens(0, length), room=100, marks=[2, length]))
    expected = decoded(model, canvas(1), cache.prefix).tolist()
    cache.save(tmp_path / "prefix.safetensors")
    loaded = PrefixCache.load(tmp_path / "prefix.safetensors", model)
    assert loaded.prefix.ids == cache.prefix.ids
    assert loaded.offset == length
    assert decoded(model, canvas(1), loaded.prefix).tolist() == expected
    more = tokens(2, 9)
    ours, _ = model.encode([more], [loaded.prefix])
    assert ours.tolist() == model.encode([more], [cache.prefix])[0].tolist()


def test_save_and_load_an_empty_cache(tiny_model, tmp_path):
    model = tiny_model(4)
    model.make_cache().save(tmp_path / "empty.safetensors")
    assert PrefixCache.load(tmp_path / "empty.safetensors", model).offset == 0


def test_what_is_saved_under_a_name_is_loaded_under_it(tiny_model, tmp_path):
    model = tiny_model(4)
    cache = model.make_cache()
    run(encode(model, cache, tokens(0, 9)))
    cache.save(tmp_path / "b")
    assert PrefixCache.load(tmp_path / "b", model).prefix.ids == cache.prefix.ids


def test_load_what_is_no_cache(tiny_model, tmp_path):
    model = tiny_model(4)
    missing = tmp_path / "missing.safetensors"
    with pytest.raises(CheckpointError, match=r"missing.safetensors is not a saved prefix cache"):
        PrefixCache.load(missing, model)
    other = tmp_path / "other.safetensors"
    mx.save_safetensors(str(other), {"x": mx.zeros(3)})
    with pytest.raises(CheckpointError, match=r"other.safetensors is not a saved prefix cache"):
        PrefixCache.load(other, model)
    text = tmp_path / "text.safetensors"
    text.write_text("no")
    with pytest.raises(CheckpointError, match=r"text.safetensors is not a saved prefix cache"):
        PrefixCache.load(text, model)


def test_load_the_cache_of_another_model(tiny_model, tmp_path):
    """Also of one with the same shapes, and of the same model with an adapter merged."""
    file = tmp_path / "prefix.safetensors"
    model = tiny_model(4)
    cache = model.make_cache()
    run(encode(model, cache, tokens(0, 9)))
    cache.save(file)
    same = tiny_model(4)
    assert PrefixCache.load(file, same).prefix.ids == cache.prefix.ids
    same.layers[1].self_attn.q_proj.weight = same.layers[1].self_attn.q_proj.weight * 1.01
    for other in (tiny_model(5), same):
        with pytest.raises(CheckpointError) as error:
            PrefixCache.load(file, other)
        assert str(error.value) == (
            f"{file} was saved with other weights; encode the prompt again with this model."
        )


def test_load_a_cache_that_lacks_positions(tiny_model, tmp_path):
    """A file whose ids and arrays have parted is refused."""
    file = tmp_path / "prefix.safetensors"
    model = tiny_model(4)
    cache = model.make_cache()
    run(encode(model, cache, tokens(0, 30)))
    cache.prefix = replace(cache.prefix, ids=cache.prefix.ids[:-1])
    cache.save(file)
    with pytest.raises(CheckpointError, match="does not hold 29 positions of layer "):
        PrefixCache.load(file, model)


def test_save_where_nothing_can_be_written(tiny_model, tmp_path):
    cache = tiny_model(4).make_cache()
    folder = tmp_path / "missing"
    with pytest.raises(CheckpointError) as error:
        cache.save(folder / "b.safetensors")
    assert str(error.value) == (
        f"{folder / 'b.safetensors'} cannot be written: there is no folder {folder}; make it first."
    )
    (tmp_path / "c.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"c\.safetensors cannot be written"):
        cache.save(tmp_path / "c.safetensors")


def test_memory_grows_with_the_full_layers_only(tiny_model):
    model = tiny_model(0, sliding_window=8)
    prefix = model.empty_prefix()
    for seed in range(40):
        prefix = encoded(model, tokens(seed, 16), prefix)
        decoded(model, canvas(seed), prefix)
        mx.eval(prefix.arrays())
    for layer in prefix.layers:
        if layer.window is not None:
            assert layer.keys.shape[2] == 7
        else:
            assert 640 <= layer.keys.shape[2] < 640 + 256
    assert prefix.nbytes == sum(array.nbytes for array in prefix.arrays()) > 0


# Who copies.


@pytest.fixture
def wide(tiny_model):
    """A model whose full layers hold 2 MB at 1,024 positions, and little else."""
    model = tiny_model(
        0, sliding_window=8, num_global_key_value_heads=4, global_head_dim=64, head_dim=6,
        layer_types=["sliding_attention", "full_attention", "full_attention"], num_hidden_layers=3,
    )  # fmt: skip
    model.eval()  # as a loaded one is
    return model


def full_bytes(prefix: Prefix) -> int:
    return sum(
        array.nbytes for layer in prefix.layers if layer.window is None for array in layer.arrays()
    )


def most_beside(work) -> int:
    """Bytes that `work` took at most, beside what was held before."""
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    work()
    mx.synchronize()
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("budget", [64 << 20, 1 << 16], ids=["one block", "blocks"])
def test_a_prefix_that_nobody_else_holds_is_not_copied(wide, monkeypatch, budget):
    """Growing by chunks writes into the full layers' buffers where they are, whether or not a
    chunk's attention is computed block by block."""
    monkeypatch.setattr(attention, "_SCORE_BYTES", budget)
    cache, ids = wide.make_cache(), tokens(0, 2000)
    run(encode(wide, cache, ids[:1936], room=1024))
    held = full_bytes(cache.prefix)
    assert held > 8 << 20
    took = most_beside(lambda: run(encode(wide, cache, ids, step_size=32)))
    assert full_bytes(cache.prefix) == held
    assert took < held / 2
    older = cache.prefix
    took = most_beside(lambda: run(encode(wide, cache, [*ids, *ids[:32]], step_size=32)))
    assert took > held  # it had to be copied, for both hold it
    assert len(older) == 2000 and full_bytes(older) == held


def test_two_that_hold_a_prefix_copy_it_once(wide):
    cache, ids = wide.make_cache(), tokens(0, 2000)
    run(encode(wide, cache, ids, room=1024))
    other, held = cache.snapshot(), full_bytes(cache.prefix)
    assert most_beside(cache.snapshot) < 1 << 16
    took = most_beside(lambda: run(encode(wide, other, [*ids, *ids[:32]])))
    assert held < took < 2 * held
    for more in (64, 96):  # the fork is alone with its copy now
        took = most_beside(lambda more=more: run(encode(wide, other, [*ids, *ids[:more]])))
        assert took < held / 2


def test_a_cache_grows_into_a_longer_buffer_and_gives_the_shorter_one_up(wide):
    cache, ids = wide.make_cache(), tokens(0, 3000)
    run(encode(wide, cache, ids[:2048]))
    held = full_bytes(cache.prefix)
    run(encode(wide, cache, ids[:2100]))
    assert cache.prefix.layers[1].keys.shape[2] == 2304
    assert held < full_bytes(cache.prefix) < 1.2 * held
    mx.synchronize()
    mx.clear_cache()


# Going back.


def test_going_back_within_the_window_cuts(tiny_model):
    model = tiny_model(1, sliding_window=20)
    prefix = encoded(model, tokens(0, 19))
    for wanted, expected in (
        (tokens(0, 19), 19),
        ([*tokens(0, 19), 8], 19),
        (tokens(0, 12), 12),
        ([*tokens(0, 12), 95, 9], 12),
        ([95], 0),
        ([], 0),
    ):
        kept = Kept(prefix)
        back = prefix.back_to(wanted)
        assert back.ids == tuple(wanted[:expected])
        grown = encoded(model, [9, 9, 8], back)
        fresh = encoded(model, [*wanted[:expected], 9, 9, 8])
        np.testing.assert_allclose(
            decoded(model, canvas(1), grown), decoded(model, canvas(1), fresh), **CLOSE
        )
        kept.check()


def test_going_back_beyond_the_window_takes_the_longest_mark_that_fits(tiny_model):
    model = tiny_model(1, sliding_window=9)
    ids, cache = tokens(0, 60), model.make_cache()
    run(encode(model, cache, ids, marks=[13, 30, 45]))
    assert [mark.length for mark in cache.prefix.marks] == [13, 30, 45]
    for common, expected in ((60, 60), (59, 45), (45, 45), (44, 30), (30, 30), (29, 13), (12, 0)):
        wanted = [*ids[:common], *([95] * 5 if common < 60 else [])]
        back = cache.prefix.back_to(wanted)
        assert back.ids == tuple(wanted[:expected])
        assert all(mark.length <= expected for mark in back.marks)
        fresh = encoded(model, ids[:expected]) if expected else model.empty_prefix()
        np.testing.assert_allclose(
            decoded(model, canvas(1), back), decoded(model, canvas(1), fresh), **CLOSE
        )


def test_marks_that_take_too_much_are_dropped_least_recently_used_first(tiny_model):
    model = tiny_model(1, sliding_window=9)
    ids = tokens(0, 80)
    prefix = encoded(model, ids[:20]).marked()
    one = prefix.marks[0].nbytes
    assert one == sum(a.nbytes for x in prefix.layers if x.window is not None for a in x.arrays())
    for length in (30, 40, 50):
        prefix = encoded(model, ids[len(prefix) : length], prefix).marked()
    assert [mark.length for mark in prefix.marks] == [20, 30, 40, 50]
    assert prefix.nbytes == full_bytes(prefix) + 4 * one  # the last one is what is held now
    used = prefix.back_to([*ids[:35], 95])  # the mark at 30 is used, and those beyond are wrong
    assert [mark.length for mark in used.marks] == [20, 30]
    used = encoded(model, ids[30:44], used.back_to([*ids[:20], 95]))
    assert [mark.length for mark in used.marks] == [20]
    longer = encoded(model, ids[50:60], prefix)
    assert [m.length for m in longer.marked(5 * one).marks] == [20, 30, 40, 50, 60]
    assert [m.length for m in longer.marked(3 * one).marks] == [40, 50, 60]
    assert [m.length for m in longer.marked(one).marks] == [60]
    assert longer.marked(one - 1).marks == ()
    assert [m.length for m in longer.marked().marked().marks] == [20, 30, 40, 50, 60]


def test_using_a_mark_makes_it_the_last_to_be_dropped(tiny_model):
    model = tiny_model(1, sliding_window=9)
    ids = tokens(0, 80)
    prefix = model.empty_prefix()
    for length in (20, 30, 40):
        prefix = encoded(model, ids[len(prefix) : length], prefix).marked()
    one = prefix.marks[0].nbytes
    back = prefix.back_to([*ids[:33], 95])
    assert [mark.length for mark in back.marks] == [20, 30]
    back = encoded(model, tokens(7, 12), back).marked()
    assert [mark.length for mark in back.marks] == [20, 30, 42]
    back = back.back_to([*ids[:20], 95])
    back = encoded(model, tokens(8, 12), back).marked()
    assert [mark.length for mark in back.marked(one).marks] == [32]


# One call at a time.


def test_a_cache_in_use_is_refused_to_another_call(tiny_model):
    cache = tiny_model(1).make_cache()
    refused: list[str] = []

    def use() -> None:
        try:
            with cache.in_use():
                refused.append("taken")
        except UsageError as error:
            refused.append(str(error))

    with cache.in_use():
        use()
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        with cache.snapshot().in_use():  # another cache
            pass
    use()
    message = (
        "this prefix_cache is in use by another call; give each call at a time its own "
        "(prefix_cache.snapshot() makes one that holds the same)."
    )
    assert refused == [message, message, "taken"]
    with pytest.raises(RuntimeError), cache.in_use():
        raise RuntimeError
    use()
    assert refused[-1] == "taken"


# Random sequences of all of it.


class Interrupt(Exception):  # noqa: N818 - it is no error
    """Stands for Ctrl-C, which may come at any moment."""


class Machine:
    """A few caches of one model, on which random operations are run. Every prefix that was ever
    seen is kept, with a copy of what it held."""

    def __init__(self, model, seed: int, folder) -> None:
        self.model, self.folder = model, folder
        self.rng = np.random.default_rng([seed, 7])
        self.caches = [model.make_cache()]
        self.kept: list[Kept] = []
        self.log: list[str] = []

    def number(self, least: int, most: int) -> int:
        return int(self.rng.integers(least, most + 1))

    def ids(self, most: int = 22) -> list[int]:
        return self.rng.integers(7, 90, self.number(1, most)).tolist()

    def chosen(self) -> PrefixCache:
        return self.caches[self.number(0, len(self.caches) - 1)]

    def encode(self, cache: PrefixCache, ids: list[int], stop_after: int | None = None) -> None:
        marks = sorted({self.number(1, len(ids)) for _ in range(self.number(0, 2))})
        progress = encode(
            self.model, cache, ids, step_size=self.number(1, 25),
            room=self.number(0, 30), marks=marks,
        )  # fmt: skip
        for count, _ in enumerate(progress):
            if count == stop_after:
                progress.close()
                return
        assert list(cache.prefix.ids) == ids

    # Operations.

    def append(self) -> None:
        cache = self.chosen()
        self.encode(cache, [*cache.prefix.ids, *self.ids()])

    def another_prompt(self) -> None:
        """Trim: what differs behind a random place is taken back."""
        cache = self.chosen()
        kept = self.number(0, len(cache.prefix))
        self.encode(cache, [*cache.prefix.ids[:kept], *self.ids()])

    def fork(self) -> None:
        if len(self.caches) < 4:
            self.caches.append(self.chosen().snapshot())

    def fork_and_grow_both(self) -> None:
        cache = self.chosen()
        other = cache.snapshot()
        self.encode(cache, [*cache.prefix.ids, *self.ids()])
        self.encode(other, [*other.prefix.ids, *self.ids()])
        self.caches[-1] = other

    def go_back(self) -> None:
        cache = self.chosen()
        kept = self.number(0, len(cache.prefix))
        cache.prefix = cache.prefix.back_to([*cache.prefix.ids[:kept], 95])

    def decode(self) -> None:
        prefix = self.chosen().prefix
        decoded(self.model, canvas(self.number(0, 99), self.number(1, 14)), prefix)

    def commit(self) -> None:
        """As the loop does after a canvas, without waiting; some caches in one call."""
        some = self.caches[: self.number(1, len(self.caches))]
        rows = [self.ids(14) for _ in some]
        _, longer = self.model.encode(rows, [cache.prefix for cache in some])
        for cache, prefix in zip(some, longer, strict=True):
            cache.prefix = prefix
        mx.async_eval([prefix.arrays() for prefix in longer])

    def leave_between_chunks(self) -> None:
        cache = self.chosen()
        ids = [*cache.prefix.ids[: self.number(0, len(cache.prefix))], *self.ids(60)]
        self.encode(cache, ids, stop_after=self.number(0, 4))
        assert list(cache.prefix.ids) == ids[: len(cache.prefix)]

    def interrupt_in_the_layers(self) -> None:
        """An exception from the n-th layer that is run, at the latest in the last chunk."""
        cache, calls = self.chosen(), self.number(1, 3 * len(self.model.layers))
        layer = type(self.model.layers[0])
        whole = layer.__call__

        def broken(this, *arguments):
            nonlocal calls
            calls -= 1
            if calls == 0:
                raise Interrupt
            return whole(this, *arguments)

        ids = [*cache.prefix.ids, *self.ids(60)]
        layer.__call__ = broken
        try:
            self.encode(cache, ids)
        except Interrupt:
            pass
        finally:
            layer.__call__ = whole
        assert list(cache.prefix.ids) == ids[: len(cache.prefix)]

    def interrupt_in_the_evaluation(self) -> None:
        """An exception after the longer prefix was made, before its arrays are there."""
        cache, calls = self.chosen(), self.number(1, 3)
        evaluate = mx.eval

        def broken(*arrays):
            nonlocal calls
            calls -= 1
            if calls == 0:
                raise Interrupt
            evaluate(*arrays)

        ids = [*cache.prefix.ids, *self.ids(60)]
        mx.eval = broken
        try:
            self.encode(cache, ids)
        except Interrupt:
            pass
        finally:
            mx.eval = evaluate
        assert list(cache.prefix.ids) == ids[: len(cache.prefix)]

    def interrupt_a_commit(self) -> None:
        cache, before = self.chosen(), self.chosen().prefix
        try:
            longer = self.model.encode([self.ids(5)], [cache.prefix])[1][0]
            raise Interrupt
        except Interrupt:
            del longer
        assert len(before) == len(before.ids)

    def save_and_load(self) -> None:
        cache = self.chosen()
        cache.save(self.folder / "prefix")
        self.caches[self.number(0, len(self.caches) - 1)] = PrefixCache.load(
            self.folder / "prefix", self.model
        )

    def clear(self) -> None:
        self.chosen().clear()

    OPERATIONS = (
        append, append, another_prompt, another_prompt, fork, fork_and_grow_both, go_back, decode,
        commit, leave_between_chunks, interrupt_in_the_layers, interrupt_in_the_evaluation,
        interrupt_a_commit, save_and_load, clear,
    )  # fmt: skip

    def step(self) -> None:
        operation = self.OPERATIONS[self.number(0, len(self.OPERATIONS) - 1)]
        self.log.append(operation.__name__)
        operation(self)
        for cache in self.caches:
            self.check(cache.prefix)

    def check(self, prefix: Prefix) -> None:
        """Against recomputation of its ids from nothing, in one piece."""
        if any(prefix is kept.prefix for kept in self.kept):
            return
        self.kept.append(Kept(prefix))
        fresh = encoded(self.model, list(prefix.ids)) if prefix.ids else self.model.empty_prefix()
        for layer, expected in zip(prefix.layers, fresh.layers, strict=True):
            assert layer.length == expected.length, self.log
        tried = canvas(len(self.log), 5)
        np.testing.assert_allclose(
            decoded(self.model, tried, prefix),
            decoded(self.model, tried, fresh),
            **CLOSE,
            err_msg=str(self.log),
        )

    def finish(self) -> None:
        for kept in self.kept:
            kept.check()


@pytest.mark.parametrize("group", range(8))
def test_random_sequences_equal_recomputation(tiny_model, tmp_path, group):
    """Encode, fork, go back, decode, commit, interrupt, save: 64 random sequences of 12 operations,
    with windows shorter than the sequences. Whatever happened, what a prefix says that it holds is
    what it holds, and no prefix ever changes."""
    model = tiny_model(group, sliding_window=6 + group)
    model.eval()  # as a loaded one is
    for seed in range(8):
        machine = Machine(model, 8 * group + seed, tmp_path)
        for _ in range(12):
            machine.step()
        machine.finish()
        assert max(len(kept.ids) for kept in machine.kept) > model.config.text.sliding_window

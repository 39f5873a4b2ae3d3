"""Who sees whom, rotary embeddings, and attention in blocks."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.config import FULL, SLIDING, ModelConfig, RopeConfig
from mlx_diffgemma.model import attention
from mlx_diffgemma.model.attention import Causal, Rope, attend
from mlx_diffgemma.model.cache import LayerPrefix
from mlx_diffgemma.model.diffusion_gemma import CanvasView

WINDOW = 6
BUDGETS = {"all at once": 256 << 20, "few at a time": 3 * 4 * 4 * 9, "one at a time": 1}


@pytest.fixture
def config(tiny_config):
    return ModelConfig.from_dict(tiny_config(0, sliding_window=WINDOW)).text


def spread(mask, batch: int, new: int, keys: int) -> np.ndarray:
    """Any form of mask as [B, S, K]."""
    if mask is None:
        return np.ones((batch, new, keys), bool)
    if isinstance(mask, Causal):
        query, key = np.arange(keys - new, keys)[:, None], np.arange(keys)
        seen = key <= query
        if mask.window is not None:
            seen &= query - key < mask.window
        return np.broadcast_to(seen, (batch, new, keys))
    return np.broadcast_to(np.array(mask)[:, 0], (batch, new, keys))


class Sight:
    """Which keys each query was shown, by calls of MLX's attention: keys are told apart by their
    first number, their position, and a query by its own."""

    def __init__(self, monkeypatch) -> None:
        self.seen: dict[int, set[int]] = {}
        self.masks: list[tuple[int, ...]] = []
        self.scores: list[int] = []
        monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", self._attend)

    def _attend(self, queries, keys, values, *, scale, mask):
        assert scale == 1.0
        assert mx.array_equal(keys, values)
        new, total = queries.shape[2], keys.shape[2]
        self.scores.append(new * total)
        if isinstance(mask, mx.array):
            self.masks.append(mask.shape)
            shown = np.broadcast_to(np.array(mask), (*mask.shape[:2], new, total))[0, 0]
        elif mask is None:
            shown = np.ones((new, total), bool)
        else:
            assert mask == "causal"
            shown = np.tri(new, total, total - new, dtype=bool)
        names = np.array(keys)[0, 0, :, 0].astype(int)
        for query, row in zip(
            np.array(queries)[0, 0, :, 0].astype(int).tolist(), shown, strict=True
        ):
            assert query not in self.seen
            self.seen[query] = set(names[row].tolist())
        return queries


def numbered(start: int, stop: int) -> mx.array:
    """[1, 1, S, 1] that bear their position."""
    return mx.arange(start, stop, dtype=mx.float32)[None, None, :, None]


CASES = [
    (offset, new)
    for offset in (0, 1, WINDOW - 1, WINDOW, 17)
    for new in (1, 3, WINDOW, WINDOW + 1, 15)
]


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("kind", [FULL, SLIDING])
@pytest.mark.parametrize("offset, new", CASES)
def test_the_encoder_sees_what_the_rule_says(monkeypatch, config, offset, new, kind, budget):
    """A token sees itself and what came before; in a sliding layer of the last `window` positions
    only, itself included. So it is whatever the blocks are."""
    monkeypatch.setattr(attention, "_SCORE_BYTES", budget)
    window = None if kind == FULL else WINDOW
    assert {Causal(WINDOW if sizes.is_sliding else None) for sizes in config.attention} == {
        Causal(None), Causal(WINDOW),
    }  # fmt: skip
    layer = LayerPrefix(window)
    if offset:
        layer, _, _ = layer.extended(numbered(0, offset), numbered(0, offset))
    _, keys, values = layer.extended(numbered(offset, offset + new), numbered(offset, offset + new))
    sight = Sight(monkeypatch)
    attend(numbered(offset, offset + new), keys, values, Causal(window))
    assert len(sight.seen) == new
    for query, seen in sight.seen.items():
        first = 0 if window is None else max(0, query - (WINDOW - 1))
        assert seen == set(range(first, query + 1)), (kind, query)


@pytest.mark.parametrize("kind", [FULL, SLIDING])
@pytest.mark.parametrize("offset", [0, 4, WINDOW - 1, WINDOW, 17])
def test_a_canvas_sees_what_the_rule_says(monkeypatch, offset, kind):
    """Every canvas token sees the whole canvas and all that is held of the prefix: in a sliding
    layer the last `window - 1` positions."""
    canvas, window = 5, None if kind == FULL else WINDOW
    layer = LayerPrefix(window)
    if offset:
        layer, _, _ = layer.extended(numbered(0, offset), numbered(0, offset))
    here = numbered(offset, offset + canvas)
    sight = Sight(monkeypatch)
    attend(here, *layer.followed_by(here, here), None)
    first = 0 if window is None else max(0, offset - (WINDOW - 1))
    assert sight.seen == {
        query: set(range(first, offset + canvas)) for query in range(offset, offset + canvas)
    }


def test_every_layer_attends_by_its_own_rule(tiny_model, monkeypatch):
    """The model hands each layer's rule to its own attention, and none to a canvas."""
    model = tiny_model(0, sliding_window=WINDOW)
    rules: list = []

    def listening(queries, keys, values, mask, *, bounded=False):
        rules.append(mask)
        return attend(queries, keys, values, mask, bounded=bounded)

    monkeypatch.setattr("mlx_diffgemma.model.diffusion_gemma.attend", listening)
    windows = [WINDOW if sizes.is_sliding else None for sizes in model.config.text.attention]
    _, prefixes = model.encode([[7, 8], [9]], [model.empty_prefix()] * 2)
    assert rules == [Causal(window) for window in windows for _ in range(2)]
    rules.clear()
    model.decode([CanvasView(mx.array([7, 8, 9]), prefix) for prefix in prefixes])
    assert rules == [None] * 2 * len(windows)


def test_no_mask_of_prompt_times_prompt(monkeypatch):
    """A short chunk behind a long prefix needs no mask in full layers, a narrow one in sliding."""
    offset, new = 100_000, 32
    sight = Sight(monkeypatch)
    keys = numbered(0, offset + new)
    attend(keys[:, :, offset:], keys, keys, Causal(None))
    assert sight.masks == []
    sight.seen.clear()
    held = keys[:, :, offset - (WINDOW - 1) :]
    attend(keys[:, :, offset:], held, held, Causal(WINDOW))
    assert sight.masks == [(1, 1, new, WINDOW - 1 + new)]
    attend(keys[:, :, :16], keys, keys, None)
    assert sight.masks == [(1, 1, new, WINDOW - 1 + new)]


@pytest.mark.parametrize("window", [None, 1024])
def test_a_chunk_as_long_as_the_prompt_needs_no_mask_larger_than_a_block(monkeypatch, window):
    """16,384 tokens at once: scores and masks stay within the budget of a block, and every query
    sees no more keys than its rule lets it."""
    new, shapes, masks = 16_384, [], []

    def recording(queries, keys, values, *, scale, mask):
        shapes.append((queries.shape, keys.shape))
        if isinstance(mask, mx.array):
            masks.append(mask.shape)
        return queries

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", recording)
    heads = mx.zeros((1, 4, new, 1), mx.bfloat16)
    out = attend(heads, heads[:, :1], heads[:, :1], Causal(window))
    assert out.shape == heads.shape
    assert len(shapes) > 1
    blocks = [queries[2] for queries, _ in shapes]
    assert sum(blocks) == new and max(blocks) - min(blocks) < len(blocks)  # they are even
    for queries, keys in shapes:
        assert 2 * queries[1] * queries[2] * min(keys[2], new) <= 64 << 20
        if window is not None:
            assert keys[2] <= queries[2] + window - 1
    assert all(mask[2] * mask[3] <= 1 << 23 for mask in masks)  # 8 MB of booleans
    assert bool(masks) == (window is not None)


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(1e4),
        RopeConfig(1e6, "proportional", 0.25),
        RopeConfig(1e4, "proportional", 0.5, factor=8.0),
    ],
)
@pytest.mark.parametrize("offset", [0, 1000, 200_000])
def test_rope(rope, offset):
    size, length = 32, 7
    x = np.random.default_rng(0).normal(size=(2, 3, length, size)).astype(np.float32)
    rotated = int(rope.partial_rotary_factor * size // 2)
    expected = x.astype(np.float64).copy()
    for place in range(length):
        for d in range(rotated):
            inverse = np.float32(1.0) / np.float32(
                np.float32(rope.theta) ** np.float32(2 * d / size)
            )
            angle = float(np.float32(offset + place) * inverse / np.float32(rope.factor))
            a, b = x[..., place, d], x[..., place, d + size // 2]
            expected[..., place, d] = a * np.cos(angle) - b * np.sin(angle)
            expected[..., place, d + size // 2] = b * np.cos(angle) + a * np.sin(angle)
    found = np.array(Rope(size, rope)(mx.array(x), offset))
    # One unit of float32 in an angle of 200,000 is 0.016.
    np.testing.assert_allclose(found, expected, atol=1e-5 + offset * 4e-7)
    still = [d for d in range(size) if d % (size // 2) >= rotated]
    np.testing.assert_array_equal(found[..., still], x[..., still])


def test_rope_takes_an_offset_for_each_row():
    rope = Rope(16, RopeConfig(1e4))
    x = mx.random.normal((3, 2, 5, 16), key=mx.random.key(0))
    offsets = [4, 0, 11]
    together = np.array(rope(x, mx.array(offsets)))
    for row, offset in enumerate(offsets):
        np.testing.assert_allclose(
            together[row], np.array(rope(x[row : row + 1], offset))[0], atol=1e-6
        )


def naive_attention(queries, keys, values, seen):
    groups = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat(groups, axis=1), values.repeat(groups, axis=1)
    scores = np.einsum("bhqd,bhkd->bhqk", queries, keys)  # the scale is 1
    scores = np.where(seen[:, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bhkd->bhqd", p / p.sum(-1, keepdims=True), values)


@pytest.mark.parametrize("kind", ["causal", "window", "none", "array", "rows"])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("budget", [256 << 20, 4 * 2 * 4 * 13 * 3, 1])
def test_attend_equals_a_naive_one_in_blocks_too(monkeypatch, kind, budget, bounded):
    """`budget` bytes of scores: all at once, three queries at a time, one at a time."""
    monkeypatch.setattr(attention, "_SCORE_BYTES", budget)
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(2, 4, 8, 16)).astype(np.float32)
    keys, values = rng.normal(size=(2, 2, 2, 13, 16)).astype(np.float32)
    mask = {
        "causal": Causal(),
        "window": Causal(5),
        "none": None,
        "array": mx.array(np.tri(8, 13, 5, dtype=bool) & ~np.tri(8, 13, 1, dtype=bool))[None, None],
        "rows": mx.array(rng.random((2, 1, 1, 13)) < 0.6),
    }[kind]
    arrays = mx.array(queries), mx.array(keys), mx.array(values)
    found = np.array(attend(*arrays, mask, bounded=bounded))
    expected = naive_attention(queries, keys, values, spread(mask, 2, 8, 13))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rope_at_places_is_rope_at_those_positions():
    rope = Rope(16, RopeConfig(1e4))
    x = mx.random.normal((1, 3, 9, 16), key=mx.random.key(0))
    whole = np.array(rope(x, 21))
    places = [0, 3, 4, 8]
    part = rope(x[:, :, mx.array(places)], 21, mx.array(places))
    np.testing.assert_allclose(np.array(part), whole[:, :, places], atol=1e-6)

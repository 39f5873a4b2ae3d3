"""Who sees whom, rotary embeddings, and attention in blocks."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.config import FULL, SLIDING, ModelConfig, RopeConfig
from mlx_diffgemma.model import attention
from mlx_diffgemma.model.attention import Rope, attend, decoder_masks, encoder_masks
from mlx_diffgemma.model.cache import PrefixCache

WINDOW = 6


@pytest.fixture
def config(tiny_config):
    return ModelConfig.from_dict(tiny_config(0, sliding_window=WINDOW)).text


def spread(mask, batch: int, new: int, keys: int) -> np.ndarray:
    """Any form of mask as [B, S, K]."""
    if mask is None:
        return np.ones((batch, new, keys), bool)
    if isinstance(mask, str):
        assert mask == "causal"
        return np.broadcast_to(np.tri(new, keys, keys - new, dtype=bool), (batch, new, keys))
    return np.broadcast_to(np.array(mask)[:, 0], (batch, new, keys))


CASES = [
    (offset, new, pads)
    for offset in (0, 1, WINDOW - 1, WINDOW, 17)
    for new in (1, 3, WINDOW, WINDOW + 1, 15)
    for pads in (None, [0, 3], [4, 0], [2, 2])
]


@pytest.mark.parametrize("offset, new, pads", CASES)
def test_encoder_masks_say_what_the_rule_says(config, offset, new, pads):
    cache = PrefixCache([], pads)
    cache.offset = offset
    masks = encoder_masks(config, cache, new)
    for kind, first in ((FULL, 0), (SLIDING, max(0, offset - (WINDOW - 1)))):
        seen = spread(masks[kind], 2, new, offset + new - first)
        for row in range(2):
            pad = pads[row] if pads else 0
            for query in range(new):
                position = offset + query
                if position < pad:
                    assert seen[row, query].any()  # a softmax over nothing would be NaN
                    continue
                for key in range(seen.shape[2]):
                    other = first + key
                    visible = pad <= other <= position  # a token sees itself and what came before
                    if kind == SLIDING:  # … of the last `window` positions, itself included
                        visible = visible and position - other < WINDOW
                    assert seen[row, query, key] == visible, (kind, row, query, key)


@pytest.mark.parametrize("offset", [4, WINDOW - 1, WINDOW, 17])
@pytest.mark.parametrize("pads", [None, [0, 3], [4, 0]])
def test_decoder_masks_say_what_the_rule_says(config, offset, pads):
    canvas = 5
    cache = PrefixCache([], pads)
    cache.offset = offset
    masks = decoder_masks(config, cache, canvas)
    for kind, held in ((FULL, offset), (SLIDING, min(offset, WINDOW - 1))):
        seen = spread(masks[kind], 2, canvas, held + canvas)
        for row in range(2):
            pad = pads[row] if pads else 0
            for key in range(held + canvas):
                position = offset - held + key  # every canvas token sees all but padding
                assert (seen[row, :, key] == (position >= pad)).all()


def test_no_mask_of_prompt_times_prompt(config):
    """A short chunk behind a long prefix needs no mask in full layers, a narrow one in sliding."""
    cache = PrefixCache([])
    cache.offset = 100_000
    masks = encoder_masks(config, cache, 32)
    assert masks[FULL] == "causal"
    assert masks[SLIDING].shape == (1, 1, 32, WINDOW - 1 + 32)
    assert decoder_masks(config, cache, 16) == {FULL: None, SLIDING: None}


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


@pytest.mark.parametrize("kind", ["causal", "none", "array", "rows"])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("budget", [256 << 20, 4 * 2 * 4 * 13 * 3, 1])
def test_attend_equals_a_naive_one_in_blocks_too(monkeypatch, kind, budget, bounded):
    """`budget` bytes of scores: all at once, three queries at a time, one at a time."""
    monkeypatch.setattr(attention, "_SCORE_BYTES", budget)
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(2, 4, 8, 16)).astype(np.float32)
    keys, values = rng.normal(size=(2, 2, 2, 13, 16)).astype(np.float32)
    mask = {
        "causal": "causal",
        "none": None,
        "array": mx.array(np.tri(8, 13, 5, dtype=bool) & ~np.tri(8, 13, 1, dtype=bool))[None, None],
        "rows": mx.array(rng.random((2, 1, 1, 13)) < 0.6),
    }[kind]
    arrays = mx.array(queries), mx.array(keys), mx.array(values)
    found = np.array(attend(*arrays, mask, bounded=bounded))
    expected = naive_attention(queries, keys, values, spread(mask, 2, 8, 13))
    np.testing.assert_allclose(found, expected, atol=1e-5)

"""Training sees what inference sees: each canvas after the prefix of its own sequence."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from one_pass import decoded, encoded
from training import furthest, gradients, random_batch

from mlx_diffgemma import cpu
from mlx_diffgemma.model.attention import attend, canvas_masks
from mlx_diffgemma.train import forward


@pytest.mark.parametrize("forms", [False, True], ids=["plain", "training"])
@pytest.mark.parametrize("seed", [0, 1, 4])
def test_logits_are_those_of_inference(tiny_model, seed, forms):
    """Each sequence alone, through the prefix cache; prefixes beyond the window among them."""
    model = tiny_model(seed)
    window = model.config.text.sliding_window
    prefixes = (1, window - 1, window, window + 1, 2 * window + 3)
    batch = random_batch(model, prefixes, seed=seed)
    soft = mx.random.normal((5, batch.canvas.shape[1], model.config.text.hidden_size))
    if forms:
        cpu.use(model)
    model.train()
    hidden, kept = forward.encode(model, batch.sequence)
    ours = forward.decode(model, batch.corrupted, kept, batch.prefix, soft)
    model.eval()
    for row, prefix in enumerate(prefixes):
        expected, held = encoded(model, batch.sequence[row, :prefix].tolist())
        _close(hidden[row, :prefix], expected)
        _close(ours[row], decoded(model, batch.corrupted[row], held, soft[row]))


def test_what_follows_the_prefix_is_not_seen(tiny_model):
    """Neither the clean tokens of the canvas itself, nor what comes behind it."""
    model = tiny_model(2)
    batch = random_batch(model, (5, 9), tail=20)
    other = np.array(batch.sequence)
    other[0, 5:], other[1, 9:] = 8, 9
    seen = []
    for sequence in (batch.sequence, mx.array(other)):
        _, kept = forward.encode(model, sequence)
        seen.append(np.array(forward.decode(model, batch.corrupted, kept, batch.prefix)))
    np.testing.assert_array_equal(*seen)


@pytest.mark.parametrize("conditioned", [0, 2])
def test_checkpointing_changes_no_gradient(tiny_model, conditioned):
    model = tiny_model(1)
    batch = random_batch(model, conditioned=conditioned)
    losses, expected = gradients(model, batch)
    again_losses, again = gradients(model, batch, checkpoint=True)
    assert losses == again_losses
    apart, name = furthest(again, expected)
    assert apart < 1e-5, name


def test_masks():
    """Two sequences whose canvases of 2 start at 1 and at 4, with a window of 3."""
    config = type("Sizes", (), {"sliding_window": 3})
    masks = canvas_masks(config, mx.array([1, 4]), length=5, canvas=2)
    assert np.array(masks["full_attention"])[:, 0, 0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 1, 1],
        [1, 1, 1, 1, 0, 1, 1],
    ]
    assert np.array(masks["sliding_attention"])[:, 0, 0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 1, 1],
        [0, 0, 1, 1, 0, 1, 1],
    ]


def test_the_encoder_sees_what_came_before(tiny_model):
    """With a window of 3, in sliding layers; four tokens, whose values say which they are."""
    model = tiny_model(0, sliding_window=3)
    rules = {layer.self_attn.sizes.kind: layer.self_attn.causal for layer in model.layers}
    alike, own = mx.zeros((1, 1, 4, 4)), mx.eye(4)[None, None]
    seen = {kind: np.array(attend(alike, alike, own, rule))[0, 0] for kind, rule in rules.items()}
    assert (seen["full_attention"] > 0).astype(int).tolist() == np.tril(np.ones((4, 4))).tolist()
    assert (seen["sliding_attention"] > 0).astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [0, 1, 1, 1],
    ]


def _close(ours: mx.array, expected: mx.array) -> None:
    scale = mx.abs(expected).max().item()
    np.testing.assert_allclose(np.array(ours), np.array(expected), rtol=0, atol=1e-4 * scale)

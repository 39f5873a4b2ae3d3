"""Training sees what inference sees: each canvas after the prefix of its own sequence."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from one_pass import decoded, encoded
from tiny_models import make_config, make_model, make_weights
from tiny_pictures import CLIPPED, PLAIN, drawn, make_vision, make_vision_weights
from training import furthest, gradients, random_batch

from mlx_diffgemma import cpu
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import PromptError, UsageError
from mlx_diffgemma.model.attention import attend, canvas_masks
from mlx_diffgemma.pictured import PictureSpan
from mlx_diffgemma.text.pictures import Picture
from mlx_diffgemma.train import forward
from mlx_diffgemma.train.batches import Drawn, Sizes, lay_out
from mlx_diffgemma.train.config import TrainConfig
from mlx_diffgemma.train.examples import Batch, Example


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
    hidden, kept = forward.encode(model, batch)
    ours = forward.decode(model, batch.corrupted, kept, batch.prefix, soft)
    model.eval()
    for row, prefix in enumerate(prefixes):
        expected, held = encoded(model, batch.sequence[row, :prefix].tolist())
        _close(hidden[row, :prefix], expected)
        _close(ours[row], decoded(model, batch.corrupted[row], held, soft[row]))


def pictured(
    config: ModelConfig, shapes: list[list[tuple[int, int]]], tail: int = 9
) -> tuple[Batch, list[Example]]:
    """A batch of sequences with pictures of so many soft tokens down and across among 3 ids each,
    in front of a response of `tail` ids; and its examples."""
    rng, number, drawn_ones = np.random.default_rng(5), 0, []
    vocab, canvas = config.text.vocab_size, config.canvas_length
    for row, inside in enumerate(shapes):
        ids, spans = rng.integers(7, vocab, 1 + 2 * row).tolist(), []
        for down, across in inside:
            picture = Picture(drawn(48 * down, 48 * across, number), 16, 3)
            stop = len(ids) + down * across
            spans.append(PictureSpan(len(ids), stop, f"{number}", picture.patches, picture.columns))
            ids += [6] * (down * across) + rng.integers(7, vocab, 3).tolist()
            number += 1
        tokens = (*ids, *rng.integers(7, vocab, tail).tolist())
        drawn_ones.append(Drawn(Example(tokens, len(ids), tuple(spans)), 0))
    corrupted = rng.integers(7, vocab, (len(shapes), canvas))
    sizes = Sizes(canvas, vocab, (1,), config.text.max_position_embeddings)
    return lay_out(
        drawn_ones, TrainConfig(), sizes, corrupted, np.full(len(shapes), 0.5), conditioned=0
    ), [one.example for one in drawn_ones]


@pytest.mark.parametrize("seed", [0, 1])
def test_pictures_are_seen_as_in_inference(seed):
    """One, two and no pictures in sequences of one batch, longer than the window."""
    raw = make_config(seed) | {"vision_config": CLIPPED if seed else PLAIN}
    config = ModelConfig.from_dict(raw)
    assert config.vision is not None
    size = config.text.hidden_size
    model = make_model(config, make_weights(config, seed))
    tower = make_vision_weights(config.vision, size, seed)
    model.load_vision = lambda: make_vision(config.vision, size, tower)
    batch, examples = pictured(config, [[(2, 3)], [(2, 3), (2, 3)], []])
    assert max(one.prompt for one in examples) > config.text.sliding_window
    hidden, kept = forward.encode(model, batch)
    ours = forward.decode(model, batch.corrupted, kept, batch.prefix)
    for row, one in enumerate(examples):
        seen = {span: model.embed_picture(span) for span in one.pictures}
        ids = one.tokens[: one.prompt]
        expected, (prefix,) = model.encode([ids], [model.empty_prefix()], [seen])
        _close(hidden[row, : one.prompt], expected)
        _close(ours[row], decoded(model, batch.corrupted[row], prefix))


def test_pictures_of_a_batch_that_differ_in_size_are_refused():
    raw = make_config(0) | {"vision_config": PLAIN}
    config = ModelConfig.from_dict(raw)
    for shapes in ([[(2, 3)], [(3, 2)]], [[(2, 3), (1, 1)]], [[(1, 4)], [(2, 2)]]):
        with pytest.raises(UsageError, match="differ in size; bring all to one, or lower"):
            pictured(config, shapes)


def test_pictures_without_a_tower_are_refused():
    config = ModelConfig.from_dict(make_config(0))
    batch, _ = pictured(config, [[(2, 3)]])
    with pytest.raises(PromptError, match="vision tower"):
        forward.encode(make_model(config, make_weights(config, 0)), batch)


def test_what_follows_the_prefix_is_not_seen(tiny_model):
    """Neither the clean tokens of the canvas itself, nor what comes behind it."""
    model = tiny_model(2)
    batch = random_batch(model, (5, 9), tail=20)
    other = np.array(batch.sequence)
    other[0, 5:], other[1, 9:] = 8, 9
    seen = []
    for sequence in (batch.sequence, mx.array(other)):
        _, kept = forward.encode(model, replace(batch, sequence=sequence))
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

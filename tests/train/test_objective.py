"""What is minimized, and that it is computed from the canvas that was corrupted."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from one_pass import encoded
from training import copy_task, furthest, gradients, random_batch

from mlx_diffgemma.train import objective
from mlx_diffgemma.train.batches import Batches
from mlx_diffgemma.train.config import TrainConfig
from mlx_diffgemma.train.loop import sizes_of
from mlx_diffgemma.train.objective import loss


@pytest.fixture
def seen(monkeypatch):
    """The canvases that reach the decoder, and the self-conditioning that comes with each."""
    passes = []
    decode = objective.decode

    def spy(model, canvas, kept, prefix, soft=None, **options):
        passes.append((np.array(canvas), None if soft is None else np.array(soft)))
        return decode(model, canvas, kept, prefix, soft, **options)

    monkeypatch.setattr(objective, "decode", spy)
    return passes


def test_the_decoder_sees_the_canvas_that_was_corrupted(tiny_model, seen):
    model = tiny_model(0)
    batch = random_batch(model, conditioned=2)
    loss(model, batch)
    first, second = seen
    np.testing.assert_array_equal(second[0], np.array(batch.corrupted))
    np.testing.assert_array_equal(first[0], np.array(batch.corrupted)[:2])
    assert first[1] is None
    assert np.abs(second[1][:2]).min(axis=-1).max() > 0 and not second[1][2].any()


def test_the_batch_is_corrupted_once_and_stays_so(tiny_model, seen):
    """From the data to the decoder: at t near 0 it sees the clean canvas, else what was drawn."""
    model = tiny_model(0)
    config = TrainConfig(batch_size=4, self_conditioning=0.0)
    batch = Batches([copy_task(n) for n in range(8)], config, sizes_of(model))[3]
    loss(model, batch)
    clean, corrupted = np.array(batch.canvas), np.array(batch.corrupted)
    np.testing.assert_array_equal(seen[0][0], corrupted)
    share = (clean != corrupted).mean(axis=1)
    assert np.abs(share - np.array(batch.noise)).max() < 0.4 and share.max() > 0.2


def test_loss_changes_with_the_corruption(tiny_model):
    model = tiny_model(0)
    batch = random_batch(model)
    other = np.array(batch.corrupted)
    other[1, 2] = 7 if other[1, 2] != 7 else 8
    before, after = loss(model, batch), loss(model, replace(batch, corrupted=mx.array(other)))
    assert before[1].item() != after[1].item()  # of the canvas
    assert before[2].item() == after[2].item()  # of the encoder, which reads the clean sequence


def test_encoder_loss_counts_what_it_is_to_count(tiny_model):
    model = tiny_model(1)
    batch = random_batch(model)
    total, canvas, encoder = (one.item() for one in loss(model, batch, encoder_weight=0.3))
    assert total == pytest.approx(canvas + 0.3 * encoder, rel=1e-5)
    hidden = mx.stack([encoded(model, row)[0] for row in batch.sequence.tolist()])
    logits = np.array(model.logits(hidden), np.float64)[:, :-1]
    log_share = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    target = np.array(batch.sequence)[:, 1:, None]
    nats = -np.take_along_axis(log_share, target, axis=-1)[..., 0]
    assert encoder == pytest.approx(nats[np.array(batch.counted)].mean(), rel=1e-4)
    nothing = replace(batch, counted=mx.zeros_like(batch.counted))
    assert loss(model, nothing)[2].item() == 0


def test_first_pass_has_no_gradient(tiny_model, monkeypatch):
    """The gradient is that with the expectation of the first pass held fixed."""
    model = tiny_model(2)
    batch = random_batch(model, conditioned=3)
    _, ours = gradients(model, batch, encoder_weight=0.0)
    _, kept = objective.encode(model, batch)
    logits = model.logits(objective.decode(model, batch.corrupted, kept, batch.prefix))
    fixed = mx.array(np.array(logits))
    monkeypatch.setattr(
        objective, "expected_embeddings", lambda model, *_: model.soft_embeddings(fixed)
    )
    _, expected = gradients(model, batch, encoder_weight=0.0)
    apart, name = furthest(ours, expected)
    assert apart < 2e-3, name


@pytest.mark.parametrize("conditioned", [0, 2])
def test_gradients_are_finite_differences(tiny_model, conditioned):
    """Along the gradient of each kind of parameter, the first pass included in neither. All experts
    are chosen: where a router changes its choice, the loss jumps."""
    model = tiny_model(0, num_experts=3, top_k_experts=3)
    batch = random_batch(model, conditioned=conditioned)
    _, kept = objective.encode(model, batch)
    soft = objective.expected_embeddings(model, batch, kept)
    _, slopes = gradients(model, batch)
    parameters = dict(tree_flatten(model.trainable_parameters()))
    checked = [
        "model.decoder.layers.0.self_attn.q_proj.weight",
        "model.decoder.layers.1.self_attn.k_norm.weight",
        "model.decoder.layers.1.mlp.down_proj.weight",
        "model.decoder.layers.0.experts.gate_up_proj.weight",
        "model.decoder.layers.2.experts.down_proj.weight",
        "model.decoder.layers.0.router.per_expert_scale",
        "model.decoder.layers.0.layer_scalar",
        "model.encoder.language_model.layers.0.layer_scalar",
    ]
    if conditioned:
        checked.append("model.decoder.self_conditioning.up_proj.weight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "expected_embeddings", lambda *_: soft)
        for name in checked:
            slope = slopes[name].astype(np.float64)
            length = np.linalg.norm(slope)
            step = 1e-3 / length  # a thousandth of a nat, of some 13 in float32
            direction = mx.array((slope / length).astype(np.float32))
            ends = []
            for sign in (1, -1):
                model.load_weights([(name, parameters[name] + sign * step * direction)], False)
                ends.append(loss(model, batch)[0].item())
            model.load_weights([(name, parameters[name])], False)
            assert ends[0] - ends[1] == pytest.approx(2e-3, rel=0.04), name

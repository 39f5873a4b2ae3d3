"""Cross-entropy in blocks is that of the whole, with its gradients, in less memory."""

from __future__ import annotations

import adapter_models as models
import mlx.core as mx
import numpy as np
import pytest
from tiny_models import make_config, make_model, make_weights

from mlx_diffgemma import cpu
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.train import cross_entropy as room


def value_and_gradients(model, hidden, targets):
    """Mean loss, and its gradients in the hidden states and in what of the model is trained."""
    table = model.model.decoder.embed_tokens
    before = table.trainable_parameters()

    def loss(hidden, parameters):
        table.update(parameters)
        nats = room.cross_entropy(model, hidden, targets)
        return (nats * mx.arange(targets.size).reshape(targets.shape)).sum() / targets.size

    value, (pull, on_table) = mx.value_and_grad(loss, argnums=(0, 1))(hidden, before)
    mx.eval(value, pull, on_table)
    table.update(before)
    arrays = {"loss": value, "hidden": pull, **on_table}
    return {name: np.array(array) for name, array in arrays.items()}


@pytest.mark.parametrize("how", ["frozen", "trained", "quantized"])
def test_blocks_are_the_whole(monkeypatch, how):
    model = models.small_model(("affine", 8, 32) if how == "quantized" else None)
    model.train()
    model.freeze()
    if how == "trained":
        model.model.decoder.embed_tokens.unfreeze()
    text = model.config.text
    hidden = mx.random.normal((2, 11, text.hidden_size), key=mx.random.key(0))
    targets = mx.random.randint(0, text.vocab_size, (2, 11), key=mx.random.key(1))
    whole = value_and_gradients(model, hidden, targets)
    assert set(whole) == {"loss", "hidden"} | ({"weight"} if how == "trained" else set())
    seen = []
    logits = model.logits

    def counted(x):
        seen.append(x.shape)
        return logits(x)

    monkeypatch.setattr(type(model), "logits", lambda self, x: counted(x))
    monkeypatch.setattr(room, "BLOCK", 5 * text.vocab_size)
    blocks = value_and_gradients(model, hidden, targets)
    assert seen == [(5, text.hidden_size)] * 4 + [(2, text.hidden_size)] + seen[:5]
    for name, expected in whole.items():
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(blocks[name], expected, rtol=1e-4, atol=atol)


def test_few_logits_are_there_at_once(monkeypatch):
    config = ModelConfig.from_dict(make_config(1, vocab_size=8192, **models.SIZES))
    model = make_model(config, make_weights(config, 1))
    cpu.use(model)
    model.train()
    model.freeze()
    hidden = mx.random.normal((1, 512, 64))
    targets = mx.zeros((1, 512), mx.int32)
    mx.eval(model.parameters(), hidden, targets)

    def peak() -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        value_and_gradients(model, hidden, targets)
        return mx.get_peak_memory() - before

    whole = peak()
    monkeypatch.setattr(room, "BLOCK", 16 * 8192)
    assert peak() < whole / 4

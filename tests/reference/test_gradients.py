"""Loss and every gradient against torch's autograd through transformers, on random small models.

Ours computes a batch whose sequences have different lengths and prefixes; theirs each example
alone, without padding: the encoder over the clean sequence for the next token, then over the
prefix, which the decoder continues.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_model import build_reference
from tiny_models import make_config, make_model, make_weights
from torch.nn.functional import cross_entropy

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.train.examples import Batch

sys.path.append(str(Path(__file__).parents[1] / "train"))
from training import furthest, gradients, random_batch

pytestmark = pytest.mark.reference

RELATIVE = 1e-3


def reference_gradients(model, batch: Batch, encoder_weight: float) -> tuple[float, dict]:
    """The same loss and gradients from the reference, by our names."""
    layers = [*model.model.encoder.language_model.layers, *model.model.decoder.layers]
    for layer in layers:
        layer.layer_scalar.requires_grad_(True)  # a buffer there
    tensors = {
        name: torch.from_numpy(np.array(getattr(batch, name))).long()
        for name in ("sequence", "prefix", "canvas", "corrupted", "counted")
    }
    counted = tensors["counted"].sum()
    rows, canvas_length = tensors["canvas"].shape
    total = torch.zeros(())
    for row in range(rows):
        sequence, prefix = tensors["sequence"][row], int(tensors["prefix"][row])
        canvas, target = tensors["corrupted"][row][None], tensors["canvas"][row]
        if encoder_weight:
            where = tensors["counted"][row].nonzero()[:, 0]
            used = sequence[: int(where.max()) + 2]
            hidden = model.model.encoder(input_ids=used[None]).last_hidden_state[0]
            raw = model.lm_head(hidden)[:-1]
            capped = torch.tanh(raw / 30.0) * 30.0
            nats = cross_entropy(capped[where], used[1:][where], reduction="sum")
            total = total + encoder_weight * nats / counted
        given = {"input_ids": sequence[None, :prefix], "decoder_input_ids": canvas}
        if row < batch.conditioned:
            with torch.no_grad():
                given["self_conditioning_logits"] = model(**given).logits
        logits = model(**given).logits[0]
        total = total + cross_entropy(logits, target, reduction="sum") / (rows * canvas_length)
    total.backward()
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    weights = {
        name.replace("_proj", "_proj.weight") if ".experts." in name else name: tensor.grad.numpy()
        for name, tensor in named.items()
        if tensor.grad is not None
    }
    return total.item(), weights


@pytest.mark.parametrize(
    ("seed", "encoder_weight", "conditioned"),
    [(0, 1.0, 0), (1, 1.0, 2), (6, 0.7, 3), (5, 1.0, 1), (3, 0.0, 2)],
)
def test_loss_and_every_gradient(seed, encoder_weight, conditioned):
    raw = make_config(seed)
    config = ModelConfig.from_dict(raw)
    weights = make_weights(config, seed, feedback=0.2)
    model, reference = make_model(config, weights), build_reference(raw, weights)
    window = config.text.sliding_window
    batch = random_batch(model, (3, window + 2, 2 * window + 5), conditioned, seed)
    losses, ours = gradients(model, batch, encoder_weight=encoder_weight)
    expected, theirs = reference_gradients(reference, batch, encoder_weight)
    # Tied weights have other names too, and what torch did not reach has no gradient.
    theirs = {name: theirs.get(name, np.zeros_like(ours[name])) for name in ours}
    apart, name = furthest(ours, theirs)
    print(f"\nloss {losses[0]:.6f} and {expected:.6f}, gradients within {apart:.1e} ({name})")
    assert losses[0] == pytest.approx(expected, rel=RELATIVE)
    assert len(ours) > 50 and apart < RELATIVE, name

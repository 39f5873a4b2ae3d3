"""The model against what the reference computed (`scripts/export_reference_trace.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import make_model

from mlx_diffgemma.config import ModelConfig

TRACE = Path(__file__).parents[1] / "traces" / "model.npz"


@pytest.fixture(scope="module")
def trace():
    return dict(np.load(TRACE))


@pytest.fixture(scope="module")
def model(trace):
    config = ModelConfig.from_dict(json.loads(str(trace["config"])))
    prefix = "weights."
    weights = {n[len(prefix) :]: w for n, w in trace.items() if n.startswith(prefix)}
    return make_model(config, weights)


def check(ours: mx.array, theirs: np.ndarray) -> None:
    ours, largest = np.array(ours), np.abs(theirs).max()
    assert largest > 2
    error = np.abs(ours - theirs) / largest
    assert np.median(error) <= 1e-5
    assert np.quantile(error, 0.999) <= 1e-4
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


@pytest.mark.parametrize("chunk", [23, 5, 1])
def test_encoder_and_decoder(model, trace, chunk):
    prompt, canvas = mx.array(trace["prompt"]), mx.array(trace["canvas"])
    pads = trace["pads"].tolist()
    cache = model.make_cache(pads)
    parts = [model.encode(prompt[:, at : at + chunk], cache) for at in range(0, 23, chunk)]
    states = mx.concatenate(parts, axis=1)
    for row, pad in enumerate(pads):
        check(states[row, pad:], trace["encoder_states"][row, pad:])
    check(model.logits(model.decode(canvas, cache)), trace["logits_behind_prompt"])
    check(model.encode(mx.array(trace["committed"]), cache), trace["committed_states"])
    check(model.logits(model.decode(canvas, cache)), trace["logits_behind_canvas"])
    soft = model.soft_embeddings(mx.array(trace["processed"]))
    check(model.logits(model.decode(canvas, cache, soft)), trace["logits_conditioned"])


def test_the_trace_tells_self_conditioning_and_prefixes_apart(trace):
    names = ("logits_behind_prompt", "logits_behind_canvas", "logits_conditioned")
    first, second, conditioned = (trace[name] for name in names)
    assert np.abs(first - second).max() > 0.5
    assert np.abs(second - conditioned).max() > 0.5


def test_a_sequence_alone_equals_its_row(model, trace):
    pad = int(trace["pads"][1])
    cache = model.make_cache()
    model.encode(mx.array(trace["prompt"][1:, pad:]), cache)
    logits = model.logits(model.decode(mx.array(trace["canvas"][1:]), cache))
    check(logits, trace["logits_behind_prompt"][1:])

"""The model against what the reference computed (`scripts/export_reference_trace.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import make_model

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.model.diffusion_gemma import CanvasView

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


class Sequences:
    """The recorded sequences that `rows` names, without the padding of the recording: one call of
    the model for all of them."""

    def __init__(self, model, trace, rows: list[int]) -> None:
        self.model, self.trace, self.rows = model, trace, rows
        self.prefixes = [model.empty_prefix()] * len(rows)

    def encode(self, ids: list[list[int]]) -> list[mx.array]:
        """Hidden states of each sequence; one that gets no tokens is left out of the call."""
        going = [place for place, row in enumerate(ids) if row]
        if not going:
            return [mx.zeros((0, 24))] * len(ids)
        hidden, longer = self.model.encode(
            [ids[place] for place in going], [self.prefixes[place] for place in going]
        )
        for place, prefix in zip(going, longer, strict=True):
            self.prefixes[place] = prefix
        return mx.split(hidden, np.cumsum([len(row) for row in ids])[:-1].tolist())

    def check_logits(self, name: str, soft: mx.array | None = None) -> None:
        views = [
            CanvasView(
                mx.array(self.trace["canvas"][row], mx.int32),
                prefix,
                None if soft is None else soft[row],
            )
            for row, prefix in zip(self.rows, self.prefixes, strict=True)
        ]
        logits = self.model.logits(self.model.decode(views))
        check(logits.reshape(len(views), -1, logits.shape[-1]), self.trace[name][self.rows])


ALONE_AND_TOGETHER = pytest.mark.parametrize("rows", [[0, 1], [1, 0], [0], [1]], ids=str)


@ALONE_AND_TOGETHER
@pytest.mark.parametrize("chunk", [23, 5, 1])
def test_encoder_and_decoder(model, trace, chunk, rows):
    pads, both = trace["pads"], Sequences(model, trace, rows)
    states: list[list[mx.array]] = [[] for _ in rows]
    for at in range(0, 23, chunk):  # a shorter sequence is encoded whole while the other goes on
        ids = [trace["prompt"][row, pads[row] :][at : at + chunk].tolist() for row in rows]
        for place, part in enumerate(both.encode(ids)):
            states[place].append(part)
    for place, row in enumerate(rows):
        check(mx.concatenate(states[place]), trace["encoder_states"][row, pads[row] :])
        assert both.prefixes[place].ids == tuple(trace["prompt"][row, pads[row] :].tolist())
    both.check_logits("logits_behind_prompt")
    committed = both.encode(trace["committed"][rows].tolist())
    check(mx.stack(committed), trace["committed_states"][rows])
    both.check_logits("logits_behind_canvas")
    soft = model.soft_embeddings(mx.array(trace["processed"]))
    both.check_logits("logits_conditioned", soft)


def test_the_trace_tells_self_conditioning_and_prefixes_apart(trace):
    names = ("logits_behind_prompt", "logits_behind_canvas", "logits_conditioned")
    first, second, conditioned = (trace[name] for name in names)
    assert np.abs(first - second).max() > 0.5
    assert np.abs(second - conditioned).max() > 0.5


def test_a_sequence_alone_equals_its_row(model, trace):
    pad = int(trace["pads"][1])
    alone = Sequences(model, trace, [1])
    alone.encode([trace["prompt"][1, pad:].tolist()])
    alone.check_logits("logits_behind_prompt")


def test_sequences_in_different_states_go_through_together(model, trace):
    """One canvas is in its first step, one is conditioned, and one stands behind two canvases."""
    both, pads = Sequences(model, trace, [0, 1]), trace["pads"]
    both.encode([trace["prompt"][row, pads[row] :].tolist() for row in (0, 1)])
    behind_prompt = list(both.prefixes)
    both.encode(trace["committed"].tolist())
    soft = model.soft_embeddings(mx.array(trace["processed"]))
    tokens = [mx.array(row, mx.int32) for row in trace["canvas"]]
    logits = model.logits(
        model.decode(
            [
                CanvasView(tokens[1], both.prefixes[1], soft[1]),
                CanvasView(tokens[0], behind_prompt[0]),
                CanvasView(tokens[0], both.prefixes[0]),
            ]
        )
    )
    expected = np.concatenate(
        [
            trace["logits_conditioned"][1],
            trace["logits_behind_prompt"][0],
            trace["logits_behind_canvas"][0],
        ]
    )
    check(logits, expected)

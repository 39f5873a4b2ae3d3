"""The denoising loop on the demo model against runs of the reference with the same random draws
(`scripts/export_reference_trace.py`), token for token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from demo_checkpoint import demo_config, demo_weights
from replay import CanvasDraws, replay_noise, replaying
from tiny_models import make_model

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.events import DenoisingStep, Finished
from mlx_diffgemma.diffusion.generate import generate_canvases

TRACE = Path(__file__).parents[1] / "traces" / "demo.npz"
RUNS = 6


@pytest.fixture(scope="module")
def trace():
    return dict(np.load(TRACE))


@pytest.fixture(scope="module")
def model():
    return make_model(ModelConfig.from_dict(demo_config()), demo_weights())


@pytest.mark.parametrize("run", range(RUNS))
def test_every_step_is_the_references(model, trace, run):
    count = sum(name.endswith(".initial") for name in trace if name.startswith(f"{run}."))
    draws = [
        CanvasDraws(*(trace[f"{run}.{index}.{name}"] for name in ("initial", "draw", "noise")))
        for index in range(count)
    ]
    config = DiffusionConfig(max_tokens=128, eos_token_ids=(1, 5))
    events = list(
        generate_canvases(
            model,
            [trace[f"{run}.prompt"].tolist()],
            config,
            replay_noise(draws),
            denoiser=replaying(model),
        )
    )
    steps = [event.canvas for event in events if isinstance(event, DenoisingStep)]
    assert len(steps) == sum(len(canvas.draws) for canvas in draws)
    for canvas in steps:
        name, step = f"{run}.{canvas.index}", canvas.passes - 1
        assert canvas.draft.tolist() == trace[f"{name}.draft"][step][0].tolist()
        assert canvas.tokens.tolist() == trace[f"{name}.canvas"][step][0].tolist()
        accepted = np.unpackbits(trace[f"{name}.accepted"][step][0], axis=-1)
        assert canvas.accepted.tolist() == accepted.astype(bool).tolist()
    finished = events[-1]
    assert isinstance(finished, Finished)
    theirs = trace[f"{run}.tokens"][0].tolist()
    end = min((place for place, token in enumerate(theirs) if token in (1, 5)), default=128)
    assert list(finished.tokens[0]) == theirs[:end]
    assert finished.finish_reasons == (("stop" if end < 128 else "length"),)


def test_the_runs_span_two_canvases(trace):
    assert all(f"{run}.1.initial" in trace for run in range(RUNS))

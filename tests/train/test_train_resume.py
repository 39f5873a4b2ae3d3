"""A run that was stopped, or killed, ends as if it had not been."""

from __future__ import annotations

import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from training import copies, copy_task, small_model

from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma.train import state
from mlx_diffgemma.train.config import LoraParameters, TrainConfig
from mlx_diffgemma.train.events import Finished, Saved
from mlx_diffgemma.train.loop import train

CONFIG = TrainConfig(
    batch_size=2,
    grad_accumulation_steps=2,
    sorted_batches=3,
    iters=5,
    learning_rate=3e-3,
    warmup=2,
    fine_tune_type="full",
    steps_per_report=0,
    steps_per_eval=0,
    save_every=1,
    span_fraction=0.5,
)
EXAMPLES = [copy_task(number) for number in range(7)]  # less than two steps: epochs pass


def go(folder: Path, model=None, config=CONFIG, resume=True):
    return train(model or small_model(), config, EXAMPLES, [], folder, resume=resume)


def final(folder: Path) -> dict[str, np.ndarray]:
    arrays = {name: np.array(value) for name, value in mx.load(str(folder / state.STATE)).items()}
    adapters = mx.load(str(folder / state.ADAPTERS))
    for name, value in adapters.items():
        np.testing.assert_array_equal(np.array(value), arrays[f"parameters.{name}"])
    return arrays


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = final(one), final(other)
    assert ours.keys() == theirs.keys() and any(n.startswith("optimizer.") for n in ours)
    differing = [name for name in ours if not np.array_equal(ours[name], theirs[name])]
    assert not differing


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    list(go(folder))
    return folder


def test_stopped_after_each_step(tmp_path, uninterrupted):
    for step in range(1, 5):
        saved = next(event for event in go(tmp_path) if isinstance(event, Saved))
        assert saved.step == step
    assert list(go(tmp_path))[-1].step == 5
    assert_same(tmp_path, uninterrupted)
    assert list(islice(go(tmp_path), 9)) == [Finished(5, pytest.approx(0, abs=9))]  # no more to do


def test_another_seed_ends_elsewhere(tmp_path, uninterrupted):
    list(go(tmp_path, config=CONFIG.override(seed=1)))
    ours, theirs = final(tmp_path), final(uninterrupted)
    assert any(not np.array_equal(ours[name], theirs[name]) for name in ours)


def test_dropout_draws_the_same_after_resuming(tmp_path):
    from mlx_lm.tuner.utils import linear_to_lora_layers

    def adapted():
        model = small_model()
        model.freeze()
        keys = {"rank": 2, "scale": 2.0, "dropout": 0.5, "keys": ["self_attn.q_proj"]}
        linear_to_lora_layers(model, 2, keys)
        return model

    mx.random.seed(0)
    config = CONFIG.override(lora_parameters=LoraParameters(rank=2, dropout=0.5), iters=3)
    list(go(tmp_path / "whole", adapted(), config))
    next(event for event in go(tmp_path / "parts", adapted(), config) if isinstance(event, Saved))
    mx.random.seed(77)
    list(go(tmp_path / "parts", adapted(), config))
    assert_same(tmp_path / "whole", tmp_path / "parts")


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {train!r}]
from test_train_resume import go
fsync, left = os.fsync, int(sys.argv[2])
def dying(descriptor):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = dying
list(go(Path(sys.argv[1])))
"""


def test_killed_while_saving(tmp_path, uninterrupted):
    """kill -9 with the state written but not yet in its place, and between the two files. A save
    makes four calls of fsync: for each file, itself and the folder."""
    here = Path(__file__).parent
    code = KILLED.format(tests=str(here.parent), train=str(here))
    for call, steps in ((5, 1), (7, 3)):
        child = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), str(call)], capture_output=True, text=True
        )
        assert child.returncode == -signal.SIGKILL, child.stderr
        left = state.load(tmp_path, small_model().trainable_parameters(), CONFIG)
        assert left is not None and left.step == steps
    list(go(tmp_path))
    assert_same(tmp_path, uninterrupted)
    assert not list(tmp_path.glob(".*"))


def test_without_resume_a_run_begins_anew(tmp_path, uninterrupted):
    next(event for event in go(tmp_path) if isinstance(event, Saved))
    assert next(iter(go(tmp_path, resume=False))).step == 1
    list(go(tmp_path))
    assert_same(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    "settings", [{"seed": 1}, {"batch_size": 1}, {"optimizer": "adam"}], ids=str
)
def test_settings_that_must_stay(uninterrupted, settings):
    name = next(iter(settings))
    with pytest.raises(UsageError, match=f"begun with {name}"):
        list(go(uninterrupted, config=CONFIG.override(**settings)))


def test_other_parameters(uninterrupted):
    model = small_model()
    model.layers[0].freeze()
    with pytest.raises(UsageError, match="other parameters"):
        list(go(uninterrupted, model))


def test_damaged_state(tmp_path):
    (tmp_path / state.STATE).write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    with pytest.raises(CheckpointError, match="not the state of a run"):
        list(go(tmp_path))


def test_a_longer_run_goes_on(tmp_path):
    list(go(tmp_path, config=CONFIG.override(iters=2)))
    assert list(go(tmp_path, config=CONFIG.override(iters=3)))[-1].step == 3


def test_streams_resume_too(tmp_path):
    def stream(folder):
        return train(small_model(), CONFIG.override(iters=3), copies, [], folder, resume=True)

    list(stream(tmp_path / "whole"))
    next(event for event in stream(tmp_path / "parts") if isinstance(event, Saved))
    list(stream(tmp_path / "parts"))
    assert_same(tmp_path / "whole", tmp_path / "parts")

"""Several processes that train one model: as one process would, and refused where they cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from training import small_model

from mlx_diffgemma.train import processes
from mlx_diffgemma.train.batches import Batches
from mlx_diffgemma.train.config import TrainConfig
from mlx_diffgemma.train.examples import Example
from mlx_diffgemma.train.loop import sizes_of

PROGRAM = Path(__file__).with_name("together.py")
PATHS = os.pathsep.join([str(PROGRAM.parent), str(PROGRAM.parents[1])])


def go(batches: int, folders: Sequence[Path]) -> list[list[str]]:
    """What the processes of a run say, one for each of the folders."""
    where = folders[0].parent / "hosts.json"
    where.write_text(json.dumps(processes.local_hosts(len(folders))))
    programs = [
        subprocess.Popen(
            [sys.executable, PROGRAM, folder, str(batches)],
            env={**os.environ, "PYTHONPATH": PATHS, "MLX_RANK": str(rank), "MLX_HOSTFILE": where},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]
    try:
        return [process.communicate(timeout=120)[0].splitlines() for process in programs]
    finally:
        for process in programs:
            process.kill()


def alone(batches: int, folder: Path) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": PATHS}
    command = [sys.executable, PROGRAM, folder, str(batches)]
    return subprocess.check_output(command, env=environment, text=True).splitlines()


def weights(folder: Path) -> dict[str, np.ndarray]:
    read = mx.load(str(folder / "adapters.safetensors"))
    return {name: np.array(array) for name, array in read.items()}


def test_two_are_as_one(tmp_path):
    (tmp_path / "two").mkdir()
    first, other = go(4, [tmp_path / "two" / "a", tmp_path / "two" / "b"])
    expected = ["Evaluation 0", "Evaluation 2", "Saved 2", "Evaluation 3", "Saved 3", "Finished 3"]
    assert first == expected
    assert other == [line for line in expected if not line.startswith("Evaluation")]
    assert not (tmp_path / "two" / "b").exists()  # the first alone writes

    assert alone(4, tmp_path / "one") == expected
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two" / "a")
    start = dict(tree_flatten(small_model().trainable_parameters()))
    assert start.keys() == one.keys() == two.keys()
    moved = max(np.abs(one[name] - np.array(start[name])).max() for name in one)
    apart = max(np.abs(one[name] - two[name]).max() for name in one)
    assert apart < 1e-5 < 1e-2 < moved, (apart, moved)


def test_batches_that_cannot_be_shared(tmp_path):
    for said in go(3, [tmp_path / "a", tmp_path / "a"]):
        (line,) = said
        assert "grad_accumulation_steps (3) must be a multiple of the 2 processes" in line


def test_processes_that_would_begin_apart(tmp_path):
    alone(2, tmp_path / "a")
    for said in go(2, [tmp_path / "a", tmp_path / "b"]):
        (line,) = said
        assert "begin at different steps" in line and "same state" in line


def test_batches_of_a_step_are_of_like_length():
    """Those who compute them wait for each other."""
    sizes = sizes_of(small_model())
    config = TrainConfig(batch_size=4, sorted_batches=8)

    def stream(first, count):
        lengths = np.random.default_rng(first).integers(1, 200, count)
        return [Example((2,) * n + (7, 1), n) for n in lengths.tolist()]

    def widths(together: int) -> np.ndarray:
        batches = Batches(stream, config, sizes, together=together)
        return np.array([batches[number].sequence.shape[1] for number in range(64)])

    usual, paired = widths(1), widths(2)
    assert sorted(usual) == sorted(paired)  # the same examples
    apart = [np.abs(np.diff(one.reshape(-1, 2), axis=1)).mean() for one in (usual, paired)]
    assert apart[1] < apart[0] / 2


@pytest.mark.parametrize("truth", [False, True])
def test_a_process_alone(truth):
    assert processes.is_first() and processes.count() == 1
    assert processes.any_says(truth) is truth
    processes.check_together(5, 3)

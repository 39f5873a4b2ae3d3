"""One model over several processes computes what it does in one, and says no more than it must.

`ranks.py` is what the processes run; this file starts them and reads what they found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import cases

from mlx_diffgemma.train.processes import local_hosts

PROGRAM = Path(__file__).with_name("ranks.py")
PATHS = os.pathsep.join([str(PROGRAM.parent), str(PROGRAM.parents[1])])


def found(folder: Path, ranks: int, case: str) -> list[list[dict]]:
    """What each rank of a run prints."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps(local_hosts(ranks)))
    programs = [
        subprocess.Popen(
            [sys.executable, PROGRAM, case],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([PATHS, os.environ.get("PYTHONPATH", "")]),
                "MLX_RANK": str(rank),
                "MLX_HOSTFILE": str(hosts),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in programs]
    finally:
        for process in programs:
            process.kill()
    assert [process.returncode for process in programs] == [0] * ranks
    return [[json.loads(line) for line in each.splitlines()] for each in said]


@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        (2, "tensor"),
        (2, "packed"),
        (2, "uneven"),
        (2, "experts"),
        (2, "pipeline"),
        (2, "one-chunk"),
        (4, "tensor"),
    ],
)
def test_several_processes_compute_what_one_does(tmp_path, ranks, case):
    leader, *followers = found(tmp_path, ranks, case)
    wrong = [check["error"] for check in leader if check["error"] is not None]
    assert not wrong, "\n".join(wrong)
    assert [check["check"] for check in leader] == [c.__name__ for c in cases(ranks)[case].checks]
    for follower in followers:
        # Rank 0 holds the prefixes of the last check at most, and so do the others.
        assert follower[-1]["held"] <= 4

"""One model over several processes computes what it does in one, and says no more than it must.

`ranks.py` is what the processes run; this file starts them and reads what they found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ranks import cases

from mlx_diffgemma.train.processes import local_hosts

PROGRAM = Path(__file__).with_name("ranks.py")
PATHS = os.pathsep.join([str(PROGRAM.parent), str(PROGRAM.parents[1])])


def found(folder: Path, ranks: int, *names: str) -> list[list[dict]]:
    """What each rank of a run prints."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps(local_hosts(ranks)))
    programs = [
        subprocess.Popen(
            [sys.executable, PROGRAM, *names],
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
        said = [process.communicate(timeout=240)[0] for process in programs]
    finally:
        for process in programs:
            process.kill()
    assert [process.returncode for process in programs] == [0] * ranks
    return [[json.loads(line) for line in each.splitlines()] for each in said]


def require(ranks: int, names: Sequence[str], said: list[list[dict]]) -> None:
    leader, *followers = said
    wrong = [f"{each['case']}: {each['error']}" for each in leader if each["error"] is not None]
    assert not wrong, "\n".join(wrong)
    expected = [(name, check) for name in names for check in cases(ranks)[name].checks]
    assert [(each["case"], each["check"]) for each in leader] == expected
    for follower in followers:
        assert [each["case"] for each in follower] == list(names)
        # Rank 0 holds the prefixes of the last check at most, and so do the others.
        assert all(each["held"] <= 4 for each in follower)


def test_two_processes_compute_what_one_does(tmp_path):
    """All kinds of splits in one run: most of its time is that of starting processes."""
    names = list(cases(2))
    require(2, names, found(tmp_path, 2, *names))


def test_four_processes_compute_what_one_does(tmp_path):
    """Few messages, for each takes milliseconds where there are fewer cores than processes."""
    require(4, ["tensor"], found(tmp_path, 4, "tensor"))

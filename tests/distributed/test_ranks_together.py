"""A command that two processes run together: what each of them says, and how both end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kill_ranks import COMMAND, LIMIT, LOST, started

from mlx_diffgemma.train.processes import local_hosts

QUICK = (*COMMAND, "--steps", "2")
LONG = (*COMMAND, "--steps", "2000", "--max-tokens", "2048")


def test_rank_0_alone_talks(tmp_path):
    """It reads stdin, where the other would wait for ever, and has a Mac's own options."""
    chat = ("chat", "--model", "demo", "--steps", "2", "--seed", "1", "--weights", "2,1")
    with started(tmp_path, chat, chat, stdin="Hello.\nCount to ten.\n/quit\n") as run:
        assert run.wait() == [0, 0]
    assert run.stdout(0).strip() and not run.stdout(1)
    assert run.stderr(1).split() == ["joined"] and not run.errors(0)


def test_an_error_of_one_ends_all_with_its_line(tmp_path):
    with started(tmp_path, QUICK, (*QUICK, "--model", "/missing")) as run:
        assert run.wait() == [1, 1]
    for rank in (0, 1):
        (line,) = run.errors(rank)
        assert "rank 1: /missing: no such folder" in line
    assert not run.stdout(0)


@pytest.mark.parametrize(
    ("victim", "sent", "said"),
    [
        (0, signal.SIGKILL, "rank 0 ended without a word"),
        (1, signal.SIGKILL, "rank 1 ended without a word"),
        (1, signal.SIGSTOP, "rank 1 has said nothing for"),
    ],
)
def test_a_rank_that_dies_or_hangs_ends_the_other(tmp_path, victim, sent, said):
    with started(tmp_path, LONG, LONG, silence=2.0) as run:
        run.join()
        run.processes[victim].send_signal(sent)
        assert run.processes[1 - victim].wait(LIMIT) == LOST
        (line,) = run.errors(1 - victim)
    assert said in line


def test_an_interrupt_ends_all_without_a_word(tmp_path):
    """Rank 0 tells the others."""
    with started(tmp_path, LONG, LONG) as run:
        run.join()
        run.processes[0].send_signal(signal.SIGINT)
        assert run.wait() == [130, 130]
    assert not run.errors(0) + run.errors(1)


def test_a_rank_that_nobody_joins_says_so(tmp_path):
    """MLX would wait for ever, with Python's lock held."""
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps(local_hosts(2)))
    program = "from mlx_diffgemma.distributed.group import join; join(seconds=1.0)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == -signal.SIGKILL
    assert "error: rank 0 has waited 1 s for the other ranks" in done.stderr


def test_mlx_launch_starts_the_program(tmp_path):
    """It is no file of Python's, and is started as it is."""
    launch = Path(sys.executable).with_name("mlx.launch")
    program = tmp_path / "mlx-diffgemma"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m mlx_diffgemma "$@"\n')
    program.chmod(0o755)
    port = local_hosts(1)[0][0].rpartition(":")[2]  # and the one behind it
    command = [sys.executable, launch, "-n", "2", "--backend", "ring", "-p", port]
    command += ["--", program, *QUICK]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as launched:
        assert launched.stdin is not None and launched.stdout is not None
        said = launched.stdout.read()  # the launcher is busy where its own stdin has ended
        launched.stdin.close()
    assert launched.returncode == 0 and said.strip()

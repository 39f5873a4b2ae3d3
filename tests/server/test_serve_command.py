"""`mlx-diffgemma serve` as a process: it starts, refuses in one line, and ends when it is told."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import serving as served
from serving import post, status

PROGRAM = (sys.executable, "-c", "from mlx_diffgemma.cli.main import main; main()")


@contextmanager
def started(*command: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def port_of(process: subprocess.Popen[str]) -> int:
    """The port that a server says it is ready at."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.match(r"ready: http://127.0.0.1:(\d+) serves demo", line):
            return int(found[1])
    raise AssertionError("it ended before it was ready")


def test_the_command_serves_refuses_a_port_in_use_and_comes_back_after_a_kill() -> None:
    with started(*PROGRAM, "serve", "--model", "demo", "--port", "0") as process:
        port = port_of(process)
        health = httpx.get(f"http://127.0.0.1:{port}/health").json()
        assert health["status"] == "ok" and health["model"] == "demo"
        again = [*PROGRAM, "serve", "--model", "demo", "--port", str(port)]
        second = subprocess.run(again, capture_output=True, text=True, timeout=60)
        assert second.returncode == 1
        assert re.fullmatch(rf"error: port {port} of 127.0.0.1 is in use; .*\n", second.stderr)
        with socket.create_connection(("127.0.0.1", port)):  # is left half open
            process.send_signal(signal.SIGKILL)
            process.wait(10)
    with started(*again) as process:
        assert port_of(process) == port
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--host", "0.0.0.0"], 2, "--host '0.0.0.0' can be reached by others; set a key"),
        (["--host", "no.such.host.invalid", "--api-key", "k"], 2, "is unknown"),
        (["--port", "65536"], 2, "--port must be between 0 and 65535"),
        (["--allow-origin", "example"], 2, "is no origin"),
        (["--max-batch", "0"], 2, "--max-batch must be at least 1"),
        (["--api-key", " "], 2, "the API key is empty"),
        (["--port", "0", "--model", "/no/such/model"], 1, "no such folder"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    arguments: list[str], code: int, message: str, capfd: Any
) -> None:
    from mlx_diffgemma.cli.main import app

    with pytest.raises(SystemExit) as ended:
        app(["serve", *arguments], prog_name="mlx-diffgemma")
    assert ended.value.code == code
    lines = [line for line in capfd.readouterr().err.splitlines() if "level=" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


@pytest.mark.parametrize(("presses", "least", "most"), [(1, 1.5, 5.0), (2, 0.0, 2.0)])
def test_ctrl_c_ends_within_seconds_and_a_second_one_at_once(
    presses: int, least: float, most: float
) -> None:
    with started(sys.executable, str(Path(served.__file__))) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(post("/echo", {"as": "sse", "wait": 60, "events": 2}))
            assert status(connection.recv(65536)) == 200
            start = time.monotonic()
            for _ in range(presses):
                process.send_signal(signal.SIGINT)
                time.sleep(0.3)
            assert process.wait(10) == 130
            assert least < time.monotonic() - start < most

"""Closed streams, readers that have gone, other encodings, and Ctrl-C before a command runs."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from cli_fakes import command

ANSWER = {"canvases": ["café 🙂 漢字"]}


def shell(redirection: str, *arguments: str, script: dict = ANSWER, **environment: str):
    line = f"{shlex.join(command(script, *arguments))} {redirection}"
    return subprocess.run(
        ["sh", "-c", line], capture_output=True, env=os.environ | environment, timeout=60
    )


@pytest.mark.parametrize(
    ("arguments", "redirection", "code", "out", "err"),
    [
        (["generate"], "<&-", 2, b"", b"error: the prompt is empty: give some text with"),
        (["chat"], "<&-", 0, b"", b""),
        (["generate", "-p", "hi"], ">&-", 1, b"", b"error: stdout is closed; send it to /dev/null"),
        (["generate", "-p", "hi"], "2>&-", 0, ANSWER["canvases"][0].encode() + b"\n", b""),
        (["generate", "--nonsense"], "2>&-", 2, b"", b""),
        (
            ["generate", "-p", "hi"],
            "> /dev/full",
            1,
            b"",
            b"error: the output cannot be written",
        ),
    ],
)
def test_a_stream_that_is_closed_or_full(arguments, redirection, code, out, err):
    result = shell(redirection, *arguments, PYTHONUTF8="1")
    assert (result.returncode, result.stdout) == (code, out), result.stderr
    assert result.stderr.startswith(err) and result.stderr.count(b"\n") <= 1
    assert bool(err) == bool(result.stderr)


def test_a_reader_that_has_gone_is_no_error():
    script = {"canvases": ["line\n"] * 2000, "steps": 1}
    assert shell("| head -1", "generate", "-p", "hi", script=script).stdout == b"line\n"
    both = shell("2>&1 | head -1", "generate", "-p", "hi", script=script)
    assert (both.stdout, both.stderr) == (b"line\n", b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_json_in_every_encoding(encoding):
    arguments = ["generate", "-p", "hi", "--json", "--model", "m\udcff"]
    result = shell("", *arguments, PYTHONIOENCODING=encoding, LC_ALL="C")
    answer = json.loads(result.stdout.decode("utf-8"))
    assert answer["text"] == ANSWER["canvases"][0]
    assert answer["model"] == "m\udcff"


@pytest.mark.parametrize("arguments", [["generate", "--seed", "x"], ["convert", "--nope"], ["no"]])
def test_what_the_parser_refuses_is_one_line(arguments):
    result = shell("", *arguments)
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.startswith(b"error: ") and result.stderr.count(b"\n") == 1
    assert b"; see mlx-diffgemma" in result.stderr


def test_ctrl_c_ends_quietly_whenever_it_comes():
    """From the first line of the program's own on, while it imports, and while it loads."""
    program = (
        "import sys, os\n"
        "sys.argv = ['mlx-diffgemma', 'generate', '-p', 'hi', '--model', 'demo']\n"
        "from mlx_diffgemma.__main__ import main\n"
        "print('here', flush=True)\n"
        "main()\n"
    )
    for delay in (0.0, 0.05, 0.15, 0.4):
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout.readline() == b"here\n"
        time.sleep(delay + 0.002)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, b""), (delay, out, err)

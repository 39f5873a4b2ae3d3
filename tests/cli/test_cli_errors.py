"""Exit codes, and one line instead of a traceback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer

from mlx_diffgemma.cli import errors
from mlx_diffgemma.errors import CheckpointError, PromptError


def raising(error: BaseException):
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CheckpointError("no such\npath: mend it."), 1, "error: no such path: mend it.\n"),
        (PromptError("empty."), 2, "error: empty.\n"),
        (KeyboardInterrupt(), 130, ""),
        (
            RuntimeError("[broken] thing\nsecond line"),
            1,
            "error: RuntimeError: [broken] thing (unexpected; --debug shows where it comes from)\n",
        ),
        (
            AssertionError(),
            1,
            "error: AssertionError (unexpected; --debug shows where it comes from)\n",
        ),
    ],
)
def test_an_exception_becomes_a_line_and_a_code(capsys, error, code, line):
    with pytest.raises(typer.Exit) as end:
        errors.run(raising(error))
    assert end.value.exit_code == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("error", [CheckpointError("x"), RuntimeError("x")])
def test_debug_lets_exceptions_through(error):
    with pytest.raises(type(error)) as raised:
        errors.run(raising(error), debug=True)
    assert raised.value is error


def test_an_exit_passes():
    with pytest.raises(typer.Exit) as end:
        errors.run(raising(typer.Exit(5)))
    assert end.value.exit_code == 5


def test_a_closed_pipe_is_quiet():
    program = (
        "import typer\n"
        "from mlx_diffgemma.cli import errors\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def command(): errors.run(lambda: [print('x' * 100) for _ in range(10**5)])\n"
        "app()\n"
    )
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert os.read(reader, 10) == b"x" * 10
    os.close(reader)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == errors.PIPE_CLOSED

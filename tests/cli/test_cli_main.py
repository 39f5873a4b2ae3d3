"""The program as a whole: its commands, its help, and what it does not import."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
from typer.testing import CliRunner

import mlx_diffgemma
from mlx_diffgemma.cli.main import app

HEAVY = ("mlx", "mlx_lm", "transformers", "torch", "numpy", "rich.live", "huggingface_hub")


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), prog_name="mlx-diffgemma")


@pytest.mark.parametrize("command", ["", "generate", "chat", "demo", "train", "fuse", "convert"])
def test_help_imports_nothing_heavy(command):
    program = (
        "import sys\n"
        f"sys.argv = ['mlx-diffgemma', *{command.split()}, '--help']\n"
        "from mlx_diffgemma.cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not found, found\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Usage: mlx-diffgemma" in result.stdout


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"mlx-diffgemma {mlx_diffgemma.__version__}\n")


@pytest.mark.parametrize("arguments", [["nonsense"], ["generate", "--nonsense"], ["chat", "word"]])
def test_a_usage_error_exits_with_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "forwarded"),
    [
        (
            ["convert", "--model", "a", "-q", "--q-bits", "4"],
            ["--model", "a", "-q", "--q-bits", "4"],
        ),
        (["convert", "--help"], ["--help"]),
        (["--debug", "convert", "-q"], ["-q", "--debug"]),
    ],
)
def test_convert_forwards_its_arguments(monkeypatch, arguments, forwarded):
    seen = []
    converter = types.ModuleType("mlx_diffgemma_convert.cli")
    converter.main = lambda: seen.append(sys.argv)
    monkeypatch.setitem(sys.modules, "mlx_diffgemma_convert.cli", converter)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    assert run(*arguments).exit_code == 0
    assert seen == [["mlx-diffgemma convert", *forwarded]]

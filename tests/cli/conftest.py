"""The program with a model that says what it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cli_fakes import Script, characters
from typer.testing import CliRunner

from mlx_diffgemma import fitting, generation
from mlx_diffgemma.cli.main import app
from mlx_diffgemma.text import detokenize


class Program:
    """Runs `mlx-diffgemma` in this process, with pipes for streams."""

    def __init__(self) -> None:
        self.script = Script()

    def __call__(self, *arguments: str, input: str | bytes | None = None) -> Any:
        return CliRunner().invoke(app, list(arguments), input=input, prog_name="mlx-diffgemma")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    """`program("generate", "-p", "hi")` -> a result with exit_code, stdout and stderr;
    `program.script` says what the model does, and keeps what it was asked."""
    program = Program()

    def late(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: getattr(program.script, name)(*args, **kwargs)

    for name in ("load", "stream_generate"):
        monkeypatch.setattr(generation, name, late(name))
    monkeypatch.setattr(fitting, "diffusion_config", late("diffusion_config"))
    monkeypatch.setattr(detokenize, "token_strings", characters)
    return program

"""Settings become options by being fields: nothing else names them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import click
import pytest
import typer
from typer.testing import CliRunner

from mlx_diffgemma.cli.command import Changes, Of, Only, Without, command
from mlx_diffgemma.cli.main import app
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.settings import Setting, settings_of
from mlx_diffgemma.train.config import TrainConfig


@dataclass(frozen=True)
class Library:
    """Settings of a library, none of which a command names."""

    heat: Annotated[float, Setting("Heat of the oven.")] = 0.5
    names: Annotated[tuple[str, ...] | None, Setting("Names of guests.", ("--guest",))] = None
    gas: Annotated[bool, Setting("Gas instead of electricity.")] = False
    kept_apart: int = 1


@dataclass(frozen=True)
class Baking:
    """Settings of a command."""

    loud: Annotated[bool, Setting("Noise.")] = False
    light: Annotated[bool, Setting("Light inside.")] = True
    also: Annotated[tuple[str, ...], Setting("Dishes besides.")] = ()
    changes: Annotated[Changes, Of(Library, shows_defaults=True)] = field(default_factory=Changes)


def run(annotation, *arguments):
    taken = []

    def bake(*, count: Annotated[int, Setting("Loaves.")] = 2, baking) -> None:
        taken.append((count, baking))

    bake.__annotations__["baking"] = annotation
    bake.__annotations__["count"] = Annotated[int, Setting("Loaves.")]
    program = typer.Typer()
    program.command()(command(bake))
    return CliRunner().invoke(program, list(arguments)), taken


def test_what_is_left_out_is_the_default_and_changes_nothing():
    result, taken = run(Baking)
    assert result.exit_code == 0, result.output
    assert taken == [(2, Baking())]


def test_every_field_is_an_option():
    result, taken = run(
        Baking, "--count", "3", "--loud", "--no-light", "--also", "a", "--also", "b", "--heat",
        "0.9", "--guest", "x", "--guest", "y", "--no-gas",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    changes = Changes(heat=0.9, names=("x", "y"), gas=False)
    assert taken == [(3, Baking(True, False, ("a", "b"), changes))]


def test_fields_without_a_sentence_are_no_options():
    result, _ = run(Baking, "--kept-apart", "2")
    assert result.exit_code == 2


@pytest.mark.parametrize("annotation", [Annotated[Baking, Without("heat")],
                                        Annotated[Baking, Only("loud")]])  # fmt: skip
def test_a_command_may_leave_fields_out(annotation):
    result, taken = run(annotation, "--loud")
    assert result.exit_code == 0
    assert taken == [(2, Baking(loud=True))]
    assert run(annotation, "--heat", "0.1")[0].exit_code == 2


def test_help_shows_sentences_and_the_library_s_defaults():
    output = run(Baking, "--help")[0].output
    assert "Heat of the oven." in output and "0.5" in output
    assert "--light" in output and "--no-light" in output and "--no-loud" not in output


def test_every_setting_of_the_library_reaches_its_command():
    commands = typer.main.get_command(app).commands
    denoising = {parameter.name for parameter in commands["generate"].params}
    assert set(settings_of(DiffusionConfig)) <= denoising
    assert set(settings_of(TrainConfig)) <= {
        parameter.name for parameter in commands["train"].params
    }


def test_every_help_text_is_a_sentence():
    program = typer.main.get_command(app)
    for name, each in program.commands.items():
        for parameter in each.params:
            if not isinstance(parameter, click.Option) and getattr(parameter, "help", None) is None:
                continue
            said = parameter.help or ""
            assert said[:1].isupper() and said.endswith("."), f"{name} {parameter.name}: {said!r}"

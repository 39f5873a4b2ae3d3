"""Settings become options by being fields: nothing else names them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from mlx_diffgemma.cli.command import Changes, Of, Only, Without, command
from mlx_diffgemma.cli.main import app
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.settings import Setting, settings_of
from mlx_diffgemma.train.config import TrainConfig
from mlx_diffgemma_convert.cli import app as converter


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
    program.command()(command("bake --loud", "bake --heat 1")(bake))
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


def test_help_begins_with_the_examples():
    output = run(Baking, "--help")[0].output
    assert output.index("Examples:") < output.index("bake --heat 1") < output.index("Options")


def commands():
    """Every command: the words that call it, how it is written, and what typer made of it."""
    for program, prefix in ((app, []), (converter, ["convert"])):
        made = typer.main.get_command(program)
        for name in made.list_commands(None):
            if name == "convert":  # the converter, a program of its own
                continue
            each = made.get_command(None, name)
            parts = [([name, sub], part) for sub, part in getattr(each, "commands", {}).items()]
            for words, part in parts or [([name], each)]:
                yield [*prefix, *words], part.callback.__wrapped__, part
    yield ["convert"], converter.registered_callback.callback, typer.main.get_command(converter)


@pytest.mark.parametrize(
    ("words", "callback", "made"),
    [pytest.param(*each, id=" ".join(each[0])) for each in commands()],
)
def test_every_example_is_read_as_a_command(words, callback, made):
    """Three a command at least; what they run is tested where the command is."""
    examples = getattr(callback, "examples", ())
    assert len(examples) >= 3
    for example in examples:
        said = shlex.split(example)
        said = said[said.index("mlx-diffgemma") + 1 :]
        assert said[: len(words)] == words
        made.make_context(words[-1], said[len(words) :])


def test_every_setting_of_the_library_reaches_its_command():
    made = {" ".join(words): each for words, _, each in commands()}
    denoising = {parameter.name for parameter in made["generate"].params}
    assert set(settings_of(DiffusionConfig)) <= denoising
    assert set(settings_of(TrainConfig)) <= {parameter.name for parameter in made["train"].params}


def test_every_help_text_is_a_sentence():
    for words, _, made in commands():
        for parameter in made.params:
            said = getattr(parameter, "help", None) or ""
            assert said[:1].isupper() and said.endswith("."), f"{words} {parameter.name}: {said!r}"

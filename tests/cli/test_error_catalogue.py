"""Every public function and every option of every command, with wrong values of every kind: what
does not work is one line of ours. What is tried follows from signatures and from the commands
themselves, so a new option is tried by itself."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from demo_checkpoint import CHECKPOINT
from editing.small_models import tiny
from typer.testing import CliRunner

import mlx_diffgemma
from mlx_diffgemma import generation
from mlx_diffgemma.checkpoint import loading, locate
from mlx_diffgemma.cli.main import app
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.editing.questions import DecisionSettings
from mlx_diffgemma.errors import CheckpointError, DiffGemmaError
from mlx_diffgemma.model.cache import PrefixCache
from mlx_diffgemma.server import lifecycle
from mlx_diffgemma.text.prompt_settings import PromptSettings
from mlx_diffgemma_convert.cli import app as convert_app


class Thing:
    """A value of a type that nothing takes."""

    def __repr__(self) -> str:
        return "<a\nthing>"


VALUES: tuple[Any, ...] = (
    None, True, -1, 1.5, 10**400, 10**5000, float("nan"), float("inf"), -float("inf"), "", "text",
    "\udcff", "\0", "a\nb", b"bytes", [], [None], ["a", "a"], [1.5], [-1], [10**30], {}, {"a": 1},
    (), Thing(), Path("nowhere"), lambda *_: None,
)  # fmt: skip

QUESTION = {"type": "choice", "instructions": "c", "criteria": {"a": None, "b": None}}
SETTINGS = {field.name for kind in (DiffusionConfig, PromptSettings) for field in fields(kind)}
BASES: dict[str, dict[str, Any]] = {
    "load": {"path_or_repo": "nowhere/at-all/"},
    "load_model": {"path_or_repo": "nowhere/at-all/"},
    "generate": {"prompt": "ab"},
    "stream_generate": {"prompt": "ab"},
    "batch_generate": {"prompts": ["ab"]},
    "decide": {"state": "ab", "questions": {"q": QUESTION}},
    "calibrate": {"examples": []},
    "edit": {"text": "ab\nb", "instruction": "c", "lines": (1, 1), "lengths": [2]},
    "fill": {"template": "a {x}", "lengths": [1]},
    "infill": {"text": "a [[?]]", "lengths": [1]},
    "generate_structured": {"prompt": "ab", "choices": ["a", "b"]},
    "DiffusionConfig": {},
    "PromptSettings": {},
}
NO_FUNCTION = {"BatchResponse", "DiffGemmaError", "GenerationResponse"}  # what calls return
FUNCTIONS = sorted(set(mlx_diffgemma.__all__) - NO_FUNCTION)
QUICK = {"seed": 0, "max_denoising_steps": 1, "max_tokens": 8}


def parameters(function: Callable[..., Any]) -> list[str]:
    """The names of the arguments of a function; where it takes any settings, those as well."""
    found = inspect.signature(function).parameters.values()
    names = [each.name for each in found if each.kind is not each.VAR_KEYWORD]
    open_ended = len(names) < len(found)
    decides = function in (mlx_diffgemma.decide, mlx_diffgemma.calibrate)
    settings = {field.name for field in fields(DecisionSettings)} if decides else SETTINGS
    return names + (["no_such_setting", *sorted(settings - set(names))] if open_ended else [])


def base_of(name: str) -> dict[str, Any]:
    """Arguments with which a function works; for one that is not in the table, a text for each that
    it needs."""
    function = getattr(mlx_diffgemma, name)
    needed = {
        each.name: "ab"
        for each in inspect.signature(function).parameters.values()
        if each.default is each.empty and each.kind is not each.VAR_KEYWORD
    }
    return {**needed, **BASES.get(name, {})}


def test_what_is_left_out_of_the_catalogue_is_what_calls_return():
    for name in NO_FUNCTION:
        kind = getattr(mlx_diffgemma, name)
        assert isinstance(kind, type) and (is_dataclass(kind) or issubclass(kind, Exception))
    assert set(BASES) <= set(FUNCTIONS)


def is_one_line(error: BaseException) -> None:
    assert isinstance(error, DiffGemmaError)
    assert str(error).isprintable() and len(str(error)) < 600 and error.exit_code in (1, 2)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_values_given_to_a_function(name, monkeypatch, tmp_path):
    """Either it works with the value, or it says in a line why it does not."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    function = getattr(mlx_diffgemma, name)
    model, tokenizer = tiny(12)
    base = base_of(name)
    if "model" in parameters(function):
        base |= {"model": model, "tokenizer": tokenizer}
        base |= {each: value for each, value in QUICK.items() if each in parameters(function)}
    wrong = []
    for parameter in parameters(function):
        for value in VALUES:
            try:
                found = function(**{**base, parameter: value})
                if isinstance(found, Iterator):
                    list(found)
            except DiffGemmaError as error:
                if not (str(error).isprintable() and len(str(error)) < 600):
                    wrong.append(f"{parameter}={value!r:.30}: {str(error)!r:.200}")
            except Exception as error:
                wrong.append(f"{parameter}={_shown(value)}: {type(error).__name__}: {error!s:.200}")
    assert not wrong, "\n".join(wrong)


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.30}"
    except ValueError:
        return "many digits"


def test_wrong_values_given_to_a_cache(tmp_path):
    model, _ = tiny(12)
    cache = model.make_cache()
    for place in (tmp_path, tmp_path / "no" / "such", tmp_path / "a\0b"):
        with pytest.raises(DiffGemmaError) as caught:
            PrefixCache.load(place, model)
        is_one_line(caught.value)
    for place in (tmp_path / "no" / "such", tmp_path / "a\0b"):
        with pytest.raises(DiffGemmaError) as caught:
            cache.save(place)
        is_one_line(caught.value)
    with pytest.raises(DiffGemmaError) as caught:
        model.encode([[]], [model.empty_prefix()])
    is_one_line(caught.value)


# Commands.

TEXTS = (
    "", "x", "\udcff", "a\nb", "nowhere/at/all", "/", "{", "\x00", "-1", "0", "1.5", "10" * 300,
    "nan", "inf", "1e999",
)  # fmt: skip
COMMANDS: dict[str, tuple[str, ...]] = {
    "generate": ("-p", "ab"),
    "chat": (),
    "infill": ("--text", "a [[?]]"),
    "edit": ("FILE", "--range", "1:1", "-i", "c"),
    "fill": ("a {x}",),
    "decide": ("--state", "ab", "--questions", json.dumps({"q": QUESTION})),
    "serve": ("--port", "0"),
    "demo": (),
    "train": ("--data", "DATA", "--model", "demo", "--iters", "1"),
    "fuse": ("--model", "demo", "--adapter-path", "DATA"),
    "tune": (),
    "bench": (),
    "report": ("--model", "demo"),
}
CONVERT: dict[str, tuple[str, ...]] = {
    "": ("--model", str(CHECKPOINT), "--mlx-path", "made", "--plan"),
    "verify": ("FOLDER",),
    "upload": ("FOLDER", "--upload-repo", "a/b"),
    "measure": ("FOLDER", "FOLDER"),
}


def command_of(program: typer.Typer, name: str) -> Any:
    found: Any = typer.main.get_command(program)
    for word in name.split():
        found = found.get_command(None, word)
    return found


def commands_of(program: typer.Typer) -> list[str]:
    """The names of the commands of a program; `convert` is a program of its own."""
    whole: Any = typer.main.get_command(program)
    names = []
    for name in sorted(set(whole.list_commands(None)) - {"convert"}):
        parts = getattr(whole.get_command(None, name), "commands", {})
        names += [f"{name} {part}" for part in parts] or [name]
    return names


def tries(command: Any) -> Iterator[tuple[str, ...]]:
    """What to add to the arguments of a command: each of its options with each value, and an
    argument more."""
    for option in command.params:
        if option.param_type_name == "option" and not option.is_flag:
            for value in TEXTS:
                yield (f"{max(option.opts, key=len)}={value}",)
    yield ("--no-such-option",)
    yield ("one", "more", "\udcff")


@pytest.mark.parametrize(
    ("program", "name"),
    [
        *((app, name) for name in commands_of(app)),
        *((convert_app, name) for name in ["", *commands_of(convert_app)]),
    ],
    ids=lambda value: value or "convert" if isinstance(value, str) else "",
)
def test_wrong_values_given_to_a_command(program, name, monkeypatch, tmp_path):
    """Where nothing can be loaded, every run fails, and says why in a line."""

    def nothing(*_: Any, **__: Any) -> Any:
        raise CheckpointError("nothing is loaded in this test.")

    if program is app:
        monkeypatch.setattr(generation, "load", nothing)
        monkeypatch.setattr(loading, "load_model", nothing)
        monkeypatch.setattr(locate, "locate", nothing)
        monkeypatch.setattr(lifecycle, "run", lambda app, *_, **__: app.state.server.open())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("ab\nb\n")
    for folder in ("DATA", "FOLDER"):
        (tmp_path / folder).mkdir()
    (tmp_path / "DATA" / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    base = (COMMANDS if program is app else CONVERT).get(name, ())
    wrong = []
    for more in [(), *tries(command_of(program, name))]:
        arguments = [*name.split(), *base, *more]
        result = CliRunner().invoke(program, arguments, input="", prog_name="program")
        complaints = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        text = result.output
        fine = result.exception is None or isinstance(result.exception, SystemExit)
        fine &= result.exit_code in (0, 1, 2)
        # Typer's own errors are of several lines, and call an argument too many unexpected.
        typers = "Usage:" in text
        fine &= typers or "unexpected" not in text.lower()
        fine &= "Traceback" not in text
        fine &= result.exit_code == 0 or len(complaints) == 1 or typers
        # The arguments of the table are right, or nothing behind them would be tried.
        fine &= bool(more) or not base or "no such option" not in text
        if not fine:
            shown = [f"{each:.40}" for each in more]
            wrong.append(f"{shown}: {result.exit_code} {result.exception!r:.150} {text:.300}")
    assert not wrong, "\n".join(wrong)

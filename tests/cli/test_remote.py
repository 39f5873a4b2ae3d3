"""The commands with a running server in the place of a model that is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_fakes import Terminal
from editing.small_models import demo
from server.serving import serving
from typer.testing import CliRunner

from mlx_diffgemma import generation
from mlx_diffgemma.cli import remote
from mlx_diffgemma.cli.main import app
from mlx_diffgemma.cli.settings import Loading, Reaching
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.fitting import diffusion_config
from mlx_diffgemma.server.app import PROTOCOLS
from mlx_diffgemma.server.engine import Engine

PUZZLE = "sudoku\n4..613\n61.42.\n.6...4\n134...\n3265.1\n5...6."
GRID = "532461\n456132\n146253\n253146\n314625\n625314\n"
QUESTIONS = {
    "cell": {"type": "choice", "criteria": {"1": None, "2": None, "6": None}},
    "even": {"type": "noul", "instructions": "It is even."},
}
PROGRAM = (sys.executable, "-c", "from mlx_diffgemma.cli.main import main; main()")
NOT_TOLD = {
    "entropy", "generation_tps", "peak_memory", "prompt_tps", "times", "tokens_per_forward",
}  # fmt: skip


@pytest.fixture(scope="module")
def running() -> Iterator[SimpleNamespace]:
    from importlib import import_module

    model, tokenizer = demo()
    engine = Engine(model, tokenizer, name="demo")
    protocols = [import_module(f"mlx_diffgemma.server.{name}") for name in PROTOCOLS]
    with serving(engine, protocols) as running:
        running.server.about = {
            "identity": remote.identity(Loading(model="demo")),
            "max_tokens": diffusion_config(model).max_tokens,
            "canvas_length": model.config.canvas_length,
        }
        yield running


@pytest.fixture
def both(running: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command here and through the server; what both write to stdout."""
    monkeypatch.setattr(generation, "load", lambda *_, **__: demo())

    def run(*arguments: str) -> tuple[str, str]:
        said = []
        for where in (["--model", "demo", "--no-server"], ["--server", running.url]):
            done = CliRunner().invoke(app, [*arguments, *where])
            assert done.exit_code == 0, done.stderr
            said.append(done.stdout)
        return said[0], said[1]

    return run


@pytest.fixture
def files(tmp_path: Path) -> SimpleNamespace:
    grid, holed = tmp_path / "grid.txt", tmp_path / "holed.txt"
    grid.write_text(GRID)
    holed.write_text(GRID.replace("456132", "[[?]]"))
    return SimpleNamespace(grid=str(grid), holed=str(holed))


def test_answers_are_those_of_a_model_that_is_loaded(both: Any, files: SimpleNamespace) -> None:
    template = GRID.replace("456132", "{row:/[1-6]{6}/}")
    seed = ("--seed", "1")
    for arguments in (
        ("generate", "-p", PUZZLE, "--profile", "exact", *seed),
        ("generate", "--raw", "-p", "1 2 3", "--max-tokens", "16", "--steps", "4", *seed),
        ("infill", files.holed, "-p", "sudoku", "--lengths", "6,8", *seed),
        ("edit", files.grid, "--range", "2", "-i", "x", "-p", "sudoku", "--strength", "0.5", *seed),
        ("fill", template, "-p", "sudoku", *seed),
        ("decide", "--state", "sudoku", "--questions", json.dumps(QUESTIONS), *seed),
    ):
        here, there = both(*arguments)
        assert here == there and here, arguments


def test_the_json_of_answers_has_the_same_fields(both: Any, files: SimpleNamespace) -> None:
    for arguments in (
        ("generate", "-p", PUZZLE, "--seed", "1", "--json"),
        ("generate", "-p", "sudoku", "--regex", "53[1-6]{2}61", "--seed", "2", "--json"),
        ("fill", "a {b:1|2}", "-p", "sudoku", "--seed", "1", "--json"),
        ("infill", files.holed, "-p", "sudoku", "--lengths", "8", "--seed", "1", "--json"),
    ):
        here, there = map(json.loads, both(*arguments))
        assert list(here) == list(there)
        told = here.keys() - NOT_TOLD - {"details", "holes"}
        assert {name: here[name] for name in told} == {name: there[name] for name in told}


def test_nothing_heavy_is_imported_to_ask(running: SimpleNamespace) -> None:
    code = (
        "import sys; from mlx_diffgemma.cli.main import app; app(standalone_mode=False); "
        "print([m for m in ('mlx.core', 'numpy', 'transformers', 'httpx') if m in sys.modules])"
    )
    asked = ["generate", "-p", "sort: 3 1 2", "--server", running.url, "--seed", "0"]
    done = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done


def test_a_draft_is_drawn_from_the_frames_of_the_server(running: SimpleNamespace) -> None:
    terminal = Terminal(
        *PROGRAM, "generate", "-p", "sudoku", "--seed", "4", "--server", running.url
    )
    terminal.finish()
    assert terminal.code == 0
    assert "canvas 1 · step" in terminal.written, "the canvas was never drawn"
    assert "canvas 1" not in "\n".join(terminal.screen())


def test_chat_goes_on_from_what_was_said(running: SimpleNamespace) -> None:
    done = CliRunner().invoke(
        app, ["chat", "--server", running.url, "--seed", "4"], input="sudoku\n/reset\nsudoku\n"
    )
    assert done.exit_code == 0, done.stderr
    first, second = done.stdout[: len(done.stdout) // 2], done.stdout[len(done.stdout) // 2 :]
    assert first == second and len(first.splitlines()) == 6


def test_a_server_is_found_where_it_has_the_same_model(
    running: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(remote.PLACE, running.url)
    same = Loading(model="demo")
    found = remote.find(Reaching(), same, {})
    assert found is not None and found.name == "demo"
    assert remote.find(Reaching(no_server=True), same, {}) is None
    assert remote.find(Reaching(), same, {"--raw": True}) is None
    for other in (
        Loading(), Loading(model=str(tmp_path)), Loading(model="demo", revision="x"),
        Loading(model="demo", adapter_path="x"), Loading(model="demo", check=True),
    ):  # fmt: skip
        assert remote.find(Reaching(), other, {}) is None
    monkeypatch.setenv(remote.PLACE, "http://127.0.0.1:1")
    assert remote.find(Reaching(), same, {}) is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--server", "http://127.0.0.1:1"], 1, "no server listens at http://127.0.0.1:1"),
        (["--server", "nonsense"], 2, "--server 'nonsense' is no URL"),
        (["--server", "URL", "--no-server"], 2, "contradict each other"),
        (["--server", "URL", "--model", "other"], 2, "serves demo, and another model is asked"),
        (["--server", "URL", "--raw", "--markers"], 2, "--markers does not go with --server"),
        (["--server", "URL", "--t-min", "3"], 2, "t_max"),
        (["--server", "URL", "--choices", "a", "b"], 2, "--choices does not go with --server"),
    ],
)
def test_what_a_server_does_not_do_is_one_line(
    running: SimpleNamespace, arguments: list[str], code: int, message: str
) -> None:
    given = [running.url if each == "URL" else each for each in arguments]
    done = CliRunner().invoke(app, ["generate", "-p", "hi", *given])
    lines = done.stderr.splitlines()
    assert done.exit_code == code
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_a_key_is_asked_for_and_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(api_key="sesame") as running:
        server = remote.Remote(running.url)
        with pytest.raises(remote.RemoteError, match=remote.KEY):
            server.ask("/echo", {})
        monkeypatch.setenv(remote.KEY, "sesame")
        assert server.ask("/echo", {"a": 1}) == {"a": 1}
        with pytest.raises(UsageError, match="status 400"):
            deep: Any = 1
            for _ in range(80):
                deep = [deep]
            server.ask("/echo", {"a": deep})


def test_a_model_is_the_same_with_the_text_of_a_template_from_whatever_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ messages }}"
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.jinja").write_text(template if name == "here" else "{{ other }}")
    spelled = remote.identity(Loading(chat_template=template))
    found = {}
    for name in ("here", "there"):
        monkeypatch.chdir(tmp_path / name)
        found[name] = remote.identity(Loading(chat_template="t.jinja"))
    assert found["here"] == spelled != found["there"]
    assert remote.identity(Loading(chat_template=str(tmp_path / "here" / "t.jinja"))) == spelled
    assert remote.identity(Loading()) != spelled

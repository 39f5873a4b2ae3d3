"""`mlx-diffgemma demo`: fresh tasks, and honesty about the answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
from cli_fakes import Terminal

from mlx_diffgemma.demo import sudoku


class Editing:
    """Takes the place of `edit` and `fill`: right answers, unless told otherwise."""

    def __init__(self) -> None:
        self.mended: str | None = None
        self.slots: dict[str, str] = {}
        self.edits: list[tuple] = []

    def edit(self, model, tokenizer, text, instruction, lines, *, prompt, **settings):
        self.edits.append((text, lines, settings))
        rows = prompt.split("\n")[1:]
        number = lines[0] - 1
        others = [row for row in rows if "." not in row]
        rows[number] = "".join(
            (set("123456") - {row[column] for row in others}).pop() for column in range(6)
        )
        return SimpleNamespace(text=self.mended or "\n".join(rows), passes=2)

    def fill(self, model, tokenizer, template, *, prompt, seed):
        a, b = (line[3:] for line in prompt.split("\n")[2:])
        slots = {"thing": a, "town": b, **self.slots}
        return SimpleNamespace(
            text=f"your {slots['thing']} waits in {slots['town']}.", slots=slots, passes=1
        )


@pytest.fixture
def editing(monkeypatch):
    editing = Editing()
    # The functions have the names of their modules, which hides these in the package.
    for name in ("edit", "fill"):
        module = __import__(f"mlx_diffgemma.editing.{name}", fromlist=[name])
        monkeypatch.setattr(module, name, getattr(editing, name))
    return editing


@pytest.fixture
def puzzle():
    """What `--seed 3` makes first."""
    return sudoku.make_puzzle(np.random.default_rng(3))


def test_right_answers(program, editing, puzzle):
    program.script.canvases = [puzzle.solution]
    result = program("demo", "--seed", "3")
    assert (result.exit_code, result.stderr) == (0, "")
    assert program.script.loads[0]["path"] == "demo"
    assert [call["prompt"] for call in program.script.calls] == [sudoku.prompt([puzzle])]
    assert result.stdout.count("Right: every cell is as in the solution.") == 2
    assert "Right: each slot holds its word of the list." in result.stdout
    row = puzzle.solution.split("\n")[0]
    assert f"│ {' '.join(row[:3])} │ {' '.join(row[3:])} │" in result.stdout
    assert "\x1b" not in result.stdout


def test_the_row_that_is_mended_was_wrong(program, editing, puzzle):
    program.script.canvases = [puzzle.solution]
    for seed in range(8):
        assert program("demo", "--seed", str(seed)).exit_code == 0
    for text, (first, last), _ in editing.edits:
        assert first == last and not sudoku.is_valid_grid(text)
        rows = text.split("\n")
        assert sorted(rows[first - 1]) == list("123456")
    assert len({lines for _, lines, _ in editing.edits}) > 1


def test_wrong_answers_are_said_to_be_wrong(program, editing, puzzle):
    program.script.canvases = ["0" + puzzle.solution[1:]]
    editing.mended = "no [grid]\x1b"
    editing.slots = {"town": "rome"}
    result = program("demo", "--seed", "3")
    assert result.exit_code == 0
    assert "Wrong in 1 of 36 cells." in result.stdout
    assert "no [grid]␛\nWrong: that is not the shape of the answer.\n" in result.stdout
    assert "Wrong: town differs from the list." in result.stdout
    assert "Right" not in result.stdout


def test_without_a_seed_the_tasks_are_fresh_and_the_seed_is_told(program, editing, puzzle):
    program.script.canvases = [puzzle.solution]
    first, second = program("demo"), program("demo")
    assert first.exit_code == second.exit_code == 0
    prompts = [call["prompt"] for call in program.script.calls]
    assert prompts[:1] != prompts[1:]
    assert f"(seed {program.script.calls[0]['seed']})" in first.stdout


def test_a_bad_seed(program):
    result = program("demo", "--seed", "-1")
    assert result.exit_code == 2
    assert result.stderr == "error: --seed must be between 0 and 2^64 - 1, not -1.\n"


@pytest.mark.slow
def test_the_real_model_on_a_terminal():
    terminal = Terminal(sys.executable, "-m", "mlx_diffgemma.cli.main", "demo", "--seed", "3")
    terminal.finish()
    assert terminal.code == 0
    assert "canvas 1 · step 1" in terminal.written
    assert terminal.written.rfind("\x1b[?25h") > terminal.written.rfind("\x1b[?25l")
    screen = terminal.screen()
    assert "canvas 1 · step 1" not in "\n".join(screen)
    assert [line for line in screen if line.startswith("Right: ")]
    assert "demo --web" in screen[-1]


@pytest.mark.slow
def test_the_real_model_in_a_pipe_as_json():
    prompt = sudoku.prompt([sudoku.make_puzzle(np.random.default_rng(3))])
    answer = sudoku.answer([sudoku.make_puzzle(np.random.default_rng(3))])
    result = subprocess.run(
        [sys.executable, "-m", "mlx_diffgemma.cli.main", "generate", "--model", "demo", "--json",
         "--seed", "3"],
        input=prompt + "\n", capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["text"] == answer
    assert told["generation_tokens"] == len(told["tokens"]) == len(answer)
    assert told["finish_reason"] == "stop"
    assert told["canvases"] == len(told["denoising_steps"]) == 1
    assert told["times"]["load_s"] > 0 and told["times"]["generation_s"] > 0


@pytest.mark.slow
def test_the_page_is_opened_in_the_browser_and_ends_with_ctrl_c():
    demo = subprocess.Popen(
        [sys.executable, "-m", "mlx_diffgemma.cli.main", "demo", "--web"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "BROWSER": "echo opened %s"},
    )
    try:
        assert demo.stdout is not None
        first, second = demo.stdout.readline(), demo.stdout.readline()
        address = first.split()[0]
        assert second == f"opened {address}\n"
        with urllib.request.urlopen(address, timeout=30) as page:
            assert b"/page/app.js" in page.read()
        demo.send_signal(signal.SIGINT)
        assert demo.wait(30) == 130
    finally:
        demo.kill()


def test_the_page_needs_the_server_s_packages(program, monkeypatch):
    monkeypatch.setattr("mlx_diffgemma.cli.serve.find_spec", lambda name: None)
    for asked in (("serve",), ("demo", "--web")):
        result = program(*asked)
        assert result.exit_code == 2
        assert f"{asked[-1]} needs greenlet, starlette, uvicorn" in result.stderr
        assert "mlx-diffgemma[server]" in result.stderr

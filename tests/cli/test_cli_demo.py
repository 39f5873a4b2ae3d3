"""`mlx-diffgemma demo`: fresh puzzles, and honesty about the answers."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from cli_fakes import Terminal

from mlx_diffgemma.demo import sudoku


@pytest.fixture
def puzzles():
    """What `--seed 3` makes: one, then two."""
    rng = np.random.default_rng(3)
    made = [sudoku.make_puzzle(rng) for _ in range(3)]
    return made[:1], made[1:]


@pytest.fixture
def answering(program, monkeypatch):
    """`answering(a, b)` makes the model give these answers, one a prompt."""

    def set_answers(*answers: str) -> None:
        waiting = list(answers)
        ask = program.script.stream_generate

        def stream_generate(*args, **kwargs):
            program.script.canvases = [waiting[0][:64], waiting.pop(0)[64:]]
            return ask(*args, **kwargs)

        monkeypatch.setattr(program.script, "stream_generate", stream_generate)

    return set_answers


def test_right_answers(program, puzzles, answering):
    answering(*map(sudoku.answer, puzzles))
    result = program("demo", "--seed", "3")
    assert (result.exit_code, result.stderr) == (0, "")
    assert program.script.loads[0]["path"] == "demo"
    assert [call["prompt"] for call in program.script.calls] == list(map(sudoku.prompt, puzzles))
    assert result.stdout.count("Right: every cell is as in the solution.") == 2
    assert "6 steps (3 + 3), 2 canvases, " in result.stdout
    row = puzzles[0][0].solution.split("\n")[0]
    assert f"│ {' '.join(row[:3])} │ {' '.join(row[3:])} │" in result.stdout
    assert "\x1b" not in result.stdout


def test_wrong_answers_are_said_to_be_wrong(program, puzzles, answering):
    one, two = map(sudoku.answer, puzzles)
    answering("0" + one[1:], two[:-1] + "0")
    result = program("demo", "--seed", "3")
    assert result.exit_code == 0
    assert "Wrong in 1 of 36 cells." in result.stdout
    assert "Wrong: grid 1 is right, grid 2 is wrong in 1 of 36 cells." in result.stdout
    assert "Right" not in result.stdout


def test_an_answer_of_another_shape_is_shown_as_it_is(program, puzzles, answering):
    answering("no [grid]\x1b", sudoku.answer(puzzles[0]))
    result = program("demo", "--seed", "3")
    assert result.exit_code == 0
    assert "no [grid]␛\nWrong: that is not the shape of the answer.\n" in result.stdout
    assert result.stdout.count("Wrong: that is not the shape of the answer.") == 2


def test_without_a_seed_the_puzzles_are_fresh_and_the_seed_is_told(program):
    first, second = program("demo"), program("demo")
    assert first.exit_code == second.exit_code == 0
    prompts = [call["prompt"] for call in program.script.calls]
    assert prompts[:2] != prompts[2:]
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
    assert "canvas 2 · step 1" in terminal.written
    assert terminal.written.rfind("\x1b[?25h") > terminal.written.rfind("\x1b[?25l")
    screen = terminal.screen()
    assert "canvas 2 · step 1" not in "\n".join(screen)
    assert [line for line in screen if line.startswith("Right: ")]
    assert screen[-1].endswith("tokens per forward")


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

"""Marking answers to sudokus, and the script that compares settings by them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from exercises.exam import Answer, Marks, make_tasks, mark
from exercises.tasks import TASKS
from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.errors import UsageError

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_profiles.py"


def test_only_the_whole_answer_counts():
    tasks = make_tasks(3, seed=1)["two"]
    right = [exercise.answer for exercise in tasks]
    wrong = right[1][:-1] + ("1" if right[1][-1] != "1" else "2")
    answers = [
        Answer(right[0], (3, 4), 84),
        Answer(wrong, (48, 2), 84),
        Answer(right[2] + "\n", (5,), 60),
    ]
    marks = mark(answers, tasks)
    assert marks == Marks(count=3, exact=1, steps=62, canvases=5, tokens=228)
    assert (marks.rate, marks.steps_per_canvas) == (1 / 3, 62 / 5)
    assert marks.tokens_per_forward == 228 / 62


def test_standard_error_is_that_of_repeated_exams():
    rng = np.random.default_rng(0)
    rates = rng.binomial(400, 0.9, 2000) / 400
    assert Marks(400, 360).standard_error == pytest.approx(rates.std(), rel=0.1)
    assert 0 < Marks(400, 400).standard_error < 0.005


def test_tasks_are_the_same_for_all_but_differ_by_seed():
    assert make_tasks(2, 5) == make_tasks(2, 5) != make_tasks(2, 6)


def test_the_sudokus_of_a_seed_stay_those_that_were_measured():
    rng = np.random.default_rng(4)
    one, two = ([[sudoku.make_puzzle(rng) for _ in range(n)] for _ in range(3)] for n in (1, 2))
    tasks = make_tasks(3, 4, ["sort", "two", "one"])
    assert list(tasks) == ["sort", "two", "one"]
    for name, puzzles in (("one", one), ("two", two)):
        assert [e.prompt for e in tasks[name]] == [sudoku.prompt(p) for p in puzzles]
        assert [e.answer for e in tasks[name]] == [sudoku.answer(p) for p in puzzles]
    assert make_tasks(3, 4) == {name: tasks[name] for name in ("one", "two")}


def test_any_task_can_be_asked_and_no_other():
    tasks = make_tasks(2, 1, list(TASKS))
    assert {name: len(exercises) for name, exercises in tasks.items()} == dict.fromkeys(TASKS, 2)
    bare = [Answer(exercise.answer, (1,), 41) for exercise in reversed(tasks["bare"])]
    assert mark(bare, tasks["bare"]).exact == 2  # any valid grid is right
    with pytest.raises(UsageError, match="'three'"):
        make_tasks(2, 1, ["three"])


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("bench_profiles", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_second_run_goes_on_where_the_first_stopped(script, tmp_path, monkeypatch, capsys):
    capped = {"max_denoising_steps": 2}
    compared = [("cap", "2", capped), ("profile", "same", capped), ("profile", "balanced", {
        **capped, "stop_at_eos": True})]  # fmt: skip
    monkeypatch.setattr(script, "settings", lambda: iter(compared))

    def run(count):
        arguments = f"x --count {count} --batch 1 --out {tmp_path}".split()
        monkeypatch.setattr(sys, "argv", arguments)
        script.main()
        lines = (tmp_path / "profiles.jsonl").read_text().splitlines()
        return [json.loads(line)["key"] for line in lines], capsys.readouterr().out

    first, _ = run(1)
    second, shown = run(2)
    assert len(first) == 4  # two tasks under two settings: the third is the first again
    assert len(second) == len(set(second)) == 8
    assert second[:4] == first
    assert "| profile balanced | one | 2 |" in shown
    assert "| same | two | 2 |" in (tmp_path / "profiles.md").read_text()
    assert "<circle" in (tmp_path / "steps.svg").read_text()


def test_the_curve_has_a_point_for_every_cap(script, tmp_path):
    marks = {task: [(cap, Marks(100, 90)) for cap in script.CAPS] for task in ("one", "two")}
    script.curve(marks).write(tmp_path / "steps.svg")
    drawn = (tmp_path / "steps.svg").read_text()
    points = 2 * len(script.CAPS)
    assert drawn.count("<circle") == points
    assert drawn.count("<polyline") == 2 + points  # a line a task, and a bar a point

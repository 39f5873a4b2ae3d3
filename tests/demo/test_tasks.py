"""Generated tasks: right answers, difficulty, and the same exercise from the same number."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from exercises import puzzles
from exercises.tasks import TASKS, Curriculum
from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.errors import UsageError

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "demo-hf-tokenizer"


def made(name: str, difficulty: float = 1.0, count: int = 200, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [TASKS[name](rng, difficulty) for _ in range(count)]


def grids(text: str) -> list[list[str]]:
    return [grid.split("\n") for grid in text.split("\n\n")]


def is_full(grid: list[str], box: tuple[int, int]) -> bool:
    side = len(grid)
    digits = set("123456789"[:side])
    rows, columns = box
    boxes = [
        {grid[r + i][c + j] for i in range(rows) for j in range(columns)}
        for r in range(0, side, rows)
        for c in range(0, side, columns)
    ]
    return all(house == digits for house in (*map(set, grid), *map(set, zip(*grid)), *boxes))  # noqa: B905


@pytest.mark.parametrize(
    ("name", "count", "side", "box", "least", "most"),
    [
        ("one", 1, 6, (2, 3), 12, 23),
        ("two", 2, 6, (2, 3), 12, 23),
        ("nine", 1, 9, (3, 3), 24, 45),
    ],
)
def test_sudokus_are_completed_by_their_answers(name, count, side, box, least, most):
    blanks = []
    for exercise in made(name, count=100):
        word, givens = exercise.prompt.split("\n", 1)
        assert word == "sudoku"
        asked, answered = grids(givens), grids(exercise.answer)
        assert len(asked) == len(answered) == count
        for given, full in zip(asked, answered, strict=True):
            assert is_full(full, box)
            cells = "".join(given)
            assert len(cells) == side**2
            assert all(a in (".", b) for a, b in zip(cells, "".join(full), strict=True))
            blanks.append(cells.count("."))
    assert least <= min(blanks) <= least + 3
    assert most - 3 <= max(blanks) <= most


def test_fast_puzzles_of_six_are_like_the_exam_s():
    for exercise in made("one"):
        givens = exercise.prompt.removeprefix("sudoku\n")
        assert sudoku.is_solved_by_naked_singles(givens)
        assert sudoku.is_valid_grid(exercise.answer)
    rng = np.random.default_rng(1)
    theirs = [sudoku.make_puzzle(rng).givens.count(".") for _ in range(400)]
    ours = [exercise.prompt.count(".") for exercise in made("one", count=400)]
    assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=0.6)  # three standard errors


def test_naked_singles_are_judged_as_by_the_slower_code():
    rng = np.random.default_rng(2)
    solution = [int(sign) for sign in sudoku.make_puzzle(rng).solution.replace("\n", "")]
    verdicts = []
    for _ in range(200):
        hidden = rng.permutation(36)[: rng.integers(10, 30)].tolist()
        cells = "".join("." if cell in hidden else str(solution[cell]) for cell in range(36))
        expected = sudoku.is_solved_by_naked_singles(cells)
        assert puzzles.is_solved_by_naked_singles(solution, hidden, puzzles.SIX) == expected
        verdicts.append(expected)
    assert 20 < sum(verdicts) < 180


def test_random_grids_have_every_digit_everywhere_alike():
    counts = np.zeros((36, 6))
    for exercise in made("bare", count=600):
        for cell, digit in enumerate(exercise.answer.replace("\n", "")):
            counts[cell, int(digit) - 1] += 1
    assert abs(counts / 600 - 1 / 6).max() < 0.08  # over five standard errors


def test_any_valid_grid_answers_the_bare_word():
    first, second = made("bare", count=2)
    assert first.prompt == "sudoku"
    assert first.is_right(second.answer) and not first.is_right(second.answer[:-1])
    assert not made("one")[0].is_right(second.answer)


def test_records_sort_count_and_fill_say_what_they_should():
    for exercise in made("record"):
        lines = exercise.prompt.split("\n")
        fields = [line.split(": ") for line in lines[1:]]
        assert lines[0] == "record" and 1 <= len(fields) <= 4
        answer = json.loads(exercise.answer)
        assert [[key, str(value)] for key, value in answer.items()] == fields
        assert exercise.answer == json.dumps(answer)
    for exercise in made("sort"):
        word, *words = exercise.prompt.split("\n")
        assert word == "sort" and 2 <= len(words) <= 8
        assert exercise.answer.split("\n") == sorted(words)
    for exercise in made("count"):
        first, last = map(int, exercise.prompt.removeprefix("count\n").split())
        numbers = [int(number) for number in exercise.answer.split(" ")]
        assert numbers == list(range(first, last + 1))
    for exercise in made("fill"):
        word, text, *slots = exercise.prompt.split("\n")
        for line in slots:
            slot, value = line.split(": ")
            text = text.replace("{" + slot + "}", value)
        assert word == "fill" and exercise.answer == text and "{" not in text


def test_counting_takes_several_canvases():
    lengths = [len(exercise.answer) for exercise in made("count")]
    assert min(lengths) < 64 and max(lengths) > 2 * 64


@pytest.mark.parametrize("name", [name for name in TASKS if name != "bare"])
def test_difficulty_grows(name):
    def size(difficulty):
        exercises = made(name, difficulty)
        return np.mean([len(e.answer) + e.prompt.count(".") for e in exercises])

    assert size(0.0) < size(0.5) < size(1.0)


def test_one_token_a_character():
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    for name in TASKS:
        for exercise in made(name, count=20):
            for text in (exercise.prompt, exercise.answer):
                ids = tokenizer.encode(text, add_special_tokens=False)
                assert len(ids) == len(text) and max(ids) < 128
                assert tokenizer.decode(ids) == text
                assert re.fullmatch(r"[\n -~]+", text)


def test_an_exercise_depends_on_its_number_alone():
    shares = {"one": 2.0, "sort": 1.0, "count": 1.0}
    there, again = Curriculum(shares, 100, 3), Curriculum(shares, 100, 3)
    expected = [there[number] for number in range(200)]
    assert [again[number] for number in reversed(range(200))] == expected[::-1]
    assert [Curriculum(shares, 100, 4)[number] for number in range(200)] != expected
    assert len(set(expected)) == 200


def test_tasks_come_in_their_shares():
    curriculum = Curriculum({"one": 2.0, "two": 0.0, "sort": 1.0, "count": 1.0})
    starts = [curriculum[number].prompt.split("\n")[0] for number in range(800)]
    assert starts.count("sudoku") / 800 == pytest.approx(0.5, abs=0.06)
    assert starts.count("sort") / 800 == pytest.approx(0.25, abs=0.05)
    assert not any("\n\n" in curriculum[number].prompt for number in range(800))


def test_the_ramp_ends_at_the_difficulty_of_an_exam():
    curriculum = Curriculum({"one": 1.0}, ramp=1000)
    assert [curriculum.difficulty(number) for number in (0, 500, 1000, 5000)] == [0, 0.5, 1, 1]
    assert Curriculum({"one": 1.0}).difficulty(0) == 1


@pytest.mark.parametrize(
    ("shares", "said"), [({"ten": 1}, "'ten'"), ({"one": -1}, "'one'"), ({"one": 0}, "one=1")]
)
def test_shares_that_cannot_be(shares, said):
    with pytest.raises(UsageError, match=said):
        Curriculum(shares)

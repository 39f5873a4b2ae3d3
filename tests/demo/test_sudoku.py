"""Fresh puzzles have the form and the difficulty of those that the demo model was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_diffgemma.demo import sudoku

ROWS = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "fixtures" / "sudoku-eval.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]


def puzzles_of(row: dict[str, str]) -> list[sudoku.Puzzle]:
    givens = row["prompt"].removeprefix("sudoku\n").split("\n\n")
    solutions = row["answer"].split("\n\n")
    return [sudoku.Puzzle(g, s) for g, s in zip(givens, solutions, strict=True)]


def made(count: int, seed: int = 0) -> list[sudoku.Puzzle]:
    rng = np.random.default_rng(seed)
    return [sudoku.make_puzzle(rng) for _ in range(count)]


def completions(givens: str) -> int:
    """How many valid grids complete `givens`, by plain search; stops at two."""
    cells = list(givens.replace("\n", ""))

    def search(cell: int) -> int:
        if cell == 36:
            return 1
        if cells[cell] != ".":
            return search(cell + 1)
        row, column = divmod(cell, 6)
        found = 0
        for digit in "123456":
            clash = any(
                cells[6 * r + c] == digit
                for r in range(6)
                for c in range(6)
                if r == row or c == column or (r // 2, c // 3) == (row // 2, column // 3)
            )
            if not clash:
                cells[cell] = digit
                found += search(cell + 1)
                cells[cell] = "."
                if found > 1:
                    break
        return found

    return search(0)


def agrees(puzzle: sudoku.Puzzle) -> bool:
    pairs = zip(puzzle.givens, puzzle.solution, strict=True)
    return all(given in (".", digit) for given, digit in pairs)


def test_all_rows_of_the_evaluation_set_are_in_our_format():
    assert len(ROWS) == 400
    for row in ROWS:
        puzzles = puzzles_of(row)
        assert len(puzzles) == {"one": 1, "two": 2}[row["task"]]
        assert sudoku.prompt(puzzles) == row["prompt"]
        assert sudoku.answer(puzzles) == row["answer"]
        assert all(sudoku.is_valid_grid(puzzle.solution) for puzzle in puzzles)
        assert all(agrees(puzzle) for puzzle in puzzles)
        assert all(sudoku.is_solved_by_naked_singles(puzzle.givens) for puzzle in puzzles)


def test_fresh_puzzles_are_as_hard_as_those_of_the_evaluation_set():
    theirs = [puzzle.givens.count(".") for row in ROWS for puzzle in puzzles_of(row)]
    ours = [puzzle.givens.count(".") for puzzle in made(400)]
    assert 12 == int(0.35 * 36) == min(ours)
    assert max(ours) <= int(0.65 * 36) == max(theirs) == 23
    assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=0.6)  # three standard errors


def test_fresh_puzzles_are_solvable_in_one_way():
    for puzzle in made(60):
        assert sudoku.is_valid_grid(puzzle.solution)
        assert agrees(puzzle)
        assert sudoku.is_solved_by_naked_singles(puzzle.givens)
        assert completions(puzzle.givens) == 1


def test_the_seed_decides():
    assert made(5, seed=7) == made(5, seed=7)
    assert made(5, seed=7) != made(5, seed=8)
    assert len(set(made(100))) == 100


def test_the_format_in_full():
    one = sudoku.Puzzle("\n".join(["......"] * 6), "\n".join(["123456"] * 6))
    assert sudoku.prompt([]) == "sudoku"
    assert sudoku.prompt([one]) == "sudoku\n......\n......\n......\n......\n......\n......"
    assert sudoku.prompt([one, one]).split("\n\n") == [sudoku.prompt([one]), one.givens]
    assert sudoku.answer([one, one]) == one.solution + "\n\n" + one.solution


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text + "\n",
        lambda text: text[:-1],
        lambda text: text.replace("1", "7"),
        lambda text: text.replace("1", "."),
        lambda text: text[1] + text[0] + text[2:],  # two cells swapped
        lambda text: text[14:21] + text[7:14] + text[:7] + text[21:],  # two rows swapped
    ],
)
def test_a_spoilt_grid_is_not_valid(spoil):
    grid = made(1)[0].solution
    assert sudoku.is_valid_grid(grid)
    assert not sudoku.is_valid_grid(spoil(grid))


def test_boxes_are_two_rows_of_three():
    latin = "123456\n234561\n345612\n456123\n561234\n612345"  # rows and columns, but no boxes
    assert not sudoku.is_valid_grid(latin)
    two_by_three = "123456\n456123\n231564\n564231\n312645\n645312"
    assert sudoku.is_valid_grid(two_by_three)
    three_by_two = "\n".join(
        "".join(column) for column in zip(*two_by_three.split("\n"), strict=True)
    )
    assert not sudoku.is_valid_grid(three_by_two)


def test_puzzles_that_need_more_than_naked_singles_are_told_apart():
    assert not sudoku.is_solved_by_naked_singles("\n".join(["......"] * 6))

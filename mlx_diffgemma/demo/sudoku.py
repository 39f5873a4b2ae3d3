"""Fresh sudokus of six by six, in the form that the demo model was trained on.

A box is two rows of three. A prompt is the word `sudoku`, a newline and six rows with `.` for
blanks; its answer is the six rows filled. Several puzzles are parted by a blank line. The bare word
`sudoku` asks for any valid grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIDE = 6
BOX = (2, 3)
BLANK = "."
BARE_PROMPT = "sudoku"
LEAST_BLANK, MOST_BLANK = 0.35, 0.65
"""The share of blanks that the model was trained on."""

_CELLS = SIDE * SIDE


def _box(row: int, column: int) -> int:
    return row // BOX[0] * (SIDE // BOX[1]) + column // BOX[1]


_HOUSES = [
    [
        cell
        for cell, (r, c) in enumerate(np.ndindex(SIDE, SIDE))
        if index == (r, c, _box(r, c))[kind]
    ]
    for kind in range(3)
    for index in range(SIDE)
]
"""The cells (row by row) of each row, column and box."""

_PEERS = [
    sorted({peer for house in _HOUSES if cell in house for peer in house} - {cell})
    for cell in range(_CELLS)
]


@dataclass(frozen=True)
class Puzzle:
    """Six rows of six with `.` for blanks, and the only grid that completes them; the rows are
    joined by newlines."""

    givens: str
    solution: str


def make_puzzle(rng: np.random.Generator) -> Puzzle:
    """A puzzle that naked singles solve: some blank cell always has one digit left."""
    solution = _random_grid(rng)
    while True:
        blanks = int(_CELLS * rng.uniform(LEAST_BLANK, MOST_BLANK))
        givens = solution.copy()
        givens[rng.permutation(_CELLS)[:blanks]] = 0
        if _fill_naked_singles(givens):
            return Puzzle(_text(givens), _text(solution))


def prompt(puzzles: Sequence[Puzzle]) -> str:
    """What to ask the model; without puzzles, the bare word."""
    if not puzzles:
        return BARE_PROMPT
    return f"{BARE_PROMPT}\n" + "\n\n".join(puzzle.givens for puzzle in puzzles)


def answer(puzzles: Sequence[Puzzle]) -> str:
    """What the model should answer to the prompt of `puzzles`."""
    return "\n\n".join(puzzle.solution for puzzle in puzzles)


def is_valid_grid(text: str) -> bool:
    """Whether `text` is six rows of six in which every row, column and box has every digit."""
    rows = text.split("\n")
    if len(rows) != SIDE or any(len(row) != SIDE for row in rows):
        return False
    cells, digits = "".join(rows), set("123456")
    return all({cells[cell] for cell in house} == digits for house in _HOUSES)


def is_solved_by_naked_singles(givens: str) -> bool:
    """Whether filling cells that have one digit left, again and again, completes `givens`."""
    cells = givens.replace("\n", "").replace(BLANK, "0")
    return _fill_naked_singles(np.array([int(cell) for cell in cells]))


def _random_grid(rng: np.random.Generator) -> np.ndarray:
    """A full grid, [36], by backtracking over digits in random order."""
    grid = np.zeros(_CELLS, int)

    def fill(cell: int) -> bool:
        if cell == _CELLS:
            return True
        for digit in rng.permutation(_candidates(grid, cell)):
            grid[cell] = digit
            if fill(cell + 1):
                return True
        grid[cell] = 0
        return False

    fill(0)
    return grid


def _candidates(grid: np.ndarray, cell: int) -> list[int]:
    used = set(grid[_PEERS[cell]].tolist())
    return [digit for digit in range(1, SIDE + 1) if digit not in used]


def _fill_naked_singles(grid: np.ndarray) -> bool:
    """Whether naked singles fill `grid` [36], in which 0 is a blank, to the end. The array itself
    is not changed."""
    grid = grid.copy()
    while True:
        blanks = np.flatnonzero(grid == 0).tolist()
        if not blanks:
            return True
        singles = [(cell, left) for cell in blanks if len(left := _candidates(grid, cell)) == 1]
        if not singles:
            return False
        for cell, (digit,) in singles:
            grid[cell] = digit


def _text(grid: np.ndarray) -> str:
    rows = grid.reshape(SIDE, SIDE).tolist()
    return "\n".join("".join(str(digit or BLANK) for digit in row) for row in rows)

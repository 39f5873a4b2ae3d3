"""Every task of the demo model by name, and the stream of exercises that teaches them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from exercises import text_tasks
from exercises.exercise import Exercise, FreeGrid, Maker
from exercises.puzzles import NINE, SIX, Board, make_puzzle
from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.errors import UsageError

_EASIER = 0.2
"""By how much smaller the share of blanks is for a beginner."""
_NINE_LEAST, _NINE_MOST = 0.3, 45 / 81  # 36 givens and more


def _puzzles(
    rng: np.random.Generator, difficulty: float, count: int, board: Board, least: float, most: float
) -> Exercise:
    less = _EASIER * (1 - difficulty)
    puzzles = [make_puzzle(rng, board, least - less, most - less) for _ in range(count)]
    return Exercise(sudoku.prompt(puzzles), sudoku.answer(puzzles))


def one(rng: np.random.Generator, difficulty: float) -> Exercise:
    """A sudoku of six by six."""
    return _puzzles(rng, difficulty, 1, SIX, sudoku.LEAST_BLANK, sudoku.MOST_BLANK)


def two(rng: np.random.Generator, difficulty: float) -> Exercise:
    """Two of them: two canvases of 64."""
    return _puzzles(rng, difficulty, 2, SIX, sudoku.LEAST_BLANK, sudoku.MOST_BLANK)


def bare(rng: np.random.Generator, difficulty: float) -> Exercise:
    """The word alone asks for any grid."""
    puzzle = make_puzzle(rng, SIX, 0, 0)
    return FreeGrid(sudoku.prompt([]), puzzle.solution)


def nine(rng: np.random.Generator, difficulty: float) -> Exercise:
    """A sudoku of nine by nine."""
    return _puzzles(rng, difficulty, 1, NINE, _NINE_LEAST, _NINE_MOST)


def letters(rng: np.random.Generator, difficulty: float) -> Exercise:
    """A sudoku of six by six to be answered in letters, which the demo model does not know before
    it is fine-tuned (`make_finetune_data.py --task letters`)."""
    asked = one(rng, difficulty)
    return Exercise(asked.prompt, asked.answer.translate(str.maketrans("123456", "abcdef")))


TASKS: Mapping[str, Maker] = {
    "one": one,
    "two": two,
    "bare": bare,
    "nine": nine,
    "record": text_tasks.record,
    "sort": text_tasks.sort,
    "count": text_tasks.count,
    "fill": text_tasks.fill,
    "letters": letters,  # at the end, for the inputs of the others follow from their places
}


@dataclass(frozen=True)
class Curriculum:
    """Exercises by number: a pure function of the settings, so that a run can go on anywhere.

    Attributes:
        shares: of each task among the exercises; they need not sum to 1.
        ramp: number of the exercise from which all have the difficulty of an exam; before, it
            grows with the number.
        seed: of all exercises.
    """

    shares: Mapping[str, float]
    ramp: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, share in self.shares.items():
            if name not in TASKS:
                raise UsageError(f"task '{name}' is unknown; known are {', '.join(TASKS)}.")
            if not share >= 0:
                raise UsageError(f"the share of task '{name}' must not be negative, not {share}.")
        if not sum(self.shares.values()) > 0:
            raise UsageError("no task has a share; give at least one, such as one=1.")

    def __getitem__(self, number: int) -> Exercise:
        rng = np.random.default_rng([self.seed, number])
        bounds = np.cumsum(list(self.shares.values()))
        place = int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))
        return TASKS[list(self.shares)[place]](rng, self.difficulty(number))

    def difficulty(self, number: int) -> float:
        return min(1.0, number / self.ramp) if self.ramp else 1.0

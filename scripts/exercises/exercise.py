"""What a task asks and what is right: strings alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from mlx_diffgemma.demo.sudoku import is_valid_grid


@dataclass(frozen=True)
class Exercise:
    """A prompt, and the only right answer to it."""

    prompt: str
    answer: str

    def is_right(self, text: str) -> bool:
        return text == self.answer


@dataclass(frozen=True)
class FreeGrid(Exercise):
    """Any valid grid is right; `answer` is one of them."""

    def is_right(self, text: str) -> bool:
        return is_valid_grid(text)


Maker: TypeAlias = Callable[[np.random.Generator, float], Exercise]
"""Makes an exercise of a difficulty from 0 (short, for a beginner) to 1 (what an exam asks)."""

"""How often a model answers the demo's tasks exactly, and in how many steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from exercises.exercise import Exercise
from exercises.tasks import TASKS
from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.events import Finished
from mlx_diffgemma.diffusion.generate import generate_canvases
from mlx_diffgemma.diffusion.noise import seeded
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.text.prompt import encode_prompt

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

SUDOKUS = {"one": 1, "two": 2}
"""Puzzles in a prompt, by the name of the task: what is compared unless other tasks are named."""


@dataclass(frozen=True)
class Answer:
    """Attributes:
    steps: denoising steps of each canvas.
    tokens: how many were committed.
    encodings: passes of the encoder over canvases.
    """

    text: str
    steps: tuple[int, ...]
    tokens: int
    encodings: int = 0


@dataclass(frozen=True)
class Marks:
    """Sums over some answers, which add up.

    Attributes:
        count: answers.
        exact: how many of them were right in every character.
        steps, canvases, tokens, encodings: of all of them together.
    """

    count: int = 0
    exact: int = 0
    steps: int = 0
    canvases: int = 0
    tokens: int = 0
    encodings: int = 0

    def __add__(self, other: Marks) -> Marks:
        return Marks(
            self.count + other.count,
            self.exact + other.exact,
            self.steps + other.steps,
            self.canvases + other.canvases,
            self.tokens + other.tokens,
            self.encodings + other.encodings,
        )

    @property
    def rate(self) -> float:
        return self.exact / self.count

    @property
    def standard_error(self) -> float:
        """Of the rate, as the binomial distribution with one more right and one more wrong answer
        has it, so that a rate of 1 is not certain."""
        rate = (self.exact + 1) / (self.count + 2)
        return float(np.sqrt(rate * (1 - rate) / self.count))

    @property
    def steps_per_canvas(self) -> float:
        return self.steps / self.canvases

    @property
    def passes_per_canvas(self) -> float:
        """Of decoder and encoder together; the prompt's are left out."""
        return (self.steps + self.encodings) / self.canvases

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.steps


def make_tasks(
    count: int, seed: int, names: Sequence[str] = tuple(SUDOKUS)
) -> dict[str, list[Exercise]]:
    """`count` inputs of each task, the same for every model and whatever else is asked.

    Raises:
        UsageError: there is no such task.
    """
    for name in names:
        if name not in TASKS:
            raise UsageError(f"task '{name}' is unknown; known are {', '.join(TASKS)}.")
    rng = np.random.default_rng(seed)
    made = {name: [_sudoku(rng, size) for _ in range(count)] for name, size in SUDOKUS.items()}
    for place, (name, make) in enumerate(TASKS.items()):
        if name in names and name not in SUDOKUS:
            own = np.random.default_rng([seed, place])
            made[name] = [make(own, 1.0) for _ in range(count)]
    return {name: made[name] for name in names}


def _sudoku(rng: np.random.Generator, puzzles: int) -> Exercise:
    made = [sudoku.make_puzzle(rng) for _ in range(puzzles)]
    return Exercise(sudoku.prompt(made), sudoku.answer(made))


def answer(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    config: DiffusionConfig,
    prompts: Sequence[str],
    seed: int,
) -> list[Answer]:
    """Answer all prompts in one batch."""
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    *_, finished = generate_canvases(model, ids, config, seeded(seed))
    assert isinstance(finished, Finished)
    return [
        Answer(tokenizer.decode(list(tokens)), steps, len(tokens), encodings)
        for tokens, steps, encodings in zip(
            finished.tokens, finished.steps, finished.encodings, strict=True
        )
    ]


def mark(answers: Iterable[Answer], exercises: Iterable[Exercise]) -> Marks:
    """Compare answers with the right ones."""
    marks = Marks()
    for given, exercise in zip(answers, exercises, strict=True):
        right = exercise.is_right(given.text)
        steps, canvases = sum(given.steps), len(given.steps)
        marks += Marks(1, int(right), steps, canvases, given.tokens, given.encodings)
    return marks

"""Pictures of sudokus of six by six, drawn by an unsteady hand, in the form that the demo's reading
model was trained on.

The picture is the grid and nothing around it. The model answers with the 36 cells, row by row, and
`.` for blanks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from mlx_diffgemma.demo.sudoku import BLANK, BOX, SIDE

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

CELL = 48  # pixels of a side
PROMPT = "read"


def _arc(
    x: float, y: float, across: float, down: float, first: float, last: float
) -> list[tuple[float, float]]:
    """Points of an ellipse about (x, y) between two angles in degrees, clockwise from the right."""
    angles = np.radians(np.linspace(first, last, 10))
    return [(x + across * math.cos(a), y + down * math.sin(a)) for a in angles]


_STROKES: dict[str, list[list[tuple[float, float]]]] = {
    "1": [[(0.2, 0.25), (0.55, 0), (0.55, 1)]],
    "2": [[*_arc(0.5, 0.3, 0.42, 0.3, 180, 390), (0.1, 1), (0.92, 1)]],
    "3": [[*_arc(0.45, 0.26, 0.4, 0.26, 200, 450), *_arc(0.45, 0.75, 0.45, 0.25, 270, 520)]],
    "4": [[(0.7, 1), (0.7, 0), (0.05, 0.68), (0.98, 0.68)]],
    "5": [[(0.9, 0), (0.2, 0), (0.14, 0.44), *_arc(0.45, 0.68, 0.45, 0.32, 235, 510)]],
    "6": [
        [(0.75, 0.02), *_arc(0.6, 0.6, 0.5, 0.55, 240, 180), *_arc(0.5, 0.7, 0.4, 0.3, 180, 540)]
    ],
}
"""The strokes of each digit in a square whose corners are (0, 0) and (1, 1), y downwards."""


def answer(givens: str) -> str:
    """What the model should say of the picture of a puzzle, its rows joined by newlines."""
    return givens.replace("\n", "")


def rows_of(read: str) -> str:
    """The rows of a puzzle that was read, joined by newlines."""
    return "\n".join(read[at : at + SIDE] for at in range(0, len(read), SIDE))


def draw(givens: str, rng: np.random.Generator) -> Image:
    """A picture of 288 × 288 pixels of six rows with `.` for blanks, joined by newlines. No two
    pictures of the same rows are alike."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    side = CELL * SIDE
    paper = _colour(rng.integers(215, 256) + rng.integers(-12, 1, 3))
    ink = _colour(rng.integers(0, 60) + rng.integers(0, 40, 3))
    image = Pillow.new("RGB", (side, side), paper)
    canvas = ImageDraw.Draw(image)
    for number in range(SIDE + 1):
        for across in (False, True):
            thick = 4 if number % BOX[across] == 0 else 2
            at = min(number * CELL, side - 1)
            line = (0, at, side, at) if not across else (at, 0, at, side)
            canvas.line(line, fill=ink, width=thick)
    for cell, digit in enumerate(answer(givens)):
        if digit != BLANK:
            row, column = divmod(cell, SIDE)
            middle = ((column + 0.5) * CELL, (row + 0.5) * CELL)
            _stroke(canvas, digit, middle, ink, rng)
    return _with_grain(image, rng.normal(0, rng.uniform(0, 10), (side, side, 1)))


def _stroke(
    canvas: ImageDraw,
    digit: str,
    middle: tuple[float, float],
    ink: tuple[int, int, int],
    rng: np.random.Generator,
) -> None:
    """Draw one digit around the place `middle`, a little off it, turned, slanted and shaken."""
    size = np.array([rng.uniform(17, 25), rng.uniform(27, 34)])
    turn, slant, thick = rng.normal(0, 0.09), rng.normal(0, 0.1), int(rng.integers(3, 6))
    shape = np.array([[1, slant], [0, 1]]) * size
    turned = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    off = np.array(middle) + rng.normal(0, 1.2, 2)
    for points in _STROKES[digit]:
        shaken = np.array(points) - 0.5 + rng.normal(0, 0.02, (len(points), 2))
        line = [(x, y) for x, y in (shaken @ shape.T @ turned.T + off).tolist()]
        canvas.line(line, fill=ink, width=thick, joint="curve")


def _with_grain(image: Image, grain: np.ndarray) -> Image:
    from PIL import Image as Pillow

    values = np.clip(np.asarray(image, np.float32) + grain, 0, 255)
    return Pillow.fromarray(np.rint(values).astype(np.uint8), "RGB")


def _colour(values: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = np.clip(values, 0, 255).tolist()
    return red, green, blue

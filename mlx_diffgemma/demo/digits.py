"""Fresh pictures of drawn digits, in the form that the demo's reading model was trained on.

One to four digits stand in a strip, each drawn by an unsteady hand; the answer is the digits from
left to right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

HEIGHT, WIDTH = 144, 384
MOST = 4
PROMPT = "read"


def _arc(
    x: float, y: float, across: float, down: float, first: float, last: float
) -> list[tuple[float, float]]:
    """Points of an ellipse about (x, y) between two angles in degrees, clockwise from the right."""
    angles = np.radians(np.linspace(first, last, 10))
    return [(x + across * math.cos(a), y + down * math.sin(a)) for a in angles]


_STROKES: dict[str, list[list[tuple[float, float]]]] = {
    "0": [_arc(0.5, 0.5, 0.42, 0.5, 0, 360)],
    "1": [[(0.2, 0.25), (0.55, 0), (0.55, 1)]],
    "2": [[*_arc(0.5, 0.3, 0.42, 0.3, 180, 390), (0.1, 1), (0.92, 1)]],
    "3": [[*_arc(0.45, 0.26, 0.4, 0.26, 200, 450), *_arc(0.45, 0.75, 0.45, 0.25, 270, 520)]],
    "4": [[(0.7, 1), (0.7, 0), (0.05, 0.68), (0.98, 0.68)]],
    "5": [[(0.9, 0), (0.2, 0), (0.14, 0.44), *_arc(0.45, 0.68, 0.45, 0.32, 235, 510)]],
    "6": [[(0.75, 0.02), *_arc(0.6, 0.6, 0.5, 0.55, 240, 180), *_arc(0.5, 0.7, 0.4, 0.3, 180, 540)]],
    "7": [[(0.06, 0), (0.94, 0), (0.4, 1)]],
    "8": [_arc(0.5, 0.25, 0.36, 0.25, 90, 450), _arc(0.5, 0.75, 0.44, 0.25, 270, 630)],
    "9": [[*_arc(0.5, 0.3, 0.4, 0.3, 0, 360), *_arc(0.4, 0.4, 0.5, 0.6, 0, 70)]],
}
"""The strokes of each digit, in a square whose corners are (0, 0) and (1, 1), y downwards."""


@dataclass(frozen=True)
class Drawing:
    """A picture of digits, and which they are from left to right."""

    image: Image
    digits: str


def draw(rng: np.random.Generator) -> Drawing:
    """A fresh picture."""
    from PIL import Image, ImageDraw

    count = int(rng.integers(1, MOST + 1))
    digits = "".join(map(str, rng.integers(0, 10, count)))
    light, dark = rng.integers(170, 256, 3), rng.integers(0, 90, 3)
    paper, ink = (dark, light) if rng.random() < 0.3 else (light, dark)
    image = Image.new("RGB", (WIDTH, HEIGHT), _colour(paper))
    canvas = ImageDraw.Draw(image)
    cell = WIDTH / MOST
    left = rng.uniform(0, WIDTH - count * cell)
    for place, digit in enumerate(digits):
        middle = (left + (place + 0.5) * cell + rng.normal(0, 4), HEIGHT / 2 + rng.normal(0, 7))
        _stroke(canvas, digit, middle, _colour(ink), rng)
    grain = rng.normal(0, rng.uniform(0, 14), (HEIGHT, WIDTH, 1))
    return Drawing(_with_grain(image, grain), digits)


def _stroke(
    canvas: object,
    digit: str,
    middle: tuple[float, float],
    ink: tuple[int, int, int],
    rng: np.random.Generator,
) -> None:
    width, height = rng.uniform(42, 66), rng.uniform(78, 108)
    turn, slant = rng.normal(0, 0.1), rng.normal(0, 0.12)
    thick = int(rng.integers(6, 15))
    for points in _STROKES[digit]:
        shaken = np.array(points) - 0.5 + rng.normal(0, 0.018, (len(points), 2))
        x = shaken[:, 0] * width - slant * shaken[:, 1] * height
        y = shaken[:, 1] * height
        line = [
            (
                middle[0] + math.cos(turn) * a - math.sin(turn) * b,
                middle[1] + math.sin(turn) * a + math.cos(turn) * b,
            )
            for a, b in zip(x.tolist(), y.tolist(), strict=True)
        ]
        canvas.line(line, fill=ink, width=thick, joint="curve")  # type: ignore[attr-defined]
        for a, b in (line[0], line[-1]):  # round ends
            r = thick / 2
            canvas.ellipse((a - r, b - r, a + r, b + r), fill=ink)  # type: ignore[attr-defined]


def _with_grain(image: Image, grain: np.ndarray) -> Image:
    from PIL import Image as Pillow

    values = np.clip(np.asarray(image, np.float32) + grain, 0, 255)
    return Pillow.fromarray(np.rint(values).astype(np.uint8), "RGB")


def _colour(values: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = values.tolist()
    return red, green, blue

"""Record a canvas forming, as a picture for the documentation.

    python scripts/record_demo.py docs/canvas.svg [--seed 30]

The shipped demo model answers a fresh prompt of two sudokus; the program's own display draws the
first steps of each canvas, and the answer.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from mlx_diffgemma import load, stream_generate
from mlx_diffgemma.cli import display, grid
from mlx_diffgemma.cli.outcome import pieces_of
from mlx_diffgemma.demo import sudoku

FRAMES_A_ROW, FRAME_WIDTH = 3, 37  # two grids and the gap between them
WIDTH = FRAMES_A_ROW * (FRAME_WIDTH + 3)
FETCHED_FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path, help="the SVG file to write")
    parser.add_argument("--seed", type=int, default=30, help="of the puzzles and the answer")
    arguments = parser.parse_args()
    arguments.path.parent.mkdir(parents=True, exist_ok=True)
    arguments.path.write_text(record(arguments.seed), encoding="utf-8")


def record(seed: int) -> str:
    """The SVG of one run."""
    rng = np.random.default_rng(seed)
    puzzles = [sudoku.make_puzzle(rng) for _ in range(2)]
    frames = list(draw(puzzles, seed))
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text("Two sudokus in one prompt, as mlx-diffgemma draws them", "bold"))
    console.print("The draft, by how sure the model is:", display.legend(), "\n")
    for start in range(0, len(frames), FRAMES_A_ROW):
        console.print(grid.beside(frames[start : start + FRAMES_A_ROW]))
        console.print()
    picture = console.export_svg(title="mlx-diffgemma")
    return FETCHED_FONT.sub("", picture)  # any monospaced font at hand does


def draw(puzzles: list[sudoku.Puzzle], seed: int) -> Iterator[Text]:
    """The puzzles, each step of the draft, and the answer as it is marked."""
    model, tokenizer = load("demo")
    prompt = sudoku.prompt(puzzles)
    givens, solutions = grid.grids(prompt), grid.grids(sudoku.answer(puzzles))
    yield captioned("the prompt", grid.beside([grid.puzzle(rows) for rows in givens]))
    view = display.CanvasView(pieces_of(tokenizer), frame=grid.framed_text)
    for response in stream_generate(model, tokenizer, prompt, seed=seed):
        view.add(response)
        if response.canvas:
            mean = sum(response.entropy) / len(response.entropy)
            place = f"canvas {response.canvas_index + 1} · step {response.step}"
            yield captioned(f"{place} · mean entropy {mean:.2f}", view.text())
    answers = grid.grids(view.committed)
    if not all(map(grid.is_grid, answers)) or len(answers) != len(puzzles):
        raise SystemExit(f"seed {seed}: the answer is no pair of grids; take another.")
    yield captioned("the answer", grid.beside(list(map(grid.solved, answers, givens, solutions))))


def captioned(caption: str, text: Text) -> Text:
    return Text("\n").join([Text(caption.ljust(FRAME_WIDTH), "dim"), text])


if __name__ == "__main__":
    main()

"""`mlx-diffgemma demo`: the small model that ships with the program solves fresh sudokus."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from mlx_diffgemma.cli.command import Only, command
from mlx_diffgemma.cli.settings import Denoising, Loading, Showing

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from rich.console import Console

    from mlx_diffgemma.cli.opening import Opened
    from mlx_diffgemma.generation_response import GenerationResponse

SECONDS_PER_STEP = 0.5  # for the eye: the model itself takes a few hundredths


@command(
    "mlx-diffgemma demo",
    "mlx-diffgemma demo --seed 7",
    "mlx-diffgemma demo --no-watch",
)
def demo(
    *,
    loading: Annotated[Loading, Only("adapter_path")],
    denoising: Annotated[Denoising, Only("seed")],
    showing: Annotated[Showing, Only("watch")],
) -> None:
    """Solve fresh sudokus with a tiny model that ships with the program; needs no network."""
    _show(denoising.seed, showing.watch, replace(loading, model="demo"))


def _show(seed: int | None, watch: bool, loading: Loading) -> None:
    import numpy as np

    from mlx_diffgemma.cli import display, opening, output

    if seed is None:
        seed = secrets.randbelow(2**16)
    rng = np.random.default_rng(seed)
    watch = output.can_draw(watch)
    opened = opening.open_model(loading)
    console = output.terminal()
    print(f"Fresh 6×6 sudokus for a DiffusionGemma of 2.2 million parameters (seed {seed}).")
    if watch:
        console.print("The draft, by how sure the model is:", display.legend())
    print("\nOne puzzle:", flush=True)
    _solve(opened, console, 1, rng, seed, watch)
    print("\nTwo puzzles in one prompt; the answer is longer than a canvas:", flush=True)
    _solve(opened, console, 2, rng, seed, watch)


def _solve(
    opened: Opened, console: Console, count: int, rng: np.random.Generator, seed: int, watch: bool
) -> None:
    from mlx_diffgemma.cli import display, grid, output, report
    from mlx_diffgemma.cli.outcome import Outcome, pieces_of
    from mlx_diffgemma.demo import sudoku
    from mlx_diffgemma.generation import stream_generate

    made = [sudoku.make_puzzle(rng) for _ in range(count)]
    prompt = sudoku.prompt(made)
    puzzles, solutions = grid.grids(prompt), grid.grids(sudoku.answer(made))
    console.print(grid.beside([grid.puzzle(puzzle) for puzzle in puzzles]))

    def start(on_prefill: output.OnPrefill) -> Iterable[GenerationResponse]:
        return stream_generate(
            opened.model,
            opened.tokenizer,
            prompt,
            seed=seed,
            draft=False,
            on_prefill=on_prefill,
        )

    outcome = Outcome()
    if watch:
        view = display.CanvasView(pieces_of(opened.tokenizer), frame=grid.framed_text)
        drawing = display.CanvasDisplay(console, view, seconds_per_step=SECONDS_PER_STEP)
        output.animate(start, drawing, outcome)
    else:
        output.collect(start, outcome)
    answers = grid.grids(outcome.text)
    if len(answers) == count and all(map(grid.is_grid, answers)):
        console.print(grid.beside(list(map(grid.solved, answers, puzzles, solutions))))
    else:
        print(display.printable(outcome.text))
    print(_verdict(answers, solutions))
    print(report.effort(outcome))


def _verdict(answers: list[list[str]], solutions: list[list[str]]) -> str:
    """Whether the answer is right, and where not."""
    from mlx_diffgemma.cli import grid

    if answers == solutions:
        return "Right: every cell is as in the solution."
    if len(answers) != len(solutions) or not all(map(grid.is_grid, answers)):
        return "Wrong: that is not the shape of the answer."
    counts = [grid.mistakes(*pair) for pair in zip(answers, solutions, strict=True)]
    if len(counts) == 1:
        return f"Wrong in {counts[0]} of 36 cells."
    each = ("right" if not count else f"wrong in {count} of 36 cells" for count in counts)
    return f"Wrong: {', '.join(f'grid {n} is {how}' for n, how in enumerate(each, 1))}."

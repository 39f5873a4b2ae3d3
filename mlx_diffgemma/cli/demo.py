"""`mlx-diffgemma demo`: the small model that ships with the program solves, mends and fills."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from mlx_diffgemma.cli.command import Only, command
from mlx_diffgemma.cli.settings import Denoising, Loading, Showing
from mlx_diffgemma.settings import Setting

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from rich.console import Console

    from mlx_diffgemma.cli.opening import Opened
    from mlx_diffgemma.demo.sudoku import Puzzle
    from mlx_diffgemma.generation_response import GenerationResponse

SECONDS_PER_STEP = 0.5  # slow enough to follow; the model itself takes a few hundredths
_TEMPLATE = "your {thing:/[a-z]{4}/} waits in {town:/[a-z]{4}/}."
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@command(
    "mlx-diffgemma demo",
    "mlx-diffgemma demo --seed 7",
    "mlx-diffgemma demo --no-watch",
    "mlx-diffgemma demo --image",
    "mlx-diffgemma demo --web",
)
def demo(
    *,
    web: Annotated[
        bool, Setting("Page in the browser, in place of the terminal.", panel="Output")
    ] = False,
    loading: Annotated[Loading, Only("adapter_path")],
    denoising: Annotated[Denoising, Only("seed")],
    showing: Annotated[Showing, Only("watch")],
    image: Annotated[
        bool,
        Setting("Reading of a puzzle from a fresh picture, by another tiny model.", panel="Prompt"),
    ] = False,
) -> None:
    """Solve a sudoku, mend a row of another in place and fill a template, with a tiny model that
    ships with the program; needs no network."""
    if web:
        _open_page(replace(loading, model="demo"))
    elif image:
        _read(denoising.seed, showing.watch, loading)
    else:
        _show(denoising.seed, showing.watch, replace(loading, model="demo"))


def _read(seed: int | None, watch: bool, loading: Loading) -> None:
    """Read a puzzle from a picture, then solve what was read."""
    import tempfile

    import numpy as np

    from mlx_diffgemma.cli import grid, opening, output
    from mlx_diffgemma.demo import drawing, sudoku
    from mlx_diffgemma.generation import generate

    if seed is None:
        seed = secrets.randbelow(2**16)
    rng = np.random.default_rng(seed)
    puzzle = sudoku.make_puzzle(rng)
    image = drawing.draw(puzzle.givens, rng)
    with tempfile.NamedTemporaryFile(suffix=".png", delete=False) as file:
        image.save(file, "PNG")
    console = output.terminal()
    print(f"A fresh 6×6 sudoku, drawn into {file.name} (seed {seed}).", flush=True)
    reader = opening.open_model(replace(loading, model="demo-image"))
    read = generate(reader.model, reader.tokenizer, drawing.PROMPT, images=[image], seed=seed)
    rows = drawing.rows_of(read).split("\n")
    if not grid.is_grid(rows):
        print(f"What was read is no puzzle: {read!r}.")
        return
    print("Read from the picture:")
    console.print(grid.puzzle(rows))
    wrong = sum(a != b for a, b in zip(read, drawing.answer(puzzle.givens), strict=True))
    if wrong:
        print(f"Wrong in {wrong} of 36 cells.")
        return
    print("Right: every cell is as it was drawn.\n\nSolved by the other small model:", flush=True)
    _solve(opening.open_model(replace(loading, model="demo")), console, puzzle, seed, watch)


def _show(seed: int | None, watch: bool, loading: Loading) -> None:
    import numpy as np

    from mlx_diffgemma.cli import display, opening, output

    if seed is None:
        seed = secrets.randbelow(2**16)
    rng = np.random.default_rng(seed)
    watch = output.can_draw(watch)
    opened = opening.open_model(loading)
    console = output.terminal()
    print(
        f"A DiffusionGemma of 2.2 million parameters, and tasks that are new to it (seed {seed})."
    )
    if watch:
        console.print("The draft, by how sure the model is:", display.legend())
    perform(opened, console, rng, seed, watch)
    print("\nmlx-diffgemma demo --web shows more of this, in the browser.")


def perform(
    opened: Opened, console: Console, rng: np.random.Generator, seed: int, watch: bool
) -> list[bool]:
    """Show each of the tasks and say how it came out. Returns for each whether it is right."""
    from mlx_diffgemma.demo import sudoku

    print("\nA puzzle, solved:", flush=True)
    solved = _solve(opened, console, sudoku.make_puzzle(rng), seed, watch)
    print("\nA grid with a wrong row, mended in place; all else is pinned:", flush=True)
    mended = _mend(opened, console, rng, seed)
    print("\nA template, filled from a list; its text is pinned:", flush=True)
    return [solved, mended, _fill(opened, console, rng, seed)]


def _open_page(loading: Loading) -> None:
    """Serve the model at a free port until Ctrl-C, and open the page in the browser.

    Raises:
        UsageError: the packages of the server are not installed.
    """
    import threading
    import webbrowser

    from mlx_diffgemma.cli.serve import check_packages

    check_packages("--web")
    from mlx_diffgemma.cli.opening import open_model
    from mlx_diffgemma.server import lifecycle
    from mlx_diffgemma.server.app import create_app
    from mlx_diffgemma.server.config import ServerSettings
    from mlx_diffgemma.server.engine import Engine

    settings = ServerSettings(port=0)
    opened = open_model(loading)
    sockets = lifecycle.listen(settings)
    address = lifecycle.url(sockets)
    app = create_app(Engine(opened.model, opened.tokenizer, name="demo"), settings)
    print(f"{address} is the page; Ctrl-C ends it.", flush=True)
    # Opening a browser that runs in the terminal returns only when it is closed.
    threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    lifecycle.run(app, sockets)


def _solve(opened: Opened, console: Console, made: Puzzle, seed: int, watch: bool) -> bool:
    from mlx_diffgemma.cli import display, grid, output, summaries
    from mlx_diffgemma.cli.outcome import Outcome, pieces_of
    from mlx_diffgemma.demo import sudoku
    from mlx_diffgemma.generation import stream_generate

    prompt = sudoku.prompt([made])
    (puzzle,), solution = grid.grids(prompt), made.solution.split("\n")
    console.print(grid.puzzle(puzzle))

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
    right = _judge(console, outcome.text, puzzle, solution)
    print(summaries.effort(outcome))
    return right


def _mend(opened: Opened, console: Console, rng: np.random.Generator, seed: int) -> bool:
    """Spoil a row of a grid, and have the model write it anew between the others. Returns whether
    the grid is right then."""
    from mlx_diffgemma.cli import grid
    from mlx_diffgemma.demo import sudoku
    from mlx_diffgemma.editing.edit import edit

    solution = sudoku.make_puzzle(rng).solution.split("\n")
    number = int(rng.integers(sudoku.SIDE))
    wrong = solution[number]
    while wrong == solution[number]:
        wrong = "".join(rng.permutation(list(wrong)))
    spoilt = [*solution[:number], wrong, *solution[number + 1 :]]
    givens = [*solution[:number], sudoku.BLANK * sudoku.SIDE, *solution[number + 1 :]]
    console.print(grid.solved(spoilt, givens, solution))
    mended = edit(
        opened.model,
        opened.tokenizer,
        "\n".join(spoilt),
        "make it valid",
        (number + 1, number + 1),
        lengths=[sudoku.SIDE],
        prompt=f"{sudoku.BARE_PROMPT}\n" + "\n".join(givens),
        seed=seed,
    )
    print(f"Row {number + 1} was {wrong}.")
    right = _judge(console, mended.text, givens, solution)
    print(_passes(mended.passes))
    return right


def _fill(opened: Opened, console: Console, rng: np.random.Generator, seed: int) -> bool:
    """Have a template filled from a list of made-up words. Returns whether every slot is right."""
    from rich.text import Text

    from mlx_diffgemma.cli.display import printable
    from mlx_diffgemma.editing.fill import fill

    words = {name: _word(rng) for name in ("thing", "town")}
    listed = "\n".join(f"{name}: {word}" for name, word in zip("ab", words.values(), strict=True))
    print(f"{_TEMPLATE}\n{listed}")
    filled = fill(
        opened.model,
        opened.tokenizer,
        _TEMPLATE,
        prompt=f"fill\nyour {{a}} waits in {{b}}.\n{listed}",
        seed=seed,
    )
    console.print(Text(printable(filled.text), "bold"))
    wrong = [name for name, word in words.items() if filled.slots[name] != word]
    if wrong:
        verb = "differs" if len(wrong) == 1 else "differ"
        print(f"Wrong: {' and '.join(wrong)} {verb} from the list.")
    else:
        print("Right: each slot holds its word of the list.")
    print(_passes(filled.passes))
    return not wrong


def _judge(console: Console, text: str, givens: list[str], solution: list[str]) -> bool:
    """Show an answer with its mistakes marked, and say how many there are. Returns whether it is
    right."""
    from mlx_diffgemma.cli import display, grid

    answer = text.split("\n")
    if not grid.is_grid(answer):
        print(f"{display.printable(text)}\nWrong: that is not the shape of the answer.")
        return False
    console.print(grid.solved(answer, givens, solution))
    wrong = grid.mistakes(answer, solution)
    print(f"Wrong in {wrong} of 36 cells." if wrong else "Right: every cell is as in the solution.")
    return not wrong


def _word(rng: np.random.Generator) -> str:
    """Two syllables that mean nothing."""
    return "".join(
        _CONSONANTS[rng.integers(len(_CONSONANTS))] + _VOWELS[rng.integers(len(_VOWELS))]
        for _ in range(2)
    )


def _passes(count: int) -> str:
    return f"{count} forward pass{'' if count == 1 else 'es'}"

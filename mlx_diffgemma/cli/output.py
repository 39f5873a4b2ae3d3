"""What becomes of an answer while it is written: it is drawn, streamed, or kept for the end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.text import Text

from mlx_diffgemma.cli.display import (
    SHORTEST_FRAME,
    CanvasDisplay,
    CanvasView,
    Frames,
    Pieces,
    Thoughts,
    printable,
)
from mlx_diffgemma.cli.keys import Guard
from mlx_diffgemma.cli.outcome import Outcome

if TYPE_CHECKING:
    from mlx_diffgemma.generation_response import GenerationResponse

_PIPE_WIDTH = 110  # columns

OnPrefill = Callable[[int, int], None]
Start = Callable[[OnPrefill], Iterable[Any]]
"""Begins a generation that reports its prefill to the given function."""


def thoughts(show: bool, hide: bool) -> Thoughts:
    """What becomes of thoughts by the options of the command line."""
    return Thoughts.HIDDEN if hide else Thoughts.SHOWN if show else Thoughts.FOLDED


def can_draw(watch: bool) -> bool:
    """Whether to draw the canvas: it is wanted, and stdout is a terminal that can."""
    return watch and sys.stdout.isatty() and not terminal().is_dumb_terminal


def terminal() -> Console:
    """The terminal at stdout. It shows text as it is: it reads no markup and no emoji names, and
    adds no colours."""
    return Console(markup=False, emoji=False, highlight=False)


def draw(start: Start, pieces: Pieces, outcome: Outcome, keep: Thoughts = Thoughts.FOLDED) -> None:
    """Draw the canvas as it forms, then write the committed text plainly in its place, also where
    the run is interrupted."""
    try:
        animate(start, CanvasDisplay(terminal(), CanvasView(pieces, thoughts=keep)), outcome)
    finally:
        note_thought(outcome.thought, keep)
        write_line(printable(outcome.text))


def animate(start: Start, display: CanvasDisplay, outcome: Outcome) -> None:
    """Draw the canvas as it forms, and erase it at the end."""
    with display:
        for response in start(display.prefill):
            outcome.add(response)
            display.show(response)


def stream(start: Start, outcome: Outcome, keep: Thoughts = Thoughts.FOLDED) -> None:
    """Write text to stdout as it is committed, and thoughts to stderr once they are over; progress
    goes to stderr if that is a terminal."""
    show = printable if sys.stdout.isatty() else str
    noted = 0  # characters of thought

    def note_new_thought(console: Console | None = None) -> None:
        nonlocal noted
        note_thought(outcome.thought[noted:].lstrip("\n"), keep, console)
        noted = len(outcome.thought)

    try:
        with _Progress() as progress:
            for response in start(progress.prefill):
                outcome.add(response)
                if response.text or response.finish_reason:
                    note_new_thought(progress.console)
                if response.text:
                    print(show(response.text), end="", flush=True)
                progress.show(response)
    finally:
        note_new_thought()
        if outcome.text and not outcome.text.endswith("\n"):
            print(flush=True)


def collect(start: Start, outcome: Outcome) -> None:
    """Run a generation to its end and write nothing to stdout; progress goes to stderr if that is a
    terminal."""
    with _Progress() as progress:
        for response in start(progress.prefill):
            outcome.add(response)
            progress.show(response)


def write_line(text: str) -> None:
    """Write an answer to stdout, ended by a newline; an empty answer writes nothing."""
    if text:
        print(text, end="" if text.endswith("\n") else "\n", flush=True)


def print_table(table: RenderableType) -> None:
    """Write tables to stdout, as wide as the terminal, or 110 columns wide into a pipe, which has
    no width of its own."""
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else _PIPE_WIDTH
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)


def note(text: str) -> None:
    """Write a text to stderr, dim where that is a terminal."""
    if sys.stderr.isatty():
        _stderr().print(Text(text, "dim"), soft_wrap=True)
    else:
        print(text, file=sys.stderr)


def note_thought(thought: str, keep: Thoughts, console: Console | None = None) -> None:
    """Write what was thought to stderr: dim on a terminal, and in one line there if it is to be
    folded. `console` is the console of a frame that is being drawn on stderr, or None."""
    if not thought or keep is Thoughts.HIDDEN:
        return
    if not sys.stderr.isatty():
        print(thought, file=sys.stderr, flush=True)
        return
    console = console or _stderr()
    text = Text(f"thought: {printable(thought)}", "dim")
    if keep is Thoughts.FOLDED:
        text = Text(" ".join(text.plain.split()), "dim")
        text.truncate(console.width - 1, overflow="ellipsis")
    console.print(text, soft_wrap=True)


def _stderr() -> Console:
    return Console(stderr=True, markup=False, emoji=False, highlight=False)


class _Progress:
    """One line on stderr that says how far a run is. It is shown where stderr is a terminal and
    stdout is not; typed keys stay off the screen in any case."""

    def __init__(self) -> None:
        console = _stderr()
        wanted = sys.stderr.isatty() and not sys.stdout.isatty() and not console.is_dumb_terminal
        self._frames = Frames(console, Text()) if wanted else None
        self.console = console if wanted else None
        self._open: Frames | Guard = self._frames or Guard()
        self._drawn = 0.0

    def __enter__(self) -> _Progress:
        self._open.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.__exit__(*error)

    def prefill(self, done: int, total: int) -> None:
        self._say(f"reading the prompt {done}/{total} tokens")

    def show(self, response: GenerationResponse) -> None:
        if response.canvas:
            self._say(
                f"canvas {response.canvas_index + 1} · step {response.step} · "
                f"{response.generation_tokens} tokens committed"
            )

    def _say(self, text: str) -> None:
        now = time.monotonic()
        if self._frames is not None and now - self._drawn >= SHORTEST_FRAME:
            self._frames.show(Text(text, "dim", no_wrap=True))
            self._drawn = now

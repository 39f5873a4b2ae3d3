"""Where the answer goes while it is written: drawn, streamed, or kept for the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mlx_diffgemma.cli.display import CanvasDisplay, CanvasView, Pieces, printable
from mlx_diffgemma.cli.session import Outcome

if TYPE_CHECKING:
    from mlx_diffgemma.generation import GenerationResponse

OnPrefill = Callable[[int, int], None]
Start = Callable[[OnPrefill], Iterable[Any]]
"""Begins a generation that reports its prefill to the given function."""


class Thoughts(Enum):
    """What becomes of what the model thinks."""

    FOLDED = auto()
    SHOWN = auto()
    HIDDEN = auto()


def thoughts(show: bool, hide: bool) -> Thoughts:
    """What becomes of thoughts by the options of the command line."""
    return Thoughts.HIDDEN if hide else Thoughts.SHOWN if show else Thoughts.FOLDED


def can_draw(watch: bool) -> bool:
    """Whether to draw the canvas: it is wanted, and stdout is a terminal that can."""
    return watch and sys.stdout.isatty() and not terminal().is_dumb_terminal


def terminal() -> Console:
    """The terminal at stdout. Text is shown as it is: no markup, no emoji names, no colours of
    the console's own."""
    return Console(markup=False, emoji=False, highlight=False)


def draw(start: Start, pieces: Pieces, outcome: Outcome, keep: Thoughts = Thoughts.FOLDED) -> None:
    """Draw the canvas as it forms, then leave what was committed standing plainly; so too when
    the run is interrupted."""
    try:
        animate(start, CanvasDisplay(terminal(), CanvasView(pieces)), outcome)
    finally:
        note_thought(outcome.thought, keep)
        write_line(printable(outcome.text))


def animate(start: Start, display: CanvasDisplay, outcome: Outcome) -> None:
    """Draw the canvas as it forms, and leave nothing of it."""
    with display:
        for response in start(display.prefill):
            outcome.add(response)
            display.show(response)


def stream(start: Start, outcome: Outcome, keep: Thoughts = Thoughts.FOLDED) -> None:
    """Write text to stdout as it is committed, and thoughts to stderr once they are over; progress
    goes to stderr if that is a terminal."""
    show = printable if sys.stdout.isatty() else str
    noted = 0  # characters of thought

    def note_new_thought() -> None:
        nonlocal noted
        note_thought(outcome.thought[noted:].lstrip("\n"), keep)
        noted = len(outcome.thought)

    try:
        with _Progress() as progress:
            for response in start(progress.prefill):
                outcome.add(response)
                if response.text or response.finish_reason:
                    note_new_thought()
                if response.text:
                    print(show(response.text), end="", flush=True)
                progress.show(response)
    finally:
        note_new_thought()
        if outcome.text and not outcome.text.endswith("\n"):
            print(flush=True)


def collect(start: Start, outcome: Outcome) -> None:
    """Write nothing to stdout."""
    with _Progress() as progress:
        for response in start(progress.prefill):
            outcome.add(response)
            progress.show(response)


def write_line(text: str) -> None:
    """Write an answer to stdout with one newline at its end; nothing for no answer."""
    if text:
        print(text, end="" if text.endswith("\n") else "\n", flush=True)


def note(text: str) -> None:
    """Say something beside the answer, on stderr; dim, where that is a terminal."""
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    if sys.stderr.isatty():
        console.print(Text(text, "dim"), soft_wrap=True)
    else:
        print(text, file=sys.stderr)


def note_thought(thought: str, keep: Thoughts) -> None:
    """Write what was thought to stderr: dim on a terminal, and in one line there if it is to be
    folded."""
    if not thought or keep is Thoughts.HIDDEN:
        return
    if not sys.stderr.isatty():
        print(thought, file=sys.stderr, flush=True)
        return
    text = Text(f"thought: {printable(thought)}", "dim")
    if keep is Thoughts.FOLDED:
        text = Text(" ".join(text.plain.split()), "dim")
        text.truncate(Console(stderr=True).width - 1, overflow="ellipsis")
    Console(stderr=True, markup=False, emoji=False, highlight=False).print(text, soft_wrap=True)


class _Progress:
    """One line on stderr that says how far a run is, where the answer goes elsewhere than to the
    same terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        wanted = sys.stderr.isatty() and not sys.stdout.isatty() and not console.is_dumb_terminal
        self._live = (
            Live(
                console=console,
                transient=True,
                refresh_per_second=10,
                redirect_stdout=False,
                redirect_stderr=True,
            )
            if wanted
            else None
        )

    def __enter__(self) -> _Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def prefill(self, done: int, total: int) -> None:
        self._say(f"reading the prompt {done}/{total} tokens")

    def show(self, response: GenerationResponse) -> None:
        if response.canvas:
            self._say(
                f"canvas {response.canvas_index + 1} · step {response.step} · "
                f"{response.generation_tokens} tokens committed"
            )

    def _say(self, text: str) -> None:
        if self._live is not None:
            self._live.update(Text(text, "dim", no_wrap=True))

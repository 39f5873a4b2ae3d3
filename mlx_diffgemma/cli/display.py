"""Draws the canvas as it forms: committed text plain, the draft tinted by how sure the model is."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from mlx_diffgemma.cli.keys import Guard

if TYPE_CHECKING:
    from mlx_diffgemma.generation_response import GenerationResponse

Pieces = Callable[["GenerationResponse"], list[tuple[str, str]]]
"""Gives a response's draft in pieces, each a pair of what it is part of ("text", "thought" or
"call") and its text. The first piece is what earlier canvases have left undecided; the others are
the tokens of the canvas."""


class Thoughts(Enum):
    """What becomes of the model's thoughts: one line of each, all of them, or none."""

    FOLDED = auto()
    SHOWN = auto()
    HIDDEN = auto()


LEVELS = (
    (0.05, "", "settled"),
    (0.35, "yellow", "likely"),
    (1.0, "dark_orange3", "one of a few"),
    (2.0, "red", "one of several"),
    (float("inf"), "dim red", "a guess"),
)
"""How a draft token is tinted: (bound below which its entropy in nats lies, style, meaning).
exp(-entropy) is about the probability of the best token, so the bounds lie near 0.95, 0.7, 0.37 and
0.14."""

SHORTEST_FRAME = 1 / 20  # seconds; steps that come faster are not all drawn


def tint(entropy: float) -> str:
    """The rich style of a draft token with this entropy in nats."""
    return next(style for bound, style, _ in LEVELS if entropy < bound or bound == float("inf"))


def legend() -> Text:
    """The meanings of all tints, each in its own style."""
    text = Text()
    for _, style, meaning in LEVELS:
        text.append(" · " if text else "", "dim").append(meaning, style)
    return text


def printable(text: str) -> str:
    """The text with control characters as visible pictures, so that a terminal obeys none.

    Newlines and tabs stay.
    """
    return text.translate(_PICTURES)


_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")
_PICTURES |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


def draft_text(committed: str, pieces: Sequence[tuple[str, str]], entropy: Sequence[float]) -> Text:
    """Committed text plain, then each piece of the draft in its tint, calls of tools dim; thoughts
    are left out."""
    text = Text(printable(committed))
    for (kind, piece), nats in zip(pieces, (0.0, *entropy), strict=True):
        if kind != "thought":
            text.append(printable(piece), "dim" if kind == "call" else tint(nats))
    return text


def tail(text: Text, console: Console, width: int, height: int) -> list[Text]:
    """The last `height` rows of the text when it is wrapped to `width` columns."""
    rows: list[Text] = []
    if not text.plain:
        return rows
    for line in reversed(text.split("\n", allow_blank=True)):
        rows[:0] = line.wrap(console, width, overflow="fold") or [Text()]
        if len(rows) >= height:
            break
    return rows[max(0, len(rows) - height) :]


class CanvasView:
    """A drawing of a generation: the end of its text, as much as the terminal holds, and a status
    line.

    Args:
        pieces: gives the text of each token of a draft.
        frame: changes the text before it is drawn, such as by lines around it.
        thoughts: whether thoughts are drawn whole, in one line, or not at all.

    Attributes:
        committed: the text of the canvases that are done.
        thought: the thoughts on the canvases that are done.
        response: the step that is drawn, or None while the prompt is read.
        prefill: (done, total) prompt tokens encoded.
    """

    def __init__(
        self,
        pieces: Pieces,
        *,
        frame: Callable[[Text], Text] | None = None,
        thoughts: Thoughts = Thoughts.FOLDED,
    ) -> None:
        self.committed = ""
        self.thought = ""
        self.response: GenerationResponse | None = None
        self.prefill = (0, 0)
        self._pieces = pieces
        self._frame = frame
        self._thoughts = thoughts
        self._rows = 0

    def add(self, response: GenerationResponse) -> None:
        """Take in the next response."""
        self.committed += response.text
        self.thought += response.thought
        if not response.canvas:
            self._rows = 0
        self.response = response

    def text(self, height: int | None = None) -> Text:
        """The committed text and the tinted draft; where `height` is given, only the last rows that
        may be seen."""
        committed = self.committed
        if height is not None and self._frame is None:
            committed = "\n".join(committed.rsplit("\n", height)[-height:])
        response = self.response
        if response is None:
            return Text(printable(committed))
        pieces = self._pieces(response)
        text = draft_text(committed, pieces, response.entropy)
        if self._frame is not None:
            return self._frame(text)
        thought = self.thought + "".join(piece for kind, piece in pieces if kind == "thought")
        if thought.strip() and self._thoughts is not Thoughts.HIDDEN:
            thought = thought.strip()
            if self._thoughts is Thoughts.FOLDED:
                thought = thought.rpartition("\n")[2]
            text = Text(f"thought: {printable(thought)}\n", "dim").append_text(text)
        return text

    def status(self) -> Text:
        """One line that says how far the generation is."""
        response = self.response
        if response is None:
            done, total = self.prefill
            progress = f" {done}/{total} tokens" if total else ""
            return Text(f"reading the prompt{progress}", "dim")
        parts = [f"canvas {response.canvas_index + 1}"]
        if response.canvas:
            parts.append(f"step {response.step}")
            if any(response.entropy):  # servers do not say it
                mean = sum(response.entropy) / len(response.entropy)
                parts.append(f"mean entropy {mean:.3f}")
        parts.append(f"{response.generation_tokens} tokens committed")
        return Text(" · ".join(parts), "dim")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = max(1, console.size.height - 2)  # the status line, and one for the cursor
        rows = tail(self.text(height), console, options.max_width, height)
        # A canvas keeps the height it once had: newlines come and go, and nothing should jump.
        self._rows = max(len(rows), min(self._rows, height))
        yield from rows
        yield from _blank(self._rows - len(rows))
        status = self.status()
        status.truncate(options.max_width)
        yield status


class Frames(Live):
    """A part of the terminal that is drawn again and again, in the main thread. It leaves nothing
    behind: neither when it is closed, nor when the window becomes narrower, nor when the program is
    stopped or ended."""

    def __init__(self, console: Console, shown: RenderableType) -> None:
        self._shown = _Measured(shown)
        super().__init__(
            self._shown,
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=sys.stderr.isatty(),  # warnings go above the frame, not into it
        )
        self._guard = Guard(self.stop, self._start_again)
        self._open = False
        self._width = 0

    def __enter__(self) -> Frames:
        self._guard.__enter__()
        self._open = True
        self.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        try:
            with self._guard.undisturbed():
                self.stop()
        finally:
            self._guard.__exit__()

    def show(self, shown: RenderableType) -> None:
        """Draw something else from now on."""
        self._shown.content = shown
        self.refresh()

    def refresh(self) -> None:
        """Draw the next frame in the place of the one before."""
        with self._guard.undisturbed():
            width = self.console.size.width
            if self._live_render.last_render_height and width != self._width and _rewraps():
                rows = sum(max(1, -(-cells // width)) for cells in self._shown.widths)
                self._live_render._shape = (width, rows)
            self._width = width
            super().refresh()

    def _start_again(self) -> None:
        if self._open:
            self._live_render._shape = None  # what was drawn has gone
            self.vertical_overflow = "ellipsis"
            self.start(refresh=True)


class _Measured:
    """Passes on what is drawn, and keeps how many columns each of its lines takes."""

    def __init__(self, content: RenderableType) -> None:
        self.content = content
        self.widths: list[int] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.content, options, pad=False)
        self.widths = [Segment.get_line_length(line) for line in lines]
        for line in lines:
            yield from line
            yield Segment.line()


_REWRAPPING = (
    "TERM_PROGRAM", "VTE_VERSION", "KITTY_WINDOW_ID", "ALACRITTY_WINDOW_ID", "KONSOLE_VERSION",
    "WT_SESSION", "TMUX",
)  # fmt: skip


def _rewraps() -> bool:
    """Whether this terminal is known to wrap lines anew that have become too long for it. Others,
    such as xterm, cut them."""
    return any(name in os.environ for name in _REWRAPPING)


class CanvasDisplay:
    """Redraws the canvas in place while it is open; closing it leaves nothing behind.

    Args:
        console: where to draw, a terminal.
        view: what to draw.
        seconds_per_step: least time that a step stays, for people to follow.
    """

    def __init__(
        self, console: Console, view: CanvasView, *, seconds_per_step: float = 0.0
    ) -> None:
        self.view = view
        self._pause = seconds_per_step
        self._drawn = 0.0
        self._frames = Frames(console, view)

    def __enter__(self) -> CanvasDisplay:
        self._frames.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._frames.__exit__(*error)

    def prefill(self, done: int, total: int) -> None:
        """Show how much of the prompt has been read."""
        self.view.prefill = (done, total)
        self._draw()

    def show(self, response: GenerationResponse) -> None:
        """Draw the next response."""
        self.view.add(response)
        self._draw(always=not response.canvas or self._pause > 0)
        if self._pause and response.canvas:
            time.sleep(self._pause)

    def _draw(self, *, always: bool = False) -> None:
        now = time.monotonic()
        if always or now - self._drawn >= SHORTEST_FRAME:
            self._frames.refresh()
            self._drawn = now


def _blank(rows: int) -> Iterator[Text]:
    for _ in range(rows):
        yield Text()

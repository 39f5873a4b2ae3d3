"""What the commands that work on a canvas have in common: settings, drawing, results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from mlx_diffgemma.cli import streams
from mlx_diffgemma.cli.command import Only, Without
from mlx_diffgemma.cli.settings import Asking, Denoising, Showing
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.settings import Setting

if TYPE_CHECKING:
    from mlx_diffgemma.cli.opening import Opened
    from mlx_diffgemma.diffusion.events import DenoisingStep
    from mlx_diffgemma.editing.gaps import Filled

PANEL = "Text"

Lengths = Annotated[
    tuple[str, ...],
    Setting(
        "Numbers of tokens that a gap may take, such as 4 or 2,4,8; the model chooses among "
        "several.",
        panel=PANEL,
    ),
]
Instead = Annotated[
    str | None,
    Setting(
        "Text that tells the model what to do, in place of the command's own words; \\n stands for "
        "a new line and \\t for a tab.",
        ("--prompt", "-p"),
        panel="Prompt",
    ),
]
# The length of an answer follows from its gap in these commands, so none takes --max-tokens.
Prompting = Annotated[Asking, Only("system_prompt", "raw")]
Denoised = Annotated[Denoising, Without("max_tokens", "shrink_canvas")]
Shown = Annotated[Showing, Only("watch", "json")]


@contextmanager
def drawn(opened: Opened, showing: Showing) -> Iterator[Callable[[DenoisingStep], None] | None]:
    """Gives a function that draws a denoising step on the terminal, or None where nothing is to be
    drawn."""
    from mlx_diffgemma.cli import output

    if showing.json or not output.can_draw(showing.watch):
        yield None
        return
    from mlx_diffgemma.cli.display import CanvasDisplay, CanvasView
    from mlx_diffgemma.cli.outcome import pieces_of
    from mlx_diffgemma.generation_response import GenerationResponse

    with CanvasDisplay(output.terminal(), CanvasView(pieces_of(opened.tokenizer))) as display:

        def show(step: DenoisingStep) -> None:
            canvas = step.canvas
            assert canvas.draft is not None and canvas.entropy is not None
            display.show(
                GenerationResponse(
                    text="",
                    token=None,
                    prompt_tokens=0,
                    prompt_tps=0.0,
                    generation_tokens=0,
                    generation_tps=0.0,
                    peak_memory=0.0,
                    canvas=canvas.draft.tolist(),
                    entropy=canvas.entropy.tolist(),
                    step=canvas.passes,
                    canvas_index=canvas.index,
                )
            )

        yield show


def read_lengths(given: Sequence[str]) -> list[tuple[int, ...]]:
    """The numbers behind every `--lengths`.

    Raises:
        UsageError: one is no list of numbers from 1.
    """
    found = []
    for text in given:
        parts = text.split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise UsageError(f"--lengths '{text}' must be numbers from 1, such as 4 or 2,4,8.")
        found.append(tuple(int(part) for part in parts))
    return found


def read_input(text: str | None, file: str | None, option: str) -> str:
    """A text from an option, from a file, or from stdin.

    Raises:
        UsageError: there is no text, it is not UTF-8, or both an option and a file were given.
        DiffGemmaError: the file cannot be read.
    """
    from mlx_diffgemma.cli.inputs import is_text

    if text is not None and file is not None:
        raise UsageError(f"give --{option} or a file, not both.")
    if file is not None:
        from mlx_diffgemma.editing import files

        return files.read_text(file)
    if text is None:
        if sys.stdin.isatty():
            raise UsageError(f"no text: give one with --{option}, name a file, or pipe it in.")
        text = _read_stdin()
    if not is_text(text):
        raise UsageError("the text is not UTF-8: re-encode it.")
    return text


def _read_stdin() -> str:
    """All of stdin with its line ends, which the text layer would translate."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise UsageError("the text is not UTF-8: re-encode it.") from None


def write_exactly(text: str) -> None:
    """Write a text to stdout as it is. On a terminal, control characters become visible, and the
    text ends with a newline."""
    if sys.stdout.isatty():
        from mlx_diffgemma.cli import output
        from mlx_diffgemma.cli.display import printable

        output.write_line(printable(text))
    else:
        print(text, end="", flush=True)


def write_json(**fields: Any) -> None:
    """Write one JSON object on one line."""
    print(streams.as_line(fields), flush=True)


def filled_as_json(filled: Filled) -> dict[str, Any]:
    """A filled gap as a JSON object; entropies are in nats."""
    return {
        "text": filled.text,
        "tokens": list(filled.tokens),
        "entropy": list(filled.entropy),
        "denoising_steps": filled.steps,
        "converged": filled.converged,
        "length_scores": {str(length): score for length, score in filled.scores.items()},
    }


def note_effort(passes: int, seed: int, *, converged: bool = True, cut: int = 0) -> None:
    """Say on stderr how many passes it took, by which seed, whether every canvas settled, and how
    many tokens behind the text were cut off."""
    from mlx_diffgemma.cli import output
    from mlx_diffgemma.cli.summaries import UNSETTLED

    if cut:
        output.note(
            f"the last {cut} {'token' if cut == 1 else 'tokens'} of the text behind did not fit in "
            "the canvas: the model did not see them."
        )
    if not converged:
        output.note(UNSETTLED)
    output.note(f"{passes} forward {'pass' if passes == 1 else 'passes'}, seed {seed}")

"""What the commands that work on a canvas have in common: settings, drawing, results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_diffgemma.cli import options, streams
from mlx_diffgemma.errors import UsageError

if TYPE_CHECKING:
    from mlx_diffgemma.cli.session import Opened
    from mlx_diffgemma.diffusion.events import DenoisingStep
    from mlx_diffgemma.editing.gaps import Filled

PANEL = "Text"

Lengths = Annotated[
    list[str] | None,
    typer.Option(
        "--lengths",
        help="How many tokens it may take, such as 4 or 2,4,8; the model chooses among several.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
Instead = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "-p",
        help="What to tell the model, in place of the command's own words.",
        show_default=False,
        rich_help_panel="Prompt",
    ),
]


@dataclass(frozen=True)
class Request:
    """What a command was asked for: keyword arguments of `load` and of the function it calls."""

    model: str | None
    loading: dict[str, Any]
    settings: dict[str, Any]
    watch: bool
    json: bool


def request(
    *,
    model: str | None,
    revision: str | None,
    adapter_path: str | None,
    trust_remote_code: bool,
    chat_template: str | None,
    system_prompt: str | None,
    raw: bool,
    watch: bool,
    as_json: bool,
    seed: int | None = None,
    **denoising: Any,
) -> Request:
    """The options that these commands share, checked before a model is loaded.

    Raises:
        UsageError: one of them is out of range, or contradicts another.
    """
    if raw and system_prompt is not None:
        raise UsageError("--system-prompt needs a chat template, and --raw uses none: drop one.")
    settings = options.generation_settings(seed=seed, prefill_step_size=None, **denoising)
    loading = {
        "revision": revision,
        "adapter_path": adapter_path,
        "trust_remote_code": trust_remote_code,
        "chat_template": chat_template,
    }
    settings |= {"system_prompt": system_prompt, "raw": raw}
    return Request(model, loading, settings, watch, as_json)


@contextmanager
def drawn(opened: Opened, request: Request) -> Iterator[Callable[[DenoisingStep], None] | None]:
    """What draws every denoising step on the terminal, or None where nothing is to be drawn."""
    from mlx_diffgemma.cli import output

    if request.json or not output.can_draw(request.watch):
        yield None
        return
    from mlx_diffgemma.cli.display import CanvasDisplay, CanvasView
    from mlx_diffgemma.cli.session import pieces_of
    from mlx_diffgemma.generation import GenerationResponse

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


def read_lengths(given: list[str] | None) -> list[tuple[int, ...]]:
    """The numbers behind every `--lengths`.

    Raises:
        UsageError: one is no list of numbers from 1.
    """
    found = []
    for text in given or []:
        parts = text.split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise UsageError(f"--lengths '{text}' must be numbers from 1, such as 4 or 2,4,8.")
        found.append(tuple(int(part) for part in parts))
    return found


def read_input(text: str | None, file: str | None, option: str) -> str:
    """A text from an option, from a file, or from stdin.

    Raises:
        UsageError: there is none, or both were given.
        DiffGemmaError: the file cannot be read.
    """
    from mlx_diffgemma.cli.session import is_text

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
    """Write a text to stdout as it is; on a terminal, without what would steer it, on lines of its
    own."""
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
    """What became of a gap, for machines; entropies in nats."""
    return {
        "text": filled.text,
        "tokens": list(filled.tokens),
        "entropy": list(filled.entropy),
        "denoising_steps": filled.steps,
        "length_scores": {str(length): score for length, score in filled.scores.items()},
    }


def note_effort(passes: int, seed: int, cut: int = 0) -> None:
    """Say on stderr what it took, and what the model did not see."""
    from mlx_diffgemma.cli import output

    if cut:
        output.note(
            f"the last {cut} {'token' if cut == 1 else 'tokens'} of the text behind did not fit in "
            "the canvas: the model did not see them."
        )
    output.note(f"{passes} forward {'pass' if passes == 1 else 'passes'}, seed {seed}")

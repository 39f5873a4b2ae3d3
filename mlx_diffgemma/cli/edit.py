"""`mlx-diffgemma edit`: rewrite some lines of a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mlx_diffgemma.cli import editing
from mlx_diffgemma.cli.command import command
from mlx_diffgemma.cli.inputs import spelled_out
from mlx_diffgemma.cli.settings import Loading, Reaching
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.settings import Setting


@command(
    "mlx-diffgemma edit app.py --range 10:20 --instruction 'handle an empty list'",
    "mlx-diffgemma edit app.py --range 7 -i 'name the constant' --write",
    "mlx-diffgemma edit app.py --range 7 -i 'say it shorter' --strength 0.5 --seed 7",
)
def edit(
    *,
    file: Annotated[str, typer.Argument(help="File to edit.")],
    lines: Annotated[
        str,
        Setting("Lines to rewrite, from 1, such as 10:20 or 7.", ("--range",), panel=editing.PANEL),
    ],
    instruction: Annotated[
        str,
        Setting(
            "Instruction that the model follows.", ("--instruction", "-i"), panel=editing.PANEL
        ),
    ],
    write: Annotated[
        bool, Setting("Change of the file itself, besides the diff on stdout.", panel=editing.PANEL)
    ] = False,
    force: Annotated[
        bool, Setting("Permission to write to a read-only file.", panel=editing.PANEL)
    ] = False,
    strength: Annotated[
        float,
        Setting(
            "Distance from the present lines at the start: 1 begins with noise alone, a"
            " smaller number with the lines partly noised.",
            panel=editing.PANEL,
        ),
    ] = 1.0,
    lengths: editing.Lengths = (),
    prompt: editing.Instead = None,
    prompting: editing.Prompting,
    loading: Loading,
    reaching: Reaching,
    denoising: editing.Denoised,
    showing: editing.Shown,
) -> None:
    """Rewrite some lines of a file and print the change as a unified diff."""
    span = _range(lines)
    if force and not write:
        raise UsageError("--force is for --write: give both, or neither.")
    candidates = editing.read_lengths(lengths)
    prompt = spelled_out(prompt)
    from mlx_diffgemma.cli import output, remote
    from mlx_diffgemma.editing.files import (
        FileError,
        check_writable,
        read_text,
        replace_text,
        unified_diff,
    )

    text = read_text(file)
    if write and not force:
        check_writable(file)
    together = sorted({n for each in candidates for n in each}) or None
    server = remote.find(reaching, loading, {"--raw": prompting.raw})
    if server is not None:
        done = server.edit(
            "/v1/edit",
            denoising,
            prompting,
            prompt,
            together,
            text=text,
            instruction=instruction,
            lines=list(span),
            strength=strength,
        )
        name = server.name
    else:
        from mlx_diffgemma.cli import opening
        from mlx_diffgemma.editing import edit as room

        room.around_lines(text, span)
        opened = opening.open_model(loading)
        name = opened.name
        with editing.drawn(opened, showing) as on_step:
            done = room.edit(
                opened.model,
                opened.tokenizer,
                text,
                instruction,
                span,
                strength=strength,
                lengths=together,
                prompt=prompt,
                seed=denoising.seed,
                prompt_settings=prompting.prompt_settings(),
                config=denoising.config(opened.model),
                on_step=on_step,
            )
    if write:
        if read_text(file) != text:
            raise FileError(
                f"{file} changed meanwhile, so it was left alone; run the command again."
            )
        for loss in replace_text(file, done.text, force=force):
            output.note(loss)
    diff = unified_diff(text, done.text, Path(file).name)
    if showing.json:
        editing.write_json(
            diff=diff,
            text=done.text,
            written=write,
            filled=editing.filled_as_json(done.filled),
            cut=done.cut,
            passes=done.passes,
            converged=done.converged,
            seed=done.seed,
            model=name,
        )
        return
    _print_diff(diff)
    if not diff:
        output.note("nothing changed")
    elif not write:
        output.note("not written; --write changes the file")
    editing.note_effort(done.passes, done.seed, converged=done.converged, cut=done.cut)


def _range(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not first.isdecimal() or (colon and not last.isdecimal()):
        raise UsageError(f"--range '{text}' must be lines such as 10:20 or 7.")
    return int(first), int(last or first)


def _print_diff(diff: str) -> None:
    if not sys.stdout.isatty():
        print(diff, end="", flush=True)
        return
    from rich.text import Text

    from mlx_diffgemma.cli import output
    from mlx_diffgemma.cli.display import printable

    styles = {"+": "green", "-": "red", "@": "cyan"}
    console = output.terminal()
    for number, line in enumerate(diff.splitlines()):
        style = "bold" if number < 2 else styles.get(line[:1], "")
        console.print(Text(printable(line), style), soft_wrap=True)

"""`mlx-diffgemma edit`: rewrite some lines of a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_diffgemma.cli import editing, errors, options
from mlx_diffgemma.errors import UsageError


def edit(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(help="The file.")],
    lines: Annotated[
        str,
        typer.Option(
            "--range",
            help="The lines to rewrite, from 1, such as 10:20 or 7.",
            rich_help_panel=editing.PANEL,
        ),
    ],
    instruction: Annotated[
        str,
        typer.Option("--instruction", "-i", help="What to do.", rich_help_panel=editing.PANEL),
    ],
    write: Annotated[
        bool,
        typer.Option(
            "--write", help="Change the file, at one stroke.", rich_help_panel=editing.PANEL
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Permission to write to a read-only file.",
            rich_help_panel=editing.PANEL,
        ),
    ] = False,
    strength: Annotated[
        float,
        typer.Option(
            "--strength",
            help="How far from the present lines to start: 1 from noise, below from them partly "
            "noised.",
            rich_help_panel=editing.PANEL,
        ),
    ] = 1.0,
    lengths: editing.Lengths = None,
    prompt: editing.Instead = None,
    system_prompt: options.SystemPrompt = None,
    chat_template: options.ChatTemplate = None,
    raw: options.Raw = False,
    model: options.Model = None,
    revision: options.Revision = None,
    adapter_path: options.AdapterPath = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = None,
    canvas_length: options.CanvasLength = None,
    steps: options.Steps = None,
    t_min: options.TMin = None,
    t_max: options.TMax = None,
    profile: options.Profile = None,
    sampler: options.Sampler = None,
    entropy_bound: options.EntropyBound = None,
    watch: options.Watch = True,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Rewrite some lines of a file and print the change as a unified diff.

    Example: mlx-diffgemma edit app.py --range 10:20 --instruction 'handle an empty list' --write
    """

    def body() -> None:
        span = _range(lines)
        if force and not write:
            raise UsageError("--force is for --write: give both, or neither.")
        candidates = editing.read_lengths(lengths)
        request = editing.request(
            model=model,
            revision=revision,
            adapter_path=adapter_path,
            trust_remote_code=trust_remote_code,
            chat_template=chat_template,
            system_prompt=system_prompt,
            raw=raw,
            seed=seed,
            canvas_length=canvas_length,
            max_denoising_steps=steps,
            t_min=t_min,
            t_max=t_max,
            profile=profile,
            sampler=sampler,
            entropy_bound=entropy_bound,
            watch=watch,
            as_json=json,
        )
        arguments: dict[str, Any] = {"strength": strength, "prompt": prompt}
        if candidates:
            arguments["lengths"] = sorted({n for each in candidates for n in each})
        _edit(request, file, instruction, span, arguments, write=write, force=force)

    errors.run(body, debug=errors.debugging(ctx))


def _range(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not first.isdecimal() or (colon and not last.isdecimal()):
        raise UsageError(f"--range '{text}' must be lines such as 10:20 or 7.")
    return int(first), int(last or first)


def _edit(
    request: editing.Request,
    file: str,
    instruction: str,
    lines: tuple[int, int],
    arguments: dict[str, Any],
    *,
    write: bool,
    force: bool,
) -> None:
    from mlx_diffgemma.cli import output, session
    from mlx_diffgemma.editing.edit import around_lines, edit
    from mlx_diffgemma.editing.files import FileError, check_writable, read_text, replace_text

    text = read_text(file)
    around_lines(text, lines)
    if write and not force:
        check_writable(file)
    opened = session.open_model(request.model, **request.loading)
    with editing.drawn(opened, request) as on_step:
        done = edit(
            opened.model,
            opened.tokenizer,
            text,
            instruction,
            lines,
            on_step=on_step,
            **arguments,
            **request.settings,
        )
    if write:
        if read_text(file) != text:
            raise FileError(f"{file} changed meanwhile; it was left alone. Run again.")
        for loss in replace_text(file, done.text, force=force):
            output.note(loss)
    diff = done.diff(Path(file).name)
    if request.json:
        editing.write_json(
            diff=diff,
            text=done.text,
            written=write,
            filled=editing.filled_as_json(done.filled),
            cut=done.cut,
            passes=done.passes,
            seed=done.seed,
            model=opened.name,
        )
        return
    _print_diff(diff)
    if not diff:
        output.note("nothing changed")
    elif not write:
        output.note("not written; --write changes the file")
    editing.note_effort(done.passes, done.seed, done.cut)


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

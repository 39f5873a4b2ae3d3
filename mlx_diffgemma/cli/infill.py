"""`mlx-diffgemma infill`: fill the holes of a text."""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_diffgemma.cli import editing
from mlx_diffgemma.cli.command import command
from mlx_diffgemma.cli.inputs import spelled_out
from mlx_diffgemma.cli.settings import Loading, Reaching
from mlx_diffgemma.settings import Setting


@command(
    "mlx-diffgemma infill --text 'def add(a, b): return [[?]]'",
    "mlx-diffgemma infill letter.txt --hole ___ --lengths 2,4,8",
    "cat letter.txt | mlx-diffgemma infill --hole ___ --json",
)
def infill(
    *,
    file: Annotated[
        str | None,
        typer.Argument(help="File with the text; stdin is read if neither it nor --text is given."),
    ] = None,
    text: Annotated[
        str | None, Setting("Text with holes, in place of a file.", panel=editing.PANEL)
    ] = None,
    hole: Annotated[
        str, Setting("Mark that stands for a hole in the text.", panel=editing.PANEL)
    ] = "[[?]]",
    lengths: editing.Lengths = (),
    prompt: editing.Instead = None,
    prompting: editing.Prompting,
    loading: Loading,
    reaching: Reaching,
    denoising: editing.Denoised,
    showing: editing.Shown,
) -> None:
    """Fill the holes of a text; everything around them stays byte for byte.

    --lengths once is for every hole; given as often as there are holes, it is for each in turn.
    """
    whole = editing.read_input(text, file, "text")
    candidates = editing.read_lengths(lengths)
    prompt = spelled_out(prompt)
    from mlx_diffgemma.cli import remote

    only_here = {"--raw": prompting.raw, "--lengths for each hole": len(candidates) > 1}
    server = remote.find(reaching, loading, only_here)
    if server is not None:
        lengths_for_all = candidates[0] if candidates else None
        done = server.edit(
            "/v1/infill", denoising, prompting, prompt, lengths_for_all, text=whole, hole=hole
        )
        name = server.name
    else:
        from mlx_diffgemma.cli import opening
        from mlx_diffgemma.editing import infill as room

        room.split_at_holes(whole, hole)
        opened = opening.open_model(loading)
        name = opened.name
        with editing.drawn(opened, showing) as on_step:
            done = room.infill(
                opened.model,
                opened.tokenizer,
                whole,
                hole=hole,
                lengths=(candidates[0] if len(candidates) == 1 else candidates) or room.LENGTHS,
                prompt=prompt,
                seed=denoising.seed,
                prompt_settings=prompting.prompt_settings(),
                config=denoising.config(opened.model),
                on_step=on_step,
            )
    if showing.json:
        editing.write_json(
            text=done.text,
            holes=[editing.filled_as_json(each) for each in done.holes],
            cut=done.cut,
            passes=done.passes,
            converged=done.converged,
            seed=done.seed,
            model=name,
        )
        return
    editing.write_exactly(done.text)
    editing.note_effort(done.passes, done.seed, converged=done.converged, cut=done.cut)

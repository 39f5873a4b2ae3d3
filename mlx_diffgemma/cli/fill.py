"""`mlx-diffgemma fill`: fill the named slots of a template."""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_diffgemma.cli import editing
from mlx_diffgemma.cli.command import command
from mlx_diffgemma.cli.inputs import spelled_out
from mlx_diffgemma.cli.settings import Loading, Reaching
from mlx_diffgemma.settings import Setting


@command(
    "mlx-diffgemma fill 'Dear {name:word}, you are {state:late|on time}.'",
    "mlx-diffgemma fill 'Order {id:/[A-Z]{2}-[0-9]+/}' --seed 7",
    "mlx-diffgemma fill --template form.txt --json",
)
def fill(
    *,
    text: Annotated[
        str | None, typer.Argument(help="Template, in place of a file that holds it.")
    ] = None,
    template: Annotated[str | None, Setting("File with the template.", panel=editing.PANEL)] = None,
    lengths: editing.Lengths = (),
    prompt: editing.Instead = None,
    prompting: editing.Prompting,
    loading: Loading,
    reaching: Reaching,
    denoising: editing.Denoised,
    showing: editing.Shown,
) -> None:
    """Fill a template's slots: {name}, {name:word}, {name:one|other}, {name:/regex/}.

    Kinds are line (the default), text, word and digits. Braces are written {{ and }}.
    """
    whole = editing.read_input(text, template, "template")
    candidates = editing.read_lengths(lengths)
    prompt = spelled_out(prompt)
    from mlx_diffgemma.cli import remote

    together = sorted({n for each in candidates for n in each})
    server = remote.find(reaching, loading, {"--raw": prompting.raw})
    if server is not None:
        done = server.edit(
            "/v1/fill", denoising, prompting, prompt, together or None, template=whole
        )
        name = server.name
    else:
        from mlx_diffgemma.cli import opening
        from mlx_diffgemma.editing import fill as room
        from mlx_diffgemma.editing.template import parse_template

        parse_template(whole)
        opened = opening.open_model(loading)
        name = opened.name
        with editing.drawn(opened, showing) as on_step:
            done = room.fill(
                opened.model,
                opened.tokenizer,
                whole,
                lengths=together or room.LENGTHS,
                prompt=prompt,
                seed=denoising.seed,
                prompt_settings=prompting.prompt_settings(),
                config=denoising.config(opened.model),
                on_step=on_step,
            )
    if showing.json:
        editing.write_json(
            text=done.text,
            slots=done.slots,
            details={name: editing.filled_as_json(each) for name, each in done.filled.items()},
            cut=done.cut,
            passes=done.passes,
            converged=done.converged,
            seed=done.seed,
            model=name,
        )
        return
    editing.write_exactly(done.text)
    editing.note_effort(done.passes, done.seed, converged=done.converged, cut=done.cut)

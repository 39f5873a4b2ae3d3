"""`mlx-diffgemma choose`: how probable is each of some answers?"""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_diffgemma.cli import editing
from mlx_diffgemma.cli.command import Only, command
from mlx_diffgemma.cli.settings import Denoising, Loading, Showing
from mlx_diffgemma.settings import Setting


@command(
    "mlx-diffgemma choose --question 'Is a whale a fish?' --choices yes no unsure",
    "mlx-diffgemma choose -q 'Is it late?' -q 'Is it dark?' yes no --draws 4",
    "mlx-diffgemma choose -q 'Is it late?' --frame 'It is {}.' late early --json",
)
def choose(
    *,
    choices: Annotated[list[str], typer.Argument(help="Answers to choose among.")],
    question: Annotated[
        list[str],
        typer.Option(
            "--question",
            "-q",
            help="Question to ask; it may be given several times.",
            rich_help_panel=editing.PANEL,
        ),
    ],
    here: Annotated[
        bool,
        Setting(
            "Word that may stand before the choices; they are the arguments either way.",
            ("--choices",),
            panel=editing.PANEL,
        ),
    ] = False,
    frame: Annotated[
        str,
        Setting("Text of the answer, with {} where the choice stands.", panel=editing.PANEL),
    ] = "{}",
    draws: Annotated[
        int, Setting("Number of canvases of noise to average over.", panel=editing.PANEL)
    ] = 1,
    bare: Annotated[
        bool, Setting("Question alone, without a list of the choices.", panel=editing.PANEL)
    ] = False,
    prompting: editing.Prompting,
    loading: Loading,
    denoising: Annotated[Denoising, Only("seed", "canvas_length")],
    showing: Annotated[Showing, Only("json")],
) -> None:
    """Say how probable the model finds each choice as the answer, in one look.

    The probabilities sum to 1; nothing is claimed about their calibration.
    """
    from mlx_diffgemma.cli import opening
    from mlx_diffgemma.cli.display import printable
    from mlx_diffgemma.editing import choose as room

    opened = opening.open_model(loading)
    found = room.choose(
        opened.model,
        opened.tokenizer,
        question,
        choices,
        frame=frame,
        draws=draws,
        bare=bare,
        seed=denoising.seed,
        system_prompt=prompting.system_prompt,
        raw=prompting.raw,
        config=denoising.config(opened.model),
    )
    if showing.json:
        editing.write_json(
            questions=[
                {
                    "question": each.question,
                    "best": each.best,
                    "probabilities": each.probabilities,
                    "spread": each.spread,
                    "tokens": each.tokens,
                }
                for each in found
            ],
            passes=found[0].passes,
            seed=found[0].seed,
            model=opened.name,
        )
        return
    width = max(map(len, choices))
    for each in found:
        if len(found) > 1:
            print(printable(each.question))
        ranked = sorted(each.probabilities.items(), key=lambda item: -item[1])
        for choice, probability in ranked:
            spread = f" ± {each.spread[choice]:.3f}" if draws > 1 else ""
            print(f"{printable(choice):{width}}  {probability:.3f}{spread}", flush=True)
    editing.note_effort(found[0].passes, found[0].seed)

"""`mlx-diffgemma generate`: one prompt, one answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mlx_diffgemma.cli import structured
from mlx_diffgemma.cli.command import command
from mlx_diffgemma.cli.settings import (
    Asking,
    Denoising,
    Loading,
    Pictures,
    Reaching,
    Showing,
)
from mlx_diffgemma.settings import Setting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_diffgemma.cli.output import OnPrefill
    from mlx_diffgemma.generation_response import GenerationResponse
    from mlx_diffgemma.text.prompt_settings import PromptSettings

GO_ON = "--max-tokens {} leaves room to go on."
MAKE_ROOM = "a shorter prompt leaves more of it."


@command(
    "mlx-diffgemma generate --prompt 'Why is the sky blue?'",
    "cat notes.txt | mlx-diffgemma generate --max-tokens 1024 --seed 7",
    "mlx-diffgemma generate -p 'Is it late?' --choices yes no unsure",
    "mlx-diffgemma generate -p 'What is this?' --image photo.jpg",
)
def generate(
    *,
    choices: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CHOICE]...", help="Answers that --choices allows."),
    ] = None,
    validity: structured.Validity,
    prompt: Annotated[
        str | None,
        Setting(
            "Prompt to answer; '-' reads stdin, and so does leaving it out where stdin is a pipe. "
            "In the option, not in stdin, \\n stands for a new line and \\t for a tab.",
            ("--prompt", "-p"),
            panel="Prompt",
        ),
    ] = None,
    pictures: Pictures,
    asking: Asking,
    loading: Loading,
    reaching: Reaching,
    denoising: Denoising,
    showing: Showing,
) -> None:
    """Write the answer to one prompt, drafted and refined before your eyes.

    stdout carries the answer alone; statistics and progress go to stderr.

    The answer always has the form of --json-schema FILE, --regex 'v[0-9]+' or --choices yes no
    unsure where one of these is given.
    """
    from mlx_diffgemma.cli.inputs import read_prompt, spelled_out

    constraint = validity.constraint(choices or ())
    images = pictures.read(prompt, raw=asking.raw)
    prompt_settings = asking.prompt_settings(images, pictures.image_tokens)
    text = read_prompt(spelled_out(prompt), raw=asking.raw)
    if constraint is not None:
        structured.answer(
            text, constraint, asking, loading, reaching, denoising, showing, prompt_settings
        )
    else:
        _answer(text, asking, loading, reaching, denoising, showing, prompt_settings)


def _answer(
    prompt: str,
    asking: Asking,
    loading: Loading,
    reaching: Reaching,
    denoising: Denoising,
    showing: Showing,
    prompt_settings: PromptSettings,
) -> None:
    from mlx_diffgemma.cli import opening, output, remote, remote_answers, summaries
    from mlx_diffgemma.cli.outcome import Outcome, pieces_of

    server = remote.find(reaching, loading, remote.only_here(asking, prompt_settings))
    if server is not None:
        opened = opening.Opened(server.name, None, None, 0.0)
    else:
        opened = opening.open_to_ask(loading, asking, prompt)

    def start(on_prefill: OnPrefill) -> Iterator[GenerationResponse]:
        if server is not None:
            whole = prompt if asking.raw else [{"role": "user", "content": prompt}]
            return server.generate(whole, prompt_settings, asking.stop, denoising)
        from mlx_diffgemma.generation import stream_generate

        return stream_generate(
            opened.model,
            opened.tokenizer,
            prompt,
            seed=denoising.seed,
            prompt_settings=prompt_settings,
            prefill_step_size=asking.prefill_step_size,
            config=denoising.config(opened.model),
            draft=False,
            stop=asking.stop,
            on_prefill=on_prefill,
        )

    outcome = Outcome()
    if showing.json:
        output.collect(start, outcome)
        output.write_line(summaries.as_json(outcome, opened))
        return
    thoughts = output.thoughts(showing.show_thought, showing.hide_thought)
    if output.can_draw(showing.watch):
        pieces = remote_answers.pieces if server is not None else pieces_of(opened.tokenizer)
        output.draw(start, pieces, outcome, thoughts)
    else:
        output.stream(start, outcome, thoughts)
    for remark in summaries.remarks(outcome, GO_ON, MAKE_ROOM):
        output.note(remark)
    output.note(summaries.statistics(outcome))

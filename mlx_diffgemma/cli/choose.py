"""`mlx-diffgemma choose`: how probable is each of some answers?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mlx_diffgemma.cli import editing, errors, options


def choose(
    ctx: typer.Context,
    choices: Annotated[list[str], typer.Argument(help="The answers to choose among.")],
    question: Annotated[
        list[str],
        typer.Option(
            "--question",
            "-q",
            help="What to ask; give it more than once to ask several at once.",
            rich_help_panel=editing.PANEL,
        ),
    ],
    here: Annotated[
        bool,
        typer.Option(
            "--choices",
            help="May stand before the choices; they are the arguments either way.",
            rich_help_panel=editing.PANEL,
        ),
    ] = False,
    frame: Annotated[
        str,
        typer.Option(
            "--frame",
            help="The answer's text, with {} where the choice stands.",
            rich_help_panel=editing.PANEL,
        ),
    ] = "{}",
    draws: Annotated[
        int,
        typer.Option(
            "--draws",
            help="How many canvases of noise to average over.",
            rich_help_panel=editing.PANEL,
        ),
    ] = 1,
    bare: Annotated[
        bool,
        typer.Option(
            "--bare", help="Ask without listing the choices.", rich_help_panel=editing.PANEL
        ),
    ] = False,
    system_prompt: options.SystemPrompt = None,
    chat_template: options.ChatTemplate = None,
    raw: options.Raw = False,
    model: options.Model = None,
    revision: options.Revision = None,
    adapter_path: options.AdapterPath = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = None,
    canvas_length: options.CanvasLength = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Say how probable the model finds each choice as the answer, in one look.

    Example: mlx-diffgemma choose --question 'Is a whale a fish?' --choices yes no unsure

    The probabilities sum to 1; nothing is claimed about their calibration.
    """

    def body() -> None:
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
            watch=False,
            as_json=json,
        )
        _choose(request, question, choices, {"frame": frame, "draws": draws, "bare": bare})

    errors.run(body, debug=errors.debugging(ctx))


def _choose(
    request: editing.Request, questions: list[str], choices: list[str], arguments: dict[str, Any]
) -> None:
    from mlx_diffgemma.cli import session
    from mlx_diffgemma.cli.display import printable
    from mlx_diffgemma.editing.choose import choose

    opened = session.open_model(request.model, **request.loading)
    found = choose(
        opened.model, opened.tokenizer, questions, choices, **arguments, **request.settings
    )
    if request.json:
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
            spread = f" ± {each.spread[choice]:.3f}" if arguments["draws"] > 1 else ""
            print(f"{printable(choice):{width}}  {probability:.3f}{spread}", flush=True)
    editing.note_effort(found[0].passes, found[0].seed)

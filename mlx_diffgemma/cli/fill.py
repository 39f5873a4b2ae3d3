"""`mlx-diffgemma fill`: fill the named slots of a template."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mlx_diffgemma.cli import editing, errors, options


def fill(
    ctx: typer.Context,
    text: Annotated[str | None, typer.Argument(help="The template itself.")] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", help="File with the template.", rich_help_panel=editing.PANEL),
    ] = None,
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
    """Fill a template's slots: {name}, {name:word}, {name:one|other}, {name:/regex/}.

    Example: mlx-diffgemma fill 'Order {id:/[A-Z]{2}-[0-9]+/} is {state:late|on time}, {name:word}.'

    Kinds are line (the default), text, word and digits. Braces are written {{ and }}.
    """

    def body() -> None:
        whole = editing.read_input(text, template, "template")
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
        arguments: dict[str, Any] = {"prompt": prompt}
        if candidates:
            arguments["lengths"] = sorted({n for each in candidates for n in each})
        _fill(request, whole, arguments)

    errors.run(body, debug=errors.debugging(ctx))


def _fill(request: editing.Request, template: str, arguments: dict[str, Any]) -> None:
    from mlx_diffgemma.cli import session
    from mlx_diffgemma.editing.fill import fill
    from mlx_diffgemma.editing.template import parse_template

    parse_template(template)
    opened = session.open_model(request.model, **request.loading)
    with editing.drawn(opened, request) as on_step:
        done = fill(
            opened.model,
            opened.tokenizer,
            template,
            on_step=on_step,
            **arguments,
            **request.settings,
        )
    if request.json:
        editing.write_json(
            text=done.text,
            slots=done.slots,
            details={name: editing.filled_as_json(each) for name, each in done.filled.items()},
            cut=done.cut,
            passes=done.passes,
            seed=done.seed,
            model=opened.name,
        )
        return
    editing.write_exactly(done.text)
    editing.note_effort(done.passes, done.seed, done.cut)

"""`mlx-diffgemma infill`: fill the holes of a text."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mlx_diffgemma.cli import editing, errors, options


def infill(
    ctx: typer.Context,
    file: Annotated[
        str | None, typer.Argument(help="File with the text; stdin if neither is given.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", help="The text itself.", rich_help_panel=editing.PANEL),
    ] = None,
    hole: Annotated[
        str,
        typer.Option("--hole", help="What marks a hole.", rich_help_panel=editing.PANEL),
    ] = "[[?]]",
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
    """Fill the holes of a text; all around them stays byte for byte.

    Example: mlx-diffgemma infill --text 'def add(a, b): return [[?]]'

    --lengths once is for every hole; given as often as there are holes, it is for each in turn.
    """

    def body() -> None:
        whole = editing.read_input(text, file, "text")
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
        arguments: dict[str, Any] = {"hole": hole, "prompt": prompt}
        if candidates:
            arguments["lengths"] = candidates[0] if len(candidates) == 1 else candidates
        _infill(request, whole, arguments)

    errors.run(body, debug=errors.debugging(ctx))


def _infill(request: editing.Request, text: str, arguments: dict[str, Any]) -> None:
    from mlx_diffgemma.cli import session
    from mlx_diffgemma.editing.infill import infill, split_at_holes

    split_at_holes(text, arguments["hole"])
    opened = session.open_model(request.model, **request.loading)
    with editing.drawn(opened, request) as on_step:
        done = infill(
            opened.model,
            opened.tokenizer,
            text,
            on_step=on_step,
            **arguments,
            **request.settings,
        )
    if request.json:
        editing.write_json(
            text=done.text,
            holes=[editing.filled_as_json(each) for each in done.holes],
            cut=done.cut,
            passes=done.passes,
            seed=done.seed,
            model=opened.name,
        )
        return
    editing.write_exactly(done.text)
    editing.note_effort(done.passes, done.seed, done.cut)

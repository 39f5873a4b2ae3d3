"""The answers of `mlx-diffgemma generate` that are valid by construction."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_diffgemma.cli import editing
from mlx_diffgemma.errors import UsageError

if TYPE_CHECKING:
    from mlx_diffgemma.cli.generate import Request

_PANEL = "Always valid"

Choices = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CHOICE]...", help="The answers that --choices allows."),
]
ChoicesFollow = Annotated[
    bool,
    typer.Option(
        "--choices", help="Answer with one of the arguments that follow.", rich_help_panel=_PANEL
    ),
]
JsonSchema = Annotated[
    str | None,
    typer.Option(
        "--json-schema",
        help="File with a JSON schema: answer with JSON that validates.",
        rich_help_panel=_PANEL,
    ),
]
Regex = Annotated[
    str | None,
    typer.Option(
        "--regex",
        help="Answer with a match of the whole expression (Rust's syntax).",
        rich_help_panel=_PANEL,
    ),
]


def constraint(
    choices: list[str] | None, choices_follow: bool, json_schema: str | None, regex: str | None
) -> dict[str, Any]:
    """The constraint as keyword arguments of `generate_structured`; empty where there is none.

    Raises:
        UsageError: there is more than one, or it cannot be read.
    """
    if choices and not choices_follow:
        raise UsageError(
            f"'{choices[0]}' is no option; give the prompt with --prompt, or choices behind "
            "--choices."
        )
    if choices_follow and not choices:
        raise UsageError("--choices needs answers behind it, such as: --choices yes no unsure.")
    given: dict[str, Any] = {}
    if choices:
        given["choices"] = choices
    if json_schema is not None:
        given["json_schema"] = _read_schema(json_schema)
    if regex is not None:
        given["regex"] = regex
    if len(given) > 1:
        raise UsageError("give only one of --json-schema, --regex and --choices.")
    return given


def answer(request: Request, constraint: dict[str, Any]) -> None:
    """Write an answer that satisfies the constraint."""
    from mlx_diffgemma.cli import output
    from mlx_diffgemma.cli.generate import opened_for
    from mlx_diffgemma.editing.structured import UnmetConstraintError, generate_structured

    opened = opened_for(request)
    shared = editing.Request(
        request.model, request.loading, request.settings, request.watch, request.json
    )
    try:
        with editing.drawn(opened, shared) as on_step:
            done = generate_structured(
                opened.model,
                opened.tokenizer,
                request.prompt,
                on_step=on_step,
                **constraint,
                **request.settings,
            )
    except UnmetConstraintError as error:
        output.note(f"by then was written: {error.partial}")
        raise
    if request.json:
        editing.write_json(
            text=done.text,
            tokens=list(done.tokens),
            entropy=list(done.entropy),
            finish_reason="stop",
            generation_tokens=len(done.tokens),
            denoising_steps=list(done.denoising_steps),
            passes=done.passes,
            seed=done.seed,
            model=opened.name,
        )
        return
    output.write_line(done.text)
    editing.note_effort(done.passes, done.seed)


def _read_schema(path: str) -> Any:
    from mlx_diffgemma.editing.files import read_text

    try:
        schema = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}."
        ) from None
    if not isinstance(schema, (dict, bool)):
        raise UsageError(f"{path} holds no JSON schema: it must be an object.")
    return schema

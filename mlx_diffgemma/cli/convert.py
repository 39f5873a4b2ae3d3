"""`mlx-diffgemma convert`: the same as `mlx-diffgemma-convert`."""

from __future__ import annotations

import sys

import typer

from mlx_diffgemma.cli import errors
from mlx_diffgemma.cli.help_page import PLAIN

app = typer.Typer(**PLAIN)


@app.command(  # the converter reads its own options
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def convert(ctx: typer.Context) -> None:
    """Turn Hugging Face weights into MLX form, quantized or not (see convert --help)."""
    arguments = list(ctx.args)
    debug = errors.debugging(ctx)
    if debug and "--debug" not in arguments:
        arguments.append("--debug")

    def body() -> None:
        from mlx_diffgemma_convert.cli import main

        sys.argv = ["mlx-diffgemma convert", *arguments]
        main()

    errors.run(body, debug=debug)

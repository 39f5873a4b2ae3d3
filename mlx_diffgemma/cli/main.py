"""`mlx-diffgemma`: the commands gathered. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mlx_diffgemma import __version__
from mlx_diffgemma.cli import options
from mlx_diffgemma.cli.bench import bench
from mlx_diffgemma.cli.chat import chat
from mlx_diffgemma.cli.convert import convert
from mlx_diffgemma.cli.decide import app as decide
from mlx_diffgemma.cli.demo import demo
from mlx_diffgemma.cli.edit import edit
from mlx_diffgemma.cli.fill import fill
from mlx_diffgemma.cli.fuse import fuse
from mlx_diffgemma.cli.generate import generate
from mlx_diffgemma.cli.infill import infill
from mlx_diffgemma.cli.train import train

app = typer.Typer(
    name="mlx-diffgemma",
    help="DiffusionGemma on Apple Silicon: whole blocks of text, drafted and refined in front of "
    "you.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(chat)
app.command()(infill)
app.command()(edit)
app.command()(fill)
app.add_typer(decide, name="decide")
app.command()(demo)
app.command()(train)
app.command()(fuse)
app.command()(bench)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)(convert)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mlx-diffgemma {__version__}")
        raise typer.Exit()


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: options.Debug = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an answer may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()

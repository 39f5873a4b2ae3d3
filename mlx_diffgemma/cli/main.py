"""`mlx-diffgemma`: the commands gathered. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from mlx_diffgemma import __version__
from mlx_diffgemma.__main__ import leave
from mlx_diffgemma.cli import errors, options, streams
from mlx_diffgemma.cli.bench import bench
from mlx_diffgemma.cli.chat import chat
from mlx_diffgemma.cli.choose import choose
from mlx_diffgemma.cli.convert import convert
from mlx_diffgemma.cli.demo import demo
from mlx_diffgemma.cli.edit import edit
from mlx_diffgemma.cli.fill import fill
from mlx_diffgemma.cli.fuse import fuse
from mlx_diffgemma.cli.generate import generate
from mlx_diffgemma.cli.infill import infill
from mlx_diffgemma.cli.train import train

app = typer.Typer(
    name="mlx-diffgemma",
    cls=errors.Program,
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
app.command()(choose)
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
    """Run the program and exit. Ctrl-C is a `KeyboardInterrupt` while a command runs, and ends at
    once before and after."""
    interruptible = callable(signal.getsignal(signal.SIGINT))  # a shell ignores it behind `&`
    try:
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        streams.prepare()
        app(prog_name="mlx-diffgemma")
    except KeyboardInterrupt:
        sys.exit(errors.INTERRUPTED)
    finally:
        if interruptible:
            signal.signal(signal.SIGINT, leave)


if __name__ == "__main__":
    main()

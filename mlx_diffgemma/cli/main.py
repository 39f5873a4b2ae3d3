"""`mlx-diffgemma`: the program with all its commands. Nothing heavy is imported before one runs."""

from __future__ import annotations

import inspect
import signal
import sys
from importlib import import_module
from typing import Annotated, Any

import typer

from mlx_diffgemma import __version__
from mlx_diffgemma.cli import errors, streams
from mlx_diffgemma.cli.command import Debug
from mlx_diffgemma.cli.help_page import PLAIN, PlainCommand

COMMANDS = (
    "generate", "chat", "infill", "edit", "fill", "decide", "serve", "demo", "train", "fuse",
    "tune", "bench", "report", "distributed", "convert",
)  # fmt: skip
"""Names of the commands. Each is the program `app` in the module of its name, or the function of
its name in that module."""


class Program(errors.Program):
    """The commands by name; a command is imported and made when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def summary_of(self, ctx: Any, name: str) -> str:
        """The first paragraph of a command's docstring, for which the command is not made."""
        module = import_module(f"mlx_diffgemma.cli.{name}")
        return inspect.cleandoc(getattr(module, name).__doc__).partition("\n\n")[0]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in self.commands:
            module = import_module(f"mlx_diffgemma.cli.{cmd_name}")
            alone = getattr(module, "app", None)
            if alone is None:
                alone = typer.Typer(**PLAIN)
                alone.command(cmd_name, cls=PlainCommand)(getattr(module, cmd_name))
            self.commands[cmd_name] = typer.main.get_command(alone)
        return self.commands[cmd_name]


app = typer.Typer(
    name="mlx-diffgemma",
    cls=Program,
    help="DiffusionGemma on Apple Silicon: whole blocks of text, drafted and refined in front of "
    "you.",
    no_args_is_help=True,
    **{**PLAIN, "add_completion": True},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mlx-diffgemma {__version__}")
        raise typer.Exit()


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Version of the program, and nothing else.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    pass


def main() -> None:
    """Run the program and exit. Ctrl-C is a `KeyboardInterrupt` while a command runs."""
    try:
        if callable(signal.getsignal(signal.SIGINT)):  # a shell ignores it behind `&`
            signal.signal(signal.SIGINT, signal.default_int_handler)
        streams.prepare()
        app(prog_name="mlx-diffgemma")
    except KeyboardInterrupt:
        sys.exit(errors.INTERRUPTED)


if __name__ == "__main__":
    main()

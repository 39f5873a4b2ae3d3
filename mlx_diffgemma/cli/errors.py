"""How a command ends: its exit code, and one line on stderr instead of a traceback."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from mlx_diffgemma.cli import streams
from mlx_diffgemma.cli.help_page import write_options, write_section
from mlx_diffgemma.distributed import launched
from mlx_diffgemma.errors import DiffGemmaError

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPE_CLOSED = 141  # 128 + SIGPIPE
_OF_COMPLETION = ("install_completion", "show_completion")  # as typer names its options

_Refused: Any = typer.BadParameter.__mro__[1]  # the parser's UsageError, which typer does not name


class Program(TyperGroup):
    """The commands of a program. An error in its arguments is one line on stderr."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options before the name of a command. Where the name stands first, the options
        for help and completion are not looked for: typer imports pydantic to read their values,
        which takes a third of the time of a help page."""
        if args and args[0] in self.list_commands(ctx):
            self.params = [each for each in self.params if each.name not in _OF_COMPLETION]
            self.add_help_option = False
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options of the program, then its commands with a sentence each."""
        write_options(self, ctx, formatter)
        rows = [(name, self.summary_of(ctx, name)) for name in self.list_commands(ctx)]
        write_section(formatter, "Commands", rows)

    def summary_of(self, ctx: Any, name: str) -> str:
        """What a command is for, in a sentence."""
        help = getattr(self.get_command(ctx, name), "help", None) or ""
        return str(help).partition("\n\n")[0]

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command that the arguments name, and exit with its code."""
        alone = extra.pop("standalone_mode", True)
        extra["standalone_mode"] = False
        if not alone:
            return super().main(*args, **extra)
        try:
            code = super().main(*args, **extra)
            sys.stdout.flush()  # what is buffered of a help text
        except KeyboardInterrupt:
            code = INTERRUPTED
        except BrokenPipeError:
            streams.discard()
            code = PIPE_CLOSED
        except _Refused as error:
            code = _refuse(error)
        sys.exit(code if isinstance(code, int) else 0)


def _refuse(error: Any) -> int:
    """Say on stderr what the parser found wrong. Returns the exit code."""
    message = error.format_message().rstrip(".").replace("Got unexpected extra", "Too many")
    if error.ctx is None or "\n" in message:  # the help: no command was given
        print(error.format_message(), file=sys.stderr)
    else:
        if message[1:2].islower():
            message = message[0].lower() + message[1:]
        complain(f"{message}; see {error.ctx.command_path} --help.")
    return int(error.exit_code)


def run(command: Callable[[], None], *, debug: bool = False) -> None:
    """Run the body of a command and turn whatever it raises into an exit code.

    Args:
        command: the body, its arguments bound.
        debug: let exceptions through, so that Python prints their traceback.

    Raises:
        typer.Exit: the command failed; what there is to say about it is on stderr.
    """
    try:
        command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        streams.discard()
        raise typer.Exit(PIPE_CLOSED) from None
    except DiffGemmaError as error:
        if debug:
            raise
        complain(str(error))
        raise typer.Exit(error.exit_code) from None
    except typer.Exit:
        raise
    except Exception as error:  # the boundary to the user: nothing may end in a traceback
        if debug:
            raise
        wrong: BaseException | None = streams.discard()
        if wrong is None and isinstance(error, OSError) and error.errno == errno.ENOSPC:
            wrong = error  # of a stdout without a buffer, or of a file
        if isinstance(wrong, OSError):
            complain(f"the output cannot be written ({wrong.strerror}); make room and run again.")
            raise typer.Exit(1) from None
        if isinstance(error, OSError) and error.strerror:
            where = f"{str(error.filename)[:80]}: " if error.filename else ""
            complain(f"{where}{error.strerror}; check the path.")
            raise typer.Exit(1) from None
        message = next(iter(str(error).splitlines()), "")
        named = f"{type(error).__name__}: {message}" if message else type(error).__name__
        complain(f"{named} (unexpected; --debug shows where it comes from)")
        raise typer.Exit(1) from None


def complain(message: str) -> None:
    """Print one `error: ...` line on stderr, with the rank of this process where it is one of
    several and not the first."""
    rank = f"rank {launched.rank()}: " if launched.rank() else ""
    print(f"error: {rank}{' '.join(message.splitlines())}", file=sys.stderr)


def debugging(ctx: typer.Context) -> bool:
    """Whether `--debug` was given, before the name of the command or after it."""
    return any(context.params.get("debug", False) for context in (ctx, ctx.find_root()))

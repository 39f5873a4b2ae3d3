"""How a command ends: its exit code, and one line on stderr instead of a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import typer

from mlx_diffgemma.errors import DiffGemmaError

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPE_CLOSED = 141  # 128 + SIGPIPE


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
        _discard_stdout()
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
        message = next(iter(str(error).splitlines()), "")
        named = f"{type(error).__name__}: {message}" if message else type(error).__name__
        complain(f"{named} (unexpected; --debug shows where it comes from)")
        raise typer.Exit(1) from None


def complain(message: str) -> None:
    """Print one `error: ...` line on stderr."""
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)


def debugging(ctx: typer.Context) -> bool:
    """Whether `--debug` was given, before the name of the command or after it."""
    return any(context.params.get("debug", False) for context in (ctx, ctx.find_root()))


def _discard_stdout() -> None:
    """Send what is still buffered nowhere: the reader has gone, and Python flushes at exit."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # not a real file, so nothing is flushed into a pipe
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)

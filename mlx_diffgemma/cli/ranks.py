"""A command that several processes run together, as `mlx.launch` starts them: rank 0 talks to the
user, and all of them compute."""

from __future__ import annotations

import signal
from collections.abc import Callable
from importlib.metadata import version
from types import FrameType
from typing import Protocol

import typer

from mlx_diffgemma import __version__
from mlx_diffgemma.cli import errors, keys
from mlx_diffgemma.distributed import launched
from mlx_diffgemma.distributed.group import Ranks, end_process, join
from mlx_diffgemma.distributed.line import Ending


class Loadable(Protocol):
    """Which model is loaded, and how, as the command line says."""

    parallel: str | None
    weights: str | None

    def among(self, ranks: Ranks) -> Loadable:
        """The same, for a model that these processes compute together."""

    def load(self) -> object:
        """Load the model, or a share of it."""


def run(body: Callable[..., None], loading: Loadable, *, debug: bool) -> None:
    """Run the body of a command on rank 0, and what it asks for on the other ranks. All processes
    end when one does.

    Args:
        body: the body; `loading`, with the ranks in it, is put in place of the command line's.
        loading: which model is loaded, and how.
        debug: let exceptions through.

    Raises:
        typer.Exit: the command failed; what there is to say about it is on stderr.
    """
    place = launched.rank()
    ending = Ending(1)
    found: list[Ranks] = []

    def together() -> None:
        ranks = _joined(place)
        found.append(ranks)
        ranks.agree(_facts(loading))
        here = loading.among(ranks)
        try:
            if place == 0:
                body(loading=here)
            else:
                _follow(here)
        except typer.Exit:
            raise
        except Exception as error:
            ranks.fail(error)
            raise

    try:
        errors.run(together, debug=debug)
        ending = Ending(0)
    except typer.Exit as error:
        ending = Ending(error.exit_code)
        raise
    except SystemExit as error:
        ending = Ending(error.code if isinstance(error.code, int) else 1)
        raise
    finally:
        if found and found[0].leader is not None:
            found[0].end(ending)
            if ending.code and not debug:  # MLX may wait in a collective for ever
                end_process(ending)


def _follow(loading: Loadable) -> None:
    """Compute what rank 0 orders, until it ends this process.

    Raises:
        typer.Exit: always, with the exit code of rank 0.
    """
    try:
        loading.load()  # it comes back by an exception alone
    except SystemExit as end:
        raise typer.Exit(end.code if isinstance(end.code, int) else 1) from None


def _joined(place: int) -> Ranks:
    """Come together with the other processes. Ctrl-C is rank 0's alone from then on; until then it
    ends each process by itself, for MLX does not let Python handle it while it connects."""
    before = signal.getsignal(signal.SIGINT)
    interruptible = callable(before)
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    give_back = keys.returner()

    def end(ending: Ending) -> None:
        give_back()
        end_process(ending)

    ranks = join(end)
    signal.signal(signal.SIGINT, before if interruptible and place == 0 else signal.SIG_IGN)
    if place == 0:
        signal.signal(signal.SIGTERM, _terminate)
    return ranks


def _terminate(signum: int, frame: FrameType | None) -> None:
    """A signal handler that ends rank 0 by an exception, so that it tells the others."""
    raise SystemExit(128 + signum)


def _facts(loading: Loadable) -> dict[str, str]:
    """What has to be the same on all ranks before a model is looked at."""
    return {
        "mlx-diffgemma": __version__,
        "mlx": version("mlx"),
        "--parallel": loading.parallel or "auto",
        "--weights": loading.weights or "none",
    }

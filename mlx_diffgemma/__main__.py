"""The program `mlx-diffgemma`, which `python -m mlx_diffgemma` runs as well.

The rest of the package is imported after the signal handler is set, so that Ctrl-C ends the program
without a traceback during the imports too.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def leave(signum: int, frame: FrameType | None) -> None:
    """A signal handler that ends the process at once, where there is nothing to clean up."""
    os._exit(128 + signum)


def main() -> None:
    """Entry point of the console script."""
    interruptible = callable(signal.getsignal(signal.SIGINT))  # a shell ignores SIGINT behind `&`
    if interruptible:
        signal.signal(signal.SIGINT, leave)
    from mlx_diffgemma.cli.main import main as run

    try:
        run()
    finally:
        if interruptible:
            signal.signal(signal.SIGINT, leave)


if __name__ == "__main__":
    main()

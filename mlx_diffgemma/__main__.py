"""`mlx-diffgemma`, and the same as `python -m mlx_diffgemma`.

Nothing is imported here before Ctrl-C ends the program without a traceback.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def leave(signum: int, frame: FrameType | None) -> None:
    """End at once: a signal handler for when there is nothing to clean up."""
    os._exit(128 + signum)


def main() -> None:
    """Entry point of the console script."""
    interruptible = callable(signal.getsignal(signal.SIGINT))  # a shell ignores it behind `&`
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

"""The terminal while a program works: typed keys stay off the screen, and Ctrl-Z and SIGTERM leave
the terminal as it was."""

from __future__ import annotations

import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SHOW_CURSOR = "\x1b[?25h"
PLAIN_PASTE = "\x1b[?2004l"


def _nothing() -> None:
    pass


class Guard:
    """Gives the terminal back whenever the program stops or is ended, while it is open.

    Args:
        pause: removes what is drawn on the screen, before the program stops.
        resume: draws it again once the program goes on.
        echo: whether typed keys are shown. Keys that are not shown wait to be read.
    """

    def __init__(
        self,
        pause: Callable[[], None] = _nothing,
        resume: Callable[[], None] = _nothing,
        *,
        echo: bool = False,
    ) -> None:
        self._pause, self._resume, self._echo = pause, resume, echo
        self._terminal: int | None = None
        self._modes: list[Any] | None = None  # the terminal's modes to restore
        self._handlers: dict[int, Any] = {}
        self._busy = False
        self._waiting: int | None = None  # a signal that came while `undisturbed` was open

    def __enter__(self) -> Guard:
        self._terminal = _terminal()
        if self._terminal is not None:
            with suppress(ValueError):  # not in the main thread, where signals are handled
                self._handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._handle)
                if not self._echo:
                    self._handlers[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._handle)
            self._take()
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers.clear()

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """While this is open, a signal waits, so that no half frame is left on the screen."""
        outer, self._busy = self._busy, True
        try:
            yield
        finally:
            self._busy = outer
            if not outer and self._waiting is not None:
                waiting, self._waiting = self._waiting, None
                self._handle(waiting, None)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._busy:
            self._waiting = signum
            return
        self._pause()
        self._give_back()
        if signum == signal.SIGTERM and self._terminal is not None:
            os.write(self._terminal, (SHOW_CURSOR + PLAIN_PASTE * self._echo).encode())
        signal.signal(signum, self._handlers[signum])
        os.kill(os.getpid(), signum)
        # The program goes on here, after SIGCONT.
        signal.signal(signum, self._handle)
        self._take()
        self._resume()

    def _take(self) -> None:
        if self._terminal is None or not _in_front(self._terminal):
            return
        with suppress(termios.error):
            self._modes = termios.tcgetattr(self._terminal)
            modes = list(self._modes)
            if not self._echo:
                modes[3] &= ~(termios.ECHO | termios.ECHONL)
                termios.tcsetattr(self._terminal, termios.TCSADRAIN, modes)

    def _give_back(self) -> None:
        modes, self._modes = self._modes, None
        if modes is not None and self._terminal is not None and _in_front(self._terminal):
            with suppress(termios.error):  # the terminal has gone
                termios.tcsetattr(self._terminal, termios.TCSADRAIN, modes)


def returner() -> Callable[[], None]:
    """A function that gives the terminal back with the modes that it has now. Any thread may call
    it, when the process is about to end."""
    terminal = _terminal()
    if terminal is None:
        return _nothing
    with suppress(termios.error):
        modes = termios.tcgetattr(terminal)

        def give_back() -> None:
            if _in_front(terminal):
                with suppress(termios.error, OSError):
                    termios.tcsetattr(terminal, termios.TCSANOW, modes)
                    os.write(terminal, f"\r{SHOW_CURSOR}{PLAIN_PASTE}".encode())

        return give_back
    return _nothing


def drop() -> None:
    """Drop the keys that were typed and not read."""
    with suppress(termios.error, OSError, ValueError):
        termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)


def _terminal() -> int | None:
    """The descriptor of the terminal that keys are shown on, or None."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            if stream.isatty():
                return stream.fileno()
    return None


def _in_front(terminal: int) -> bool:
    """Whether the program is in the terminal's foreground: the kernel stops others that change its
    modes, except where the terminal controls another session or none."""
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return True

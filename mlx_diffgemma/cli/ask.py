"""The questions of a conversation: edited on a terminal, or read line by line from a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from mlx_diffgemma.cli.inputs import read_text
from mlx_diffgemma.cli.keys import Guard
from mlx_diffgemma.cli.output import note

PROMPT, CONTINUED = "> ", ". "
_BOM = "\ufeff"
_ENDS = "Ctrl-C once more ends, and so does Ctrl-D."

Read = Callable[[str], str]
"""Reads what follows a prompt, with a newline at its end; "" where the input has ended."""


def questions(interactive: bool) -> Iterator[str]:
    """What the user asks, without the newline at its end. Lines are joined where one ends in a
    backslash; a paste on a terminal is one question.

    Raises:
        PromptError: stdin holds bytes that are not text.
        KeyboardInterrupt: Ctrl-C twice on a terminal, or once where the input is piped.
    """
    read = _reader() if interactive else _piped
    pending, first, warned = "", True, False
    while True:
        try:
            line = read(CONTINUED if pending else PROMPT)
        except KeyboardInterrupt as interrupt:
            cleared = pending or any(interrupt.args)
            if not interactive or (warned and not cleared):
                raise
            note(_ENDS)
            pending, warned = "", True
            continue
        if not line:
            break
        line = line.removesuffix("\n").removesuffix("\r")
        if first:
            line, first = line.removeprefix(_BOM), False
        warned = False
        if line.endswith("\\"):
            pending += line[:-1] + "\n"
            continue
        yield pending + line
        pending = ""
    if pending:
        yield pending


def _piped(prompt: str) -> str:
    return read_text(sys.stdin.readline)


def _reader() -> Read:
    """A function that reads from the terminal, with editing and history where the terminal can show
    them. The prompt goes to stderr where stdout is not the terminal."""
    shown = sys.stdout if sys.stdout.isatty() else sys.stderr
    if shown.isatty() and os.environ.get("TERM", "dumb").lower() not in ("dumb", "unknown"):
        return _Editor(shown)

    def read(prompt: str) -> str:
        print(prompt, end="", file=shown if shown.isatty() else sys.stderr, flush=True)
        line = ""
        try:
            line = read_text(sys.stdin.readline)
        finally:
            if not line:
                print(file=sys.stderr)  # leave the line of the prompt
        return line

    return read


class _Editor:
    """A line editor that takes a paste as one text. Of the libraries behind Python's readline only
    GNU's does so, and Macs have the other one.

    Args:
        shown: the stream of the terminal.
    """

    def __init__(self, shown: Any) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output.vt100 import Vt100_Output

        output = Vt100_Output.from_pty(shown, term=os.environ.get("TERM"))
        output.enable_cpr = False  # answers of a slow terminal would be taken for keys
        self._session: PromptSession[str] = PromptSession(
            output=output,
            key_bindings=_interruptible(),
            enable_suspend=True,
            prompt_continuation="",
            reserve_space_for_menu=0,
        )

    def __call__(self, prompt: str) -> str:
        self._session.app.erase_when_done = False
        try:
            with Guard(echo=True):
                return self._session.prompt([("ansidefault", prompt)]).rstrip("\n") + "\n"
        except EOFError:
            return ""


def _interruptible() -> Any:
    """Key bindings by which Ctrl-C erases the line and raises a `KeyboardInterrupt` that carries
    what was typed."""
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("c-c")
    @keys.add("<sigint>")
    def interrupt(event: KeyPressEvent) -> None:
        event.app.erase_when_done = True
        event.app.exit(exception=KeyboardInterrupt(event.current_buffer.text))

    return keys

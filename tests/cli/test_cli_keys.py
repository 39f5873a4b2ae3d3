"""Keys, pastes, signals and a narrower window on a real terminal."""

from __future__ import annotations

import io
import signal
import termios

import pytest
from cli_fakes import Terminal, command, rendered
from rich.console import Console
from rich.text import Text

from mlx_diffgemma.cli import display


def test_a_conversation_typed_pasted_and_interrupted():
    """One program for several checks, for its start takes a second."""
    terminal = Terminal(*command({"echo": True, "delay": 0.1}, "chat", "--model", "m"))
    modes = terminal.modes
    terminal.until("> ")
    terminal.type("\x1b[200~one\n/two\n\x1b[201~\r")
    terminal.until("step 1")
    assert not terminal.modes[3] & termios.ECHO
    terminal.type_ahead("unseen\r")
    terminal.until('"one\\n/two"\r\n')
    terminal.until("> ")
    terminal.type("half a line")
    terminal.until("half a line")
    terminal.type("\x03")
    terminal.until("Ctrl-C once more ends")
    terminal.until("> ")
    terminal.type("//etc\r")
    terminal.until('"/etc"\r\n')
    terminal.until("> ")
    terminal.type("\x03")
    terminal.until("once more ends")
    terminal.until("> ")
    terminal.interrupt()
    terminal.finish()
    assert terminal.code == 130
    assert terminal.modes_left == modes
    screen = terminal.screen()
    assert "unseen" not in terminal.written
    assert "half a line" not in "\n".join(screen)
    assert "Traceback" not in terminal.written
    assert screen[:6] == [
        "loading m", "/help lists the commands, Ctrl-D ends.", "> one", "/two",
        "", '"one\\n/two"',
    ]  # fmt: skip


def test_a_drawing_is_stopped_goes_on_and_is_ended():
    script = {"canvases": ["never"], "delay": 0.05, "endless": True}
    terminal = Terminal(*command(script, "generate", "-p", "hi", "--model", "m"))
    modes = terminal.modes
    terminal.until("step 2")
    terminal.type_ahead("unseen\r")
    assert not terminal.modes[3] & termios.ECHO
    terminal.stop()
    assert terminal.modes == modes
    assert terminal.screen() == ["loading m"]
    assert terminal.written.endswith("\x1b[2K") and "\x1b[?25h" in terminal.written[-40:]
    terminal.process.send_signal(signal.SIGCONT)
    terminal.until("\x1b[?25l")
    terminal.until("step")
    terminal.process.terminate()
    terminal.finish()
    assert terminal.code == -signal.SIGTERM
    assert terminal.modes_left == modes
    assert terminal.written.rfind("\x1b[?25h") > terminal.written.rfind("\x1b[?25l")
    assert terminal.screen() == ["loading m"]


def test_a_prompt_that_is_ended_gives_the_terminal_back():
    terminal = Terminal(*command({}, "chat", "--model", "m"))
    modes = terminal.modes
    terminal.until("> ")
    assert terminal.modes != modes
    terminal.process.terminate()
    terminal.finish()
    assert terminal.code == -signal.SIGTERM
    assert terminal.modes_left == modes
    assert terminal.written.rfind("\x1b[?2004l") > terminal.written.rfind("\x1b[?2004h")


@pytest.mark.parametrize(("name", "rows"), [("TMUX", 6), ("NONE", 3)])
def test_a_narrower_window_leaves_nothing_where_terminals_wrap_anew(monkeypatch, name, rows):
    """60 columns on 20 are three rows there, and one row where lines are cut."""
    for each in display._REWRAPPING:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "1")
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=60, height=12, _environ={})
    with display.Frames(console, Text("x" * 60 + "\ny\n" + "z" * 40)) as frames:
        console.width = 20
        before = len(file.getvalue())
        frames.show(Text("short"))
    written = file.getvalue()
    assert rendered(written[:before]) == ["x" * 60, "y", "z" * 40]
    assert written[before:].partition("short")[0].count("\x1b[1A") == rows - 1

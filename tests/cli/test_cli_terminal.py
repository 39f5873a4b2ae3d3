"""The program on a terminal: what is seen in the end, Ctrl-C, and where each stream goes."""

from __future__ import annotations

import signal
import subprocess

from cli_fakes import Terminal, command


def shown_cursor(written: str) -> bool:
    return written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l")


def test_the_answer_stands_once_when_the_canvas_is_gone():
    script = {"canvases": ["first line\n", "[b]漢字 🙂\x1b[2J\x07"], "delay": 0.06}
    terminal = Terminal(*command(script, "generate", "-p", "hi", "--model", "m"))
    terminal.finish()
    assert terminal.code == 0
    assert "\x1b[?25l" in terminal.written, "the canvas was never drawn"
    assert shown_cursor(terminal.written)
    screen = terminal.screen()
    assert screen[:3] == ["loading m", "first line", "[b]漢字 🙂␛[2J␇"]
    assert screen[3].startswith("prompt:")
    assert "canvas 1" not in "\n".join(screen)


def test_no_watch_draws_nothing():
    terminal = Terminal(*command({}, "generate", "-p", "hi", "--model", "m", "--no-watch"))
    terminal.finish()
    assert "\x1b[?25l" not in terminal.written
    assert terminal.screen()[1] == "hello"


def test_control_characters_are_pictures_without_the_canvas_too():
    script = {"canvases": ["\x1b[2Jx"]}
    terminal = Terminal(*command(script, "generate", "-p", "hi", "--model", "m", "--no-watch"))
    terminal.finish()
    assert terminal.screen()[1] == "␛[2Jx"


def test_piped_stdout_gets_the_answer_and_the_terminal_the_progress():
    script = {"canvases": ["one\n", "\x1b[31mtwo"], "delay": 0.15}
    terminal = Terminal(
        *command(script, "generate", "-p", "hi", "--model", "m"), stdout=subprocess.PIPE
    )
    terminal.finish()
    assert terminal.process.stdout.read().decode() == "one\n\x1b[31mtwo\n"
    assert "canvas 1 · step" in terminal.written
    assert shown_cursor(terminal.written)
    screen = terminal.screen()
    assert screen[0] == "loading m"
    assert screen[1].startswith("prompt:")


def test_ctrl_c_ends_with_130_and_a_clean_terminal():
    script = {"canvases": ["never"], "delay": 0.05, "endless": True}
    terminal = Terminal(*command(script, "generate", "-p", "hi", "--model", "m"))
    terminal.until("step 2")
    terminal.interrupt()
    terminal.finish()
    assert terminal.code == 130
    assert shown_cursor(terminal.written)
    assert terminal.screen() == ["loading m"]


def test_ctrl_c_in_a_pipe_ends_with_130():
    script = {"canvases": ["begun\n", "never"], "delay": 0.05, "endless": True}
    process = subprocess.Popen(
        command(script, "generate", "-p", "hi", "--debug"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130


def test_an_error_leaves_a_clean_terminal():
    script = {"run_error": ["NumericalError", "step 3 gave NaN."]}
    terminal = Terminal(*command(script, "generate", "-p", "hi", "--model", "m"))
    terminal.finish()
    assert terminal.code == 1
    assert shown_cursor(terminal.written)
    assert terminal.screen() == ["loading m", "error: step 3 gave NaN."]


def test_debug_shows_the_traceback():
    script = {"run_error": ["ZeroDivisionError", "oh"]}
    process = subprocess.run(
        command(script, "generate", "-p", "hi", "--debug"), capture_output=True, text=True
    )
    assert process.returncode == 1
    assert process.stdout == ""
    assert process.stderr.startswith("Traceback")
    assert process.stderr.endswith("ZeroDivisionError: oh\n")


def test_no_prompt_on_a_terminal_is_an_error():
    terminal = Terminal(*command({}, "generate", "--model", "m"))
    terminal.finish()
    assert terminal.code == 2
    assert terminal.screen() == ["error: no prompt: give one with --prompt, or pipe it in."]


def test_a_terminal_that_cannot_redraw_gets_plain_text(monkeypatch):
    monkeypatch.setattr("cli_fakes.TERM", "dumb")
    terminal = Terminal(*command({}, "generate", "-p", "hi", "--model", "m"))
    terminal.finish()
    assert "\x1b" not in terminal.written
    assert terminal.screen()[1] == "hello"

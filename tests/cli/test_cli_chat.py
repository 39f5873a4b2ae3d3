"""`mlx-diffgemma chat`: turns, commands, and what Ctrl-C leaves."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest
from cli_fakes import FakeTokenizer, Terminal, command


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def prompts(program):
    return [call["prompt"] for call in program.script.calls]


def test_piped_lines_are_turns_over_one_cache(program):
    result = program("chat", "--model", "m", input="one\n\ntwo\r\nthree")
    assert result.exit_code == 0
    assert result.stdout == "hello\n" * 3
    assert prompts(program) == [
        [user("one")],
        [user("one"), assistant("hello"), user("two")],
        [user("one"), assistant("hello"), user("two"), assistant("hello"), user("three")],
    ]
    (cache,) = program.script.model.caches
    assert all(call["prefix_cache"] is cache for call in program.script.calls)


def test_settings_arrive(program):
    program("chat", "--seed", "4", "--steps", "2", "--thinking", input="hi")
    call = program.script.calls[0]
    assert (call["seed"], call["thinking"]) == (4, True)
    assert call["config"] == {"profile": "balanced", "max_denoising_steps": 2}


def test_reset_forgets_and_keeps_the_system_prompt(program):
    result = program("chat", "--system-prompt", "s", input="one\n/reset\ntwo")
    assert prompts(program) == [[system("s"), user("one")], [system("s"), user("two")]]
    assert "the conversation is forgotten." in result.stderr
    caches = [call["prefix_cache"] for call in program.script.calls]
    assert caches == program.script.model.caches


def test_system_sets_shows_and_drops_the_system_prompt(program):
    result = program("chat", input="/system be brief\n/system\none\n/system off\n/system\ntwo")
    assert prompts(program) == [
        [system("be brief"), user("one")],
        [user("one"), assistant("hello"), user("two")],
    ]
    said = [line for line in result.stderr.splitlines() if "tokens" not in line]
    assert said == [
        "the system prompt is set.", "be brief", "no system prompt.", "no system prompt."
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/help", "/reset          forget the conversation"),
        ("/system", "no system prompt."),
    ],
)
def test_commands_ask_the_model_nothing(program, line, said):
    result = program("chat", input=line)
    assert (result.exit_code, result.stdout) == (0, "")
    assert said in result.stderr
    assert prompts(program) == []


def test_quit_ends(program):
    assert program("chat", input="/quit\nnever asked").exit_code == 0
    assert prompts(program) == []


def test_a_backslash_joins_lines(program):
    program("chat", input="sudoku\\\n1..\\\n.2.\nnext \\")
    assert prompts(program)[0] == [user("sudoku\n1..\n.2.")]
    assert prompts(program)[1][-1] == user("next \n")


def test_an_unknown_command_in_a_pipe_is_not_lost(program):
    result = program("chat", input="one\n/etc/hosts?\ntwo")
    assert (result.exit_code, result.stdout) == (2, "hello\n")
    assert result.stderr.endswith(
        "error: /etc/hosts? is not a command; /help lists them. // in place of / asks it.\n"
    )


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        (" /help", " /help"),
        ("//etc/hosts?", "/etc/hosts?"),
        ("// a comment\\\nx = 1", "// a comment\nx = 1"),
        ("/* a comment */\\\nx = 1", "/* a comment */\nx = 1"),
        ("\ufeffhi", "hi"),
    ],
)
def test_a_question_may_begin_with_a_slash_and_a_mark_of_the_encoding_is_none(program, line, asked):
    assert program("chat", input=line).exit_code == 0
    assert prompts(program) == [[user(asked)]]


def test_an_empty_answer_is_no_turn(program):
    program.script.canvases = [""]
    result = program("chat", input="one\ntwo")
    assert prompts(program) == [[user("one")], [user("two")]]
    assert result.stderr.count("the answer is empty") == 2


@pytest.mark.parametrize("error", [("PromptError", "too long."), ("KeyboardInterrupt", "")])
def test_what_was_encoded_outlives_a_turn_that_broke_off(program, monkeypatch, error):
    """At a terminal, where one goes on; the run that broke off gives the cache free."""
    from mlx_diffgemma.cli.chat import Chat
    from mlx_diffgemma.cli.settings import Showing

    opened = SimpleNamespace(model=program.script.model, tokenizer=FakeTokenizer())
    chat, runs = Chat(opened, showing=Showing(watch=False)), []
    generate = program.script.stream_generate

    def noted(*args, **options):
        runs.append(generate(*args, **options))
        return runs[-1]

    monkeypatch.setattr("mlx_diffgemma.generation.stream_generate", noted)
    program.script.run_error = error
    chat._turn("one", interactive=True)
    program.script.run_error = None
    chat._turn("two", interactive=True)
    assert prompts(program) == [[user("one")], [user("two")]]
    (cache,) = program.script.model.caches
    assert all(call["prefix_cache"] is cache for call in program.script.calls)
    assert all(run.gi_frame is None for run in runs)


def test_an_error_in_a_pipe_ends(program):
    program.script.run_error = ("PromptError", "too long.")
    result = program("chat", input="one\ntwo")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: too long.\n"


def test_bytes_that_are_no_text_end(program):
    result = program("chat", input=b"bad \xff\n")
    assert result.exit_code == 2
    assert result.stderr == "error: the prompt is not UTF-8 text: re-encode it.\n"


def test_a_conversation_on_a_terminal():
    terminal = Terminal(*command({"delay": 0.06}, "chat", "--model", "m"))
    terminal.until("> ")
    terminal.type("hi there\n")
    terminal.until("tokens per forward")
    terminal.until("> ")
    terminal.type("\x04")
    terminal.finish()
    assert terminal.code == 0
    assert "canvas 1 · step 1" in terminal.written
    text = terminal.written.replace("\x1b[?2004h", "").replace("\x1b[?2004l", "")
    assert "hello\r\n" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")


def test_lines_are_joined_on_a_terminal_and_piped_stdout_has_the_answers_alone():
    terminal = Terminal(*command({}, "chat", "--model", "m"), stdout=subprocess.PIPE)
    terminal.until("> ")
    terminal.type("one\\\n")
    terminal.until(". ")
    terminal.type("two\n")
    terminal.until("tokens per forward")
    terminal.until("> ")
    terminal.type("/quit\n")
    terminal.finish()
    assert terminal.process.stdout.read() == b"hello\n"
    assert terminal.code == 0


def test_ctrl_c_stops_the_answer_and_keeps_the_session():
    script = {"canvases": ["part of\n", "never"], "delay": 0.05, "endless": True}
    terminal = Terminal(*command(script, "chat", "--model", "m"))
    terminal.until("> ")
    terminal.type("go on\n")
    terminal.until("canvas 2 · step 2")
    terminal.interrupt()
    terminal.until("left out of the conversation.")
    terminal.type("/quit\n")
    terminal.finish()
    assert terminal.code == 0
    assert "part of\r\n" in terminal.written


def test_an_error_on_a_terminal_keeps_the_session():
    terminal = Terminal(*command({"run_error": ["PromptError", "too long."]}, "chat"))
    terminal.until("> ")
    terminal.type("hi\n")
    terminal.until("error: too long.")
    terminal.type("/quit\n")
    terminal.finish()
    assert terminal.code == 0

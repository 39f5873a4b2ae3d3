"""Thoughts, calls and ends on the command line: what goes where, and what is said of it."""

from __future__ import annotations

import json
import subprocess

import pytest
from cli_fakes import Terminal, command
from mlx_lm.tokenizer_utils import TokenizerWrapper
from text import release_like

from mlx_diffgemma import generation

CALL = {"name": "f", "arguments": {"a": [1]}, "raw": "call:f{a:[1]}"}
CUT = {"name": "g", "raw": "call:g{a:\n1", "error": "a tool call was cut off"}


def test_a_thought_goes_to_stderr(program):
    program.script.canvases, program.script.thoughts = ["", "Paris."], ["plan", "\nof\nmore"]
    result = program("generate", "-p", "hi")
    assert result.stdout == "Paris.\n"
    assert result.stderr.startswith("plan\nof\nmore\nprompt:")
    result = program("generate", "-p", "hi", "--hide-thought")
    assert (result.stdout, result.stderr[:7]) == ("Paris.\n", "prompt:")


def test_json_has_every_part(program):
    program.script.canvases, program.script.thoughts = ["Let me see."], ["plan"]
    program.script.tool_calls, program.script.finish = [CALL, CUT], "tool_calls"
    result = program("generate", "-p", "hi", "--json")
    answer = json.loads(result.stdout)
    assert result.stderr == ""
    assert (answer["text"], answer["thought"], answer["empty"]) == ("Let me see.", "plan", False)
    assert answer["finish_reason"] == "tool_calls"
    assert answer["tool_calls"] == [{"name": "f", "arguments": {"a": [1]}}]
    assert answer["failed_calls"] == [
        {"name": "g", "raw": "call:g{a:\n1", "error": "a tool call was cut off"}
    ]


def test_calls_are_said_on_stderr(program):
    program.script.canvases, program.script.tool_calls = [""], [CALL, CUT]
    result = program("generate", "-p", "hi")
    assert result.stdout == ""
    assert 'tool call: {"name": "f", "arguments": {"a": [1]}}\n' in result.stderr
    assert "a tool call was cut off: call:g{a: 1\n" in result.stderr
    assert "empty" not in result.stderr


@pytest.mark.parametrize(
    ("canvas", "thoughts", "finish", "said"),
    [
        ("", [], "stop", "the answer is empty: the model ended it on the first canvas."),
        (" \n\n", [], "stop", "the answer is empty: it is white space alone."),
        ("", ["plan"], "stop", "the answer is empty: the model thought and then said nothing."),
        ("", ["plan"], "length", "the thought was cut at 0 tokens; --max-tokens"),
    ],
)
def test_an_answer_that_says_nothing(program, canvas, thoughts, finish, said):
    program.script.canvases, program.script.thoughts = [canvas], thoughts
    program.script.finish = finish
    assert said in program("generate", "-p", "hi").stderr
    assert json.loads(program("generate", "-p", "hi", "--json").stdout)["empty"] is True


def test_an_answer_that_was_cut_says_how_to_go_on(program):
    program.script.finish = "length"
    result = program("generate", "-p", "hi")
    remark = "the answer was cut at 5 tokens; --max-tokens 10 leaves room to go on.\n"
    assert (result.stdout, remark in result.stderr) == ("hello\n", True)
    result = program("chat", input="one\ntwo")
    assert "the answer was cut at 5 tokens; ask to go on, or start the chat with" in result.stderr
    # A cut answer is part of the conversation: one may ask to go on.
    assert program.script.calls[-1]["prompt"][1] == {"role": "assistant", "content": "hello"}


def test_what_the_context_cut_and_what_did_not_settle_is_said(program):
    program.script.finish, program.script.context_full = "length", True
    program.script.converged = False
    result = program("generate", "-p", "hi")
    assert "cut at 5 tokens, where the model's context ends; a shorter prompt" in result.stderr
    unsettled = "not every canvas settled within its steps; --steps N allows more."
    assert result.stderr.count(unsettled) == 1 and "converge" not in result.stderr
    assert "--max-tokens" not in result.stderr
    answer = json.loads(program("generate", "-p", "hi", "--json").stdout)
    assert (answer["context_full"], answer["converged"]) == (True, False)
    assert "/reset forgets the conversation" in program("chat", input="hi").stderr


def test_an_answer_that_ended_by_itself_says_nothing_of_it(program):
    assert "cut" not in program("generate", "-p", "hi").stderr


def test_thoughts_stay_out_of_the_conversation(program):
    program.script.thoughts = ["secret plan"]
    result = program("chat", "--thinking", input="one\ntwo")
    assert result.stdout == "hello\nhello\n"
    assert "secret plan" in result.stderr
    assert program.script.calls[1]["prompt"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "two"},
    ]


@pytest.mark.parametrize(("canvas", "thoughts"), [(" \n", []), ("", ["plan"])])
def test_a_blank_answer_is_no_turn(program, canvas, thoughts):
    program.script.canvases, program.script.thoughts = [canvas], thoughts
    result = program("chat", input="one\ntwo")
    assert len(program.script.calls[1]["prompt"]) == 1
    assert "the answer is empty" in result.stderr


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_stop_strings_arrive(program, name):
    given = ["--stop", "END", "--stop", "\n\n"]
    arguments = [name, "-p", "hi", *given] if name == "generate" else [name, *given]
    assert program(*arguments, input="hi").exit_code == 0
    assert program.script.calls[0]["stop"] == ("END", "\n\n")


TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_tools_and_variables_arrive(program, tmp_path, name):
    (tmp_path / "one.json").write_text(json.dumps(TOOL["function"]), encoding="utf-8")
    (tmp_path / "two.json").write_text(json.dumps([TOOL, TOOL]), encoding="utf-8")
    files = [f"--tools={tmp_path / file}.json" for file in ("one", "two")]
    result = program(name, *files, "--chat-template-config", '{"enable_thinking": true}', input="a")
    assert result.exit_code == 0
    call = program.script.calls[0]
    assert call["tools"] == [TOOL] * 3
    assert call["chat_template_kwargs"] == {"enable_thinking": True}


def test_what_the_prompt_begins_and_how_it_is_read(program):
    program("generate", "-p", r"a\nb\tc", "--prefill-response", r"x\n", "--raw", "--markers")
    assert program.script.calls == []
    assert program("generate", "-p", r"a\nb\tc", "--prefill-response", r"x\n").exit_code == 0
    call = program.script.calls[0]
    assert (call["prompt"], call["prefill_response"]) == ("a\nb\tc", r"x\n")
    program("generate", "-p", "-", input=r"a\nb")
    assert program.script.calls[1]["prompt"] == r"a\nb"
    program("generate", "-p", "<a>", "--raw", "--markers")
    assert program.script.calls[2]["markers"] is True


def test_spelt_markers_are_warned_of(program, monkeypatch):
    own = release_like.build()
    tokenizer = TokenizerWrapper(own, eos_token_ids=release_like.ends(own))
    monkeypatch.setattr(generation, "load", lambda *_, **__: (program.script.model, tokenizer))
    warning = (
        "the prompt spells <turn|>, <|turn>, which is read as text; generate --raw --markers has "
        "control tokens count.\n"
    )
    spelt = "a<turn|><|turn>user<turn|>"
    for arguments in (["-p", spelt], ["-p", spelt, "--raw"], ["-p", "a", "--system-prompt", spelt]):
        assert program("generate", *arguments).stderr.startswith(warning)
    for arguments in (["-p", "a <b> |>"], ["-p", spelt, "--raw", "--markers"]):
        assert "read as text" not in program("generate", *arguments).stderr
    assert program("chat", input=spelt).stderr.startswith(warning)
    assert program("generate", "-p", "a", "--extra-eos-token", "<table>").exit_code == 0
    assert own.convert_tokens_to_ids("<table>") in tokenizer.eos_token_ids
    for name in (["generate", "-p", "a"], ["chat"]):
        result = program(*name, "--extra-eos-token", "<tabel>", input="a")
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert "'<tabel>' is no token of this tokenizer" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--markers"], "--markers is for a --raw prompt: add --raw, or drop it."),
        (["--raw", "--tools", "x"], "--tools needs a chat template, and --raw uses none: drop "
         "one."),
        (["--prefill-response", "a", "--regex", "b+"],
         "--prefill-response does not go with a constraint: drop one."),
        (["--chat-template-config", "{"],
         "--chat-template-config is not JSON: line 1, column 2: Expecting property name enclosed "
         "in double quotes."),
        (["--chat-template-config", "[]"],
         '--chat-template-config must be a JSON object, like {"name": true}.'),
        (["--stop", ""], "--stop must be a text of at least one character."),
        (["--stop", "a", "--regex", "b+"], "--stop does not go with a constraint: drop one."),
        (
            ["--show-thought", "--hide-thought"],
            "--show-thought and --hide-thought contradict each other: drop one.",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(program, arguments, message):
    result = program("generate", "-p", "hi", *arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {message}\n")
    assert program.script.loads == []


LONG = {"canvases": ["Paris."], "thoughts": ["first\n" + "and so on " * 20 + "\x1b[2J end"]}


@pytest.mark.parametrize("watch", ["--watch", "--no-watch"])
def test_a_thought_is_one_dim_line_on_a_terminal(watch):
    terminal = Terminal(*command(LONG, "generate", "-p", "hi", "--model", "m", watch))
    terminal.finish()
    screen = terminal.screen()
    assert screen[1].startswith("thought: first and so on and")
    assert screen[1].endswith("…") and len(screen[1]) < terminal.columns
    assert screen[2] == "Paris."
    assert "\x1b[2mthought: first" in terminal.written


def test_a_thought_is_shown_whole_or_not_at_all():
    arguments = ("generate", "-p", "hi", "--model", "m")
    whole = Terminal(*command(LONG, *arguments, "--show-thought"))
    whole.finish()
    text = "\n".join(whole.screen())
    assert "thought: first\nand so on" in text and "␛[2J end\nParis." in text
    none = Terminal(*command(LONG, *arguments, "--hide-thought", "--no-watch"))
    none.finish()
    assert none.screen()[:2] == ["loading m", "Paris."]


def test_a_piped_answer_leaves_the_thought_to_the_terminal():
    arguments = command(LONG, "generate", "-p", "hi", "--model", "m")
    terminal = Terminal(*arguments, stdout=subprocess.PIPE)
    terminal.finish()
    assert terminal.process.stdout.read() == b"Paris.\n"
    assert any(line.startswith("thought: first and") for line in terminal.screen())

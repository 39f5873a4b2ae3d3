"""`mlx-diffgemma generate` in pipes: what is asked, what goes to stdout, what fails."""

from __future__ import annotations

import json

import pytest
from cli_fakes import EOS

from mlx_diffgemma.cli.settings import DEFAULT_MODEL


def test_stdout_carries_the_answer_alone(program):
    program.script.canvases = ["one [bold]two[/bold]\x1b[31m\n", "three 🙂 \x07end"]
    result = program("generate", "-p", "hi")
    assert result.exit_code == 0
    assert result.stdout == "one [bold]two[/bold]\x1b[31m\nthree 🙂 \x07end\n"
    for figure in ("7 tokens, 70.0 tokens/s", "6 steps (3 + 3), 2 canvases", "1.50 GB", "seed"):
        assert figure in result.stderr
    assert "\x1b" not in result.stderr


def test_a_newline_at_the_end_is_not_doubled(program):
    program.script.canvases = ["done\n"]
    assert program("generate", "-p", "hi").stdout == "done\n"


def test_json_is_one_object(program):
    program.script.canvases = ["ab", "ç"]
    result = program("generate", "-p", "hi", "--json", "--seed", "5", "--model", "demo")
    assert result.exit_code == 0
    assert result.stderr == ""
    answer = json.loads(result.stdout)
    times = answer.pop("times")
    assert answer == {
        "text": "abç",
        "thought": "",
        "tool_calls": [],
        "failed_calls": [],
        "empty": False,
        "context_full": False,
        "converged": True,
        "stop_token": EOS,
        "stop_string": None,
        "tokens": [97, 98, 231],
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "generation_tokens": 3,
        "canvases": 2,
        "denoising_steps": [3, 3],
        "tokens_per_forward": 0.5,
        "prompt_tps": 70.0,
        "generation_tps": 5.0,
        "peak_memory": 1.5,
        "images": 0,
        "seed": 5,
        "model": "demo",
    }
    assert set(times) == {"load_s", "images_s", "prompt_s", "generation_s"}
    assert times["prompt_s"] == pytest.approx(0.1)
    assert all(seconds >= 0 for seconds in times.values())


def test_every_option_arrives(program):
    arguments = (
        "generate --model m --revision r --adapter-path a --trust-remote-code --check "
        "--chat-template t --system-prompt s --no-thinking --prefill-step-size 64 -p hi -m 9 "
        "--seed 3 --steps 4 --canvas-length 32 --t-min 0.1 --t-max 0.2 --entropy-bound 0.3 "
        "--stability-threshold 2 --confidence-threshold 0.01 --sampler ddim "
        "--accept-threshold 0.5 --profile fast --no-stop-at-eos --shrink-canvas --soft-cutoff 8 "
        "--allow-empty --eos-certainty 0.2 --confident-after 6 --settled-after 2 --no-watch "
        "--stop END "
        """--chat-template-config {"a":1} --prefill-response so"""
    )
    assert program(*arguments.split()).exit_code == 0
    assert program.script.loads == [
        {
            "path": "m",
            "revision": "r",
            "adapter_path": "a",
            "trust_remote_code": True,
            "check": True,
            "chat_template": "t",
            "ranks": None,
            "parallel": None,
            "weights": None,
        }
    ]
    call = program.script.calls[0]
    call.pop("on_prefill")
    assert call == {
        "prompt": "hi",
        "system_prompt": "s",
        "thinking": False,
        "images": [],
        "image_tokens": None,
        "raw": False,
        "markers": False,
        "tools": None,
        "chat_template_kwargs": {"a": 1},
        "prefill_response": "so",
        "draft": False,
        "stop": ("END",),
        "prefill_step_size": 64,
        "seed": 3,
        "config": {
            "profile": "fast",
            "max_tokens": 9,
            "max_denoising_steps": 4,
            "canvas_length": 32,
            "t_min": 0.1,
            "t_max": 0.2,
            "entropy_bound": 0.3,
            "stability_threshold": 2,
            "confidence_threshold": 0.01,
            "sampler": "ddim",
            "accept_threshold": 0.5,
            "stop_at_eos": False,
            "eos_certainty": 0.2,
            "shrink_canvas": True,
            "forbid_empty": False,
            "soft_cutoff": 8.0,
            "confident_after": 6,
            "settled_after": 2,
        },
    }


def test_settings_left_out_stay_the_checkpoint_s(program):
    program("generate", "-p", "hi")
    assert program.script.loads[0]["path"] == DEFAULT_MODEL
    call = program.script.calls[0]
    assert call["config"] == {"profile": "balanced"}
    left_out = ("seed", "system_prompt", "thinking", "prefill_step_size")
    assert all(call[name] is None for name in left_out)
    assert (call["raw"], call["stop"]) == (False, ())


@pytest.mark.parametrize(
    ("arguments", "piped", "prompt"),
    [
        (["-p", "given"], "ignored", "given"),
        (["-p", "-"], "two\nlines\n", "two\nlines"),
        ([], "line\r\n", "line"),
        ([], "kept blank line\n\n", "kept blank line\n"),
        (["--raw"], "as it is\n", "as it is\n"),
        (["--raw", "-p", "\n"], None, "\n"),
    ],
)
def test_the_prompt_comes_from_the_option_or_the_pipe(program, arguments, piped, prompt):
    assert program("generate", *arguments, input=piped).exit_code == 0
    assert program.script.calls[0]["prompt"] == prompt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-p hi --steps 0", "max_denoising_steps must be an integer of at least 1, not 0."),
        ("-p hi -m 0", "max_tokens must be an integer of at least 1, not 0."),
        ("-p hi --canvas-length -1", "canvas_length must be an integer of at least 1, not -1."),
        ("-p hi --entropy-bound 0", "entropy_bound must be a number above 0, not 0.0."),
        ("-p hi --eos-certainty 0", "eos_certainty must be a number above 0, not 0.0."),
        ("-p hi --t-min -1", "t_min must be a number at least 0, not -1.0."),
        ("-p hi --t-min nan", "t_min must be a number at least 0, not nan."),
        ("-p hi --t-max 0", "t_max must be a number above 0, not 0.0."),
        ("-p hi --t-min 2 --t-max 1", "t_max (1) must not be below t_min (2)."),
        ("-p hi --confidence-threshold inf",
         "confidence_threshold must be a number above 0, not inf."),
        ("-p hi --stability-threshold -1",
         "stability_threshold must be an integer of at least 0, not -1."),
        ("-p hi --seed -1", "--seed must be between 0 and 2^64 - 1, not -1."),
        ("-p hi --prefill-step-size 0", "--prefill-step-size must be at least 1, not 0."),
        ("-p hi --sampler euler", "unknown sampler 'euler'; known are "
         "entropy-bound, confidence-threshold, block-refinement, ddim."),
        (
            "-p hi --profile x",
            "unknown profile 'x'; known are exact, balanced, swift, fast, turbo. A file that "
            "`tune` wrote ends with .json.",
        ),
        ("-p hi --raw --system-prompt s",
         "--system-prompt needs a chat template, and --raw uses none: drop one."),
        ("-p hi --raw --thinking",
         "--thinking/--no-thinking needs a chat template, and --raw uses none: drop one."),
        ("", "the prompt is empty: give some text with --prompt, or pipe it in."),
    ],
)  # fmt: skip
def test_a_bad_argument_is_one_line_before_the_model_is_loaded(program, arguments, message):
    result = program("generate", *arguments.split(), input="")
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {message}\n")
    assert program.script.loads == []


def test_one_end_of_the_temperature_may_be_given(program):
    assert program("generate", "-p", "hi", "--t-max", "0.2").exit_code == 0
    assert program("generate", "-p", "hi", "--t-min", "3").exit_code == 0


@pytest.mark.parametrize("arguments", [["-p", "bad \udcff"], ["-p", "-"]])
def test_bytes_that_are_no_text(program, arguments):
    result = program("generate", *arguments, input=b"bad \xff")
    assert result.exit_code == 2
    assert result.stderr == "error: the prompt is not UTF-8 text: re-encode it.\n"


HINT = " For the small model that ships with the program: --model demo"


@pytest.mark.parametrize("error", ["CheckpointError", "MemoryShortageError"])
def test_without_a_model_the_error_points_to_the_demo(program, error):
    program.script.load_error = (error, "cannot have it.")
    result = program("generate", "-p", "hi")
    assert (result.exit_code, result.stderr) == (1, f"error: cannot have it.{HINT}\n")


def test_with_a_model_it_does_not(program):
    program.script.load_error = ("CheckpointError", "cannot have it.")
    result = program("generate", "-p", "hi", "--model", DEFAULT_MODEL)
    assert (result.exit_code, result.stderr) == (1, "error: cannot have it.\n")


def test_an_error_on_the_way_leaves_what_was_committed_out_of_stderr(program):
    program.script.run_error = ("NumericalError", "step 3 gave NaN.")
    result = program("generate", "-p", "hi")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "error: step 3 gave NaN.\n")


@pytest.mark.parametrize("arguments", [["generate", "--debug"], ["--debug", "generate"]])
def test_debug_brings_the_exception_back(program, arguments):
    program.script.run_error = ("ZeroDivisionError", "oh")
    result = program(*arguments, "-p", "hi")
    assert isinstance(result.exception, ZeroDivisionError)


def test_an_unexpected_exception_is_one_line(program):
    program.script.run_error = ("ZeroDivisionError", "oh")
    result = program("generate", "-p", "hi")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: ZeroDivisionError: oh (unexpected; --debug shows where it comes from)\n"
    )


def test_an_empty_answer_is_reported(program):
    program.script.canvases = [""]
    result = program("generate", "-p", "hi")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "the answer is empty" in result.stderr
    assert "--seed" in result.stderr

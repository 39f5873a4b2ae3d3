"""The commands that work on a canvas, on the demo model, and what they say when they cannot."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from mlx_diffgemma import generation
from mlx_diffgemma.cli.main import app

GRID = "532461\n461532\n146253\n253146\n314625\n625314"
QUICK = ["--model", "demo", "--seed", "1", "--steps", "2"]
BARE = ["--model", "demo", "--seed", "1", "--prompt", "sudoku"]


@pytest.fixture(autouse=True, scope="module")
def _load_once():
    """One loading of the demo model for all of these tests."""
    loaded = generation.load("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "load", lambda name, **settings: loaded)
        yield


def run(*arguments: str, input: str | None = None, code: int = 0):
    result = CliRunner().invoke(app, list(arguments), input=input, prog_name="mlx-diffgemma")
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    return result


def test_infill_writes_the_text_and_nothing_else_to_stdout():
    text = GRID.replace("461532", "[[?]]")
    result = run("infill", "--text", text, *BARE, "--lengths", "5,6,7")
    assert result.stdout == GRID
    assert "forward passes, seed 1" in result.stderr


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\t \n\n"])
def test_infill_keeps_every_byte_of_a_pipe_and_of_a_file(tmp_path, end):
    text = f"é\r\n<turn|>??🦊{end}"
    path = tmp_path / "text"
    path.write_bytes(text.encode())
    arguments = ["infill", *QUICK, "--hole", "??", "--lengths", "1", "--prompt", "x"]
    piped = run(*arguments, input=text).stdout_bytes.decode()
    read = run(*arguments, str(path)).stdout_bytes.decode()
    assert piped == read
    before, after = text.split("??")
    assert read.startswith(before) and read.endswith(after) and len(read) == len(text) - 1


def test_infill_as_json():
    arguments = ["--lengths", "5,6", "--lengths", "3", "--json"]
    text = "[[?]]" + GRID[6:20] + "[[?]]" + GRID[23:]
    found = json.loads(run("infill", "--text", text, *BARE, *arguments).stdout)
    assert found["text"] == GRID
    assert [hole["text"] for hole in found["holes"]] == [GRID[:6], GRID[20:23]]
    assert len(found["holes"][0]["entropy"]) == len(found["holes"][0]["tokens"])
    assert set(found["holes"][0]["length_scores"]) == {"5", "6"}
    assert found["passes"] >= 3 and found["seed"] == 1 and found["cut"] == 0


def test_a_prompt_spells_new_lines_as_generate_does():
    prompt = "record\\nname: toke\\nage: 41\\ncity: rome"
    text = '{"name": "toke", "age": [[?]], "city": "rome"}'
    asked = ["infill", "--model", "demo", "--seed", "0", "-p", prompt, "--text", text]
    assert run(*asked).stdout == text.replace("[[?]]", "41")


def test_infill_says_what_the_model_did_not_see():
    text = "[[?]]" + "x" * 70
    result = run("infill", "--text", text, *QUICK, "--lengths", "2", "--prompt", "x")
    assert "the last 8 tokens of the text behind did not fit in the canvas" in result.stderr


def test_edit_prints_a_diff_and_writes_only_when_told(tmp_path):
    path = tmp_path / "grid.txt"
    broken = GRID.replace("461532", "461542")
    path.write_text(broken)
    arguments = ["edit", str(path), "--range", "2", "-i", "repair", *BARE, "--strength", "0.5"]
    shown = run(*arguments)
    assert shown.stdout.startswith("--- a/grid.txt\n+++ b/grid.txt\n@@ ")
    assert "-461542\n+461532\n" in shown.stdout
    assert "not written; --write changes the file" in shown.stderr
    assert path.read_text() == broken
    written = run(*arguments, "--write", "--json")
    assert json.loads(written.stdout)["written"] is True
    assert path.read_text() == GRID
    assert [each.name for each in tmp_path.iterdir()] == ["grid.txt"]


def test_edit_leaves_a_read_only_file_alone_unless_forced(tmp_path):
    path, other = tmp_path / "grid.txt", tmp_path / "other.txt"
    path.write_text(GRID)
    path.chmod(0o444)
    other.hardlink_to(path)
    arguments = ["edit", str(path), "--range", "2", "-i", "x", *QUICK, "--write"]
    result = run(*arguments, code=1)
    assert result.stderr == f"error: {path} is read-only; --force writes it all the same.\n"
    assert path.read_text() == GRID
    result = run(*arguments, "--force")
    assert (
        "grid.txt had another name (hard links), under which the old text stays." in result.stderr
    )
    assert path.read_text() != GRID == other.read_text()
    assert path.stat().st_mode & 0o7777 == 0o444


def test_a_pattern_takes_what_room_it_needs():
    """More than any of the lengths that slots have; a canvas is the limit."""
    arguments = ["fill", *QUICK, "--prompt", "x", "--lengths", "2"]
    result = run(*arguments, "{x:/[a-c]{40}/}")
    assert len(result.stdout) == 40 and set(result.stdout) <= set("abc")
    result = run(*arguments, "{x:/[a-c]{400}/}", code=2)
    assert result.stderr == (
        "error: no text of at most 62 tokens was found that matches the pattern of slot 'x'; "
        "loosen it, or take a longer --canvas-length.\n"
    )
    many = "1000000000000"
    for command in (["infill", "--text", "a [[?]] b"], ["fill", "{x} {y:/a/}"]):
        result = run(*command, *QUICK, "--prompt", "x", "--lengths", many, code=2)
        assert f"of {many} tokens does not fit in the canvas of 64; make it" in result.stderr


def test_what_cannot_be_enforced_is_validated_on_request(tmp_path):
    schema = tmp_path / "schema.json"
    item = '{"type": "integer", "minimum": 0, "maximum": 9}'
    size = '"minItems": 2, "maxItems": 2, "uniqueItems": true'
    schema.write_text(f'{{"type": "array", "items": {item}, {size}}}')
    arguments = ["generate", "-p", "x", *QUICK, "-m", "20", "--json-schema", str(schema)]
    refused = run(*arguments, code=2)
    assert refused.stderr.startswith("error: the JSON schema cannot be used: at /uniqueItems, ")
    first, second = json.loads(run(*arguments, "--validate", "20").stdout)
    assert first != second


def test_fill_gives_text_and_slots(tmp_path):
    path = tmp_path / "template"
    path.write_text("No {id:digits} is {state:on|off} {{x}}\n")
    plain = run("fill", "--template", str(path), *QUICK, "--lengths", "2", "--prompt", "x")
    as_json = run("fill", "--template", str(path), *QUICK, "--lengths", "2", "-p", "x", "--json")
    found = json.loads(as_json.stdout)
    assert found["text"] == plain.stdout
    slots = found["slots"]
    assert plain.stdout == f"No {slots['id']} is {slots['state']} {{x}}\n"
    assert slots["id"].isdecimal() and slots["state"] in ("on", "off")
    assert set(found["details"]) == {"id", "state"}


CELL = {"cell": {"type": "choice", "criteria": dict.fromkeys("456")}}
STATE = "sudoku\n" + GRID.replace("532461", "5324.1")
DECIDE = ["decide", "--model", "demo", "--seed", "1"]


def test_decide_answers_questions_from_text_and_files(tmp_path):
    state, frame = tmp_path / "state.txt", "5324{cell}1" + GRID[6:]
    state.write_text(STATE)
    arguments = ["--questions", json.dumps(CELL), "--frame", frame, "--draws", "2"]
    plain = run(*DECIDE, "--state", str(state), *arguments)
    first, best, *rest = plain.stdout.splitlines()
    assert first.startswith("cell (confidence 0.99") or first == "cell (confidence 1.000)"
    assert best.startswith("  6  1.000 ± 0.000") and len(rest) == 2
    assert "1 forward pass, seed 1" in plain.stderr
    found = json.loads(run(*DECIDE, "--state", STATE, *arguments, "--json").stdout)
    assert found["answers"]["cell"]["choice"] == "6" and found["canvases"] == [48]
    assert found["usage"]["output_tokens"] == 1 and found["usage"]["input_tokens"] > 40
    piped = run(*DECIDE, "--state", "-", *arguments, "--json", input=STATE)
    assert json.loads(piped.stdout)["answers"] == found["answers"]


def test_decide_reads_json_states_and_refuses_deep_ones():
    questions = [
        "--questions",
        '{"n": {"type": "noul"}, "s": {"type": "score", "criteria": [1, 2]}}',
    ]
    given = json.loads(run(*DECIDE, "--state", '{"a":  [1]}', *questions, "--json").stdout)
    spaced = json.loads(run(*DECIDE, "--state", '{ "a": [1 ] }', *questions, "--json").stdout)
    assert given == spaced and given["answers"]["s"]["legend"] == {"0": 1, "1": 2}
    deep = run(*DECIDE, "--state", "[" * 99_999 + "]" * 99_999, *questions, code=2)
    assert deep.stderr == "error: the state is nested more than 64 levels deep; flatten it.\n"


def test_decide_calibrate_writes_a_fit_and_a_plot(tmp_path):
    data, save = tmp_path / "data.jsonl", tmp_path / "c.json"
    lines = [
        {"state": f"case {n}", "questions": {"q": {"type": "noul"}}, "answers": {"q": n % 3 > 0}}
        for n in range(21)
    ]
    data.write_text("\n".join(map(json.dumps, lines)))
    shown = run("decide", "calibrate", "--data", str(data), "--save", str(save), "--model", "demo")
    assert shown.stdout.splitlines()[1].startswith("noul         21 ")
    assert (tmp_path / "c.svg").read_text().startswith("<svg")
    arguments = ["--state", "x", "--questions", '{"q": {"type": "noul"}}', "--json"]
    plain = json.loads(run(*DECIDE, *arguments).stdout)["answers"]["q"]["noul"]
    fitted = run(*DECIDE, *arguments, "--calibration", str(save), "--draws", "2")
    assert json.loads(fitted.stdout)["answers"]["q"]["noul"] != pytest.approx(plain, abs=1e-4)
    assert "made with another setting of draws" in fitted.stderr


@pytest.mark.parametrize(
    "constraint",
    [["--regex", "v[0-9]+"], ["--choices", "yes", "no"], ["--json-schema", "SCHEMA"]],
)
def test_generate_is_always_valid(tmp_path, constraint):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": [1, "a"]}, "maxItems": 3}')
    constraint = [str(schema) if each == "SCHEMA" else each for each in constraint]
    arguments = ["generate", "-p", "x", *QUICK, "-m", "40", *constraint]
    plain = run(*arguments).stdout
    found = json.loads(run(*arguments, "--json").stdout)
    assert plain == found["text"] + "\n"
    assert found["passes"] == sum(found["denoising_steps"])
    if "--regex" in constraint:
        assert found["text"][0] == "v" and found["text"][1:].isdecimal()
    elif "--choices" in constraint:
        assert found["text"] in ("yes", "no")
    else:
        assert all(item in (1, "a") for item in json.loads(found["text"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infill", "--text", "x"], "the text has no hole; mark one with [[?]]."),
        (
            ["infill", "--text", "x", "file"],
            "give --text or a file, not both.",
        ),
        (
            ["infill", "--text", "[[?]]", "--lengths", "2,x"],
            "--lengths '2,x' must be numbers from 1, such as 4 or 2,4,8.",
        ),
        (["fill", "x"], "the template has no slot; write one as {name}."),
        (
            ["edit", "none.txt", "--range", "x", "-i", "y"],
            "--range 'x' must be lines such as 10:20 or 7.",
        ),
        (
            ["decide", "--state", "x", "--questions", '{"q": {"type": "noul"}, "q": {}}'],
            "question 'q' is asked twice; give each a name of its own.",
        ),
        (
            ["decide", "--questions", "{}"],
            "no state: give a file, text or JSON with --state; - reads stdin.",
        ),
        (
            ["decide", "--state", "x", "--questions", "none.json"],
            "--questions 'none.json' is neither a file nor JSON; check the path.",
        ),
        (
            ["decide", "--state", "x", "--questions", "{"],
            "--questions is not JSON: line 1, column 2: Expecting property name enclosed in double "
            "quotes.",
        ),
        (
            ["generate", "-p", "x", "yes"],
            "'yes' is no option; give the prompt with --prompt, or choices behind --choices.",
        ),
        (
            ["generate", "-p", "x", "--choices"],
            "--choices needs answers behind it, such as: --choices yes no unsure.",
        ),
        (
            ["generate", "-p", "x", "--regex", "a", "--choices", "b"],
            "give only one of --json-schema, --regex and --choices.",
        ),
        (
            ["generate", "-p", "x", "--regex", "a", "--validate", "3"],
            "--validate is for --json-schema: give both, or neither.",
        ),
        (
            ["edit", "none.txt", "--range", "1", "-i", "y", "--force"],
            "--force is for --write: give both, or neither.",
        ),
        (
            ["infill", "--text", "[[?]]", "--raw", "--system-prompt", "x"],
            "--system-prompt needs a chat template, and --raw uses none: drop one.",
        ),
    ],
)
def test_usage_errors_are_one_line(arguments, message):
    result = run(*arguments, "--model", "demo", code=2)
    assert result.stderr == f"error: {message}\n"
    assert result.stdout == ""


def test_a_missing_file_and_a_damaged_schema(tmp_path):
    missing = tmp_path / "none"
    result = run("edit", str(missing), "--range", "1", "-i", "x", "--model", "demo", code=1)
    assert (
        result.stderr
        == f"error: {missing} cannot be read: No such file or directory; check the path.\n"
    )
    schema = tmp_path / "schema.json"
    schema.write_text("{")
    result = run("generate", "-p", "x", "--json-schema", str(schema), code=2)
    assert result.stderr.startswith(f"error: {schema} is not JSON: line 1, column 2: ")


HOLE = GRID.replace("461532", "[[?]]")
SETTLING = {
    "infill": ("infill", "--text", HOLE, "--lengths", "6"),
    "edit": ("edit", "FILE", "-i", "c", "--range", "2", "--lengths", "6"),
    "fill": ("fill", HOLE.replace("[[?]]", "{x:digits}"), "--lengths", "6"),
    "a pattern": ("fill", HOLE.replace("[[?]]", "{x:/[1-6]{6}/}"), "--lengths", "6"),
    "generate": ("generate",),
    "structured": ("generate", "--regex", "[1-6]{6}"),
}


@pytest.mark.parametrize("name", SETTLING)
def test_a_canvas_that_did_not_settle_is_said(name, tmp_path):
    """It has one step, and at least two are needed to see that nothing changes any more."""
    path = tmp_path / "grid"
    path.write_text(GRID)
    command = [str(path) if each == "FILE" else each for each in SETTLING[name]]
    for steps, settled in (("1", False), ("48", True)):
        arguments = [*command, *BARE, "--steps", steps]
        assert ("not every canvas settled" in run(*arguments).stderr) == (not settled)
        assert json.loads(run(*arguments, "--json").stdout)["converged"] is settled

"""A survey from its plan to its table: what it says, what fails in it, and what it keeps quiet."""

from __future__ import annotations

import json
import math
import subprocess

import pytest
from markdown_it import MarkdownIt

from mlx_diffgemma import cpu
from mlx_diffgemma.bench.device import Device
from mlx_diffgemma.errors import MemoryShortageError
from mlx_diffgemma.survey import facts, run, subject
from mlx_diffgemma.survey.pieces import PARTS, Piece, Pieces
from mlx_diffgemma.survey.subject import FULL, SMALL, Subject
from mlx_diffgemma.survey.table import Row, as_markdown

DEVICE = Device("a device", "m", "bfloat16", operations=1e12, bandwidth=1e11)


def cells(table: str) -> list[list[str]]:
    """The rows of a table as a reader of Markdown sees them, without the head."""
    tokens = MarkdownIt("commonmark").enable("table").parse(table)
    assert tokens[0].type == "table_open" and tokens[-1].type == "table_close"
    assert sum(token.type == "table_open" for token in tokens) == 1
    found, row = [], []
    for token, inside in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "td_open":
            row.append("".join(each.content for each in inside.children))
        elif token.type == "tr_close":
            found.append(row)
            row = []
    return found[1:]


def piece(name, rows=(), raises=None, seconds=1.0):
    def go():
        yield from rows
        if raises is not None:
            raise raises

    return Piece(name, f"all of {name}", go, lambda: seconds)


@pytest.fixture
def made_of(monkeypatch):
    """`made_of(pieces...)` -> a survey of these."""

    def make(*pieces):
        monkeypatch.setattr(run, "Pieces", lambda subject: iter(pieces))
        return run.Survey(Subject(SMALL, None, ""), [each.part for each in pieces])

    return make


def test_what_fails_is_one_row_and_the_others_go_on(made_of):
    row = Row("a", "x", "1 ms")
    survey = made_of(
        piece("a", [row], RuntimeError("no\nkernel | <b> here")),
        piece("b", raises=MemoryShortageError("1.0 GB are missing.")),
        piece("c", [Row("c", "y", "2 ms", "fine", ok=True)]),
    )
    survey.prepare()
    list(survey.run())
    assert cells(survey.as_markdown()) == [
        ["a", "x", "1 ms", ""],
        ["", "all of a", "failed", "RuntimeError: no kernel | <b> here"],
        ["b", "all of b", "failed", "MemoryShortageError: 1.0 GB are missing."],
        ["c", "y", "2 ms", "fine"],
    ]
    found = json.loads(survey.as_json())
    assert found["complete"] and [each["ok"] for each in found["rows"]] == [
        None, False, False, True,
    ]  # fmt: skip


def test_what_is_left_is_guessed_by_how_the_guesses_held(made_of, monkeypatch):
    clock = iter([0.0, 9.0, 9.0, 19.0, 19.0, 20.0])
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(clock))
    survey = made_of(piece("a"), piece("b", seconds=2.0), piece("c", seconds=7.0))
    assert survey.prepare() == 10
    left = [(begun.number, begun.count, begun.seconds_left) for begun in survey.run()]
    assert left == [(1, 3, 10), (2, 3, 9 * 10 / 2), (3, 3, 7 * 20 / 4)]


def test_a_guess_that_fails_is_no_end(made_of):
    bad = Piece("a", "b", lambda: [], lambda: 1 // 0)
    survey = made_of(bad, piece("c", seconds=3.0))
    assert survey.prepare() == 3


def test_a_table_takes_any_text():
    rows = [Row("p|p", "a\nb", "\\|", "`x | y` <img src=x>"), Row("q", "*", "", "", ok=False)]
    assert cells(as_markdown(rows))[0] == ["p|p", "a b", "\\|", "x | y <img src=x>"]
    assert len(cells(as_markdown(rows))) == 2


def test_the_plan_for_a_gpu_needs_no_weights(monkeypatch):
    monkeypatch.setattr(cpu, "is_device", lambda: False)
    monkeypatch.setattr(subject, "available_memory", lambda: None)
    monkeypatch.setattr(subject, "measure_device", lambda dtype: DEVICE)
    plan = Subject(FULL, None, "")
    plan.__dict__ |= {"slowness": 2.0, "demo_seconds": 1.0}
    guesses = {each.part: each.seconds() for each in Pieces(plan)}
    assert tuple(guesses) == tuple(PARTS)
    assert all(map(math.isfinite, guesses.values())) and guesses["profiles"] > 10
    assert plan.bench.config.text.num_hidden_layers == 6
    assert plan.bench.config.text.hidden_size == 2816
    names = [each.name for each in plan.bench.vocabulary()[:4]]
    assert names == [
        "likely tokens, chunks of 8192", "likely tokens, chunks of 32768",
        "likely tokens, one product", "likely tokens, a CPU's tiles",
    ]  # fmt: skip


@pytest.mark.parametrize(("room", "layers"), [(7e9, 6), (5e9, 4), (3e9, 2), (1e9, None)])
def test_random_weights_fit(monkeypatch, room, layers):
    monkeypatch.setattr(cpu, "is_device", lambda: False)
    monkeypatch.setattr(subject, "available_memory", lambda: int(room))
    plan = Subject(FULL, None, "")
    if layers is None:
        with pytest.raises(MemoryShortageError, match=r"1\.0 GB are available"):
            _ = plan.bench
    else:
        assert plan.bench.config.text.num_hidden_layers == layers
        assert plan.bench.weight_bytes <= 0.6 * room


def test_names_and_paths_are_hidden(monkeypatch, tmp_path):
    monkeypatch.setenv("USER", "kerstin")
    monkeypatch.setenv("HOME", "/Users/Kerstin Ott")
    monkeypatch.setattr(facts.socket, "gethostname", lambda: "otts-mac.local")
    monkeypatch.chdir(tmp_path)
    said = facts.without_names(
        f"Kerstin's otts-mac has no '/Users/kerstin/my models/x', /opt/a/b.so:3 nor {tmp_path}/y; "
        "/Users/Kerstin Ott/z, C:\\kerstin\\x and ~/kerstin\nbut 3 tokens, kerstinish"
    )
    assert said == "…'s … has no …, …:3 nor …; …, … and … but 3 tokens, kerstinish"


def test_a_model_is_named_where_everybody_knows_it(tmp_path):
    known = "mlx-community/diffusiongemma-26B-A4B-it-4bit"
    assert facts.name_of(known) == known and facts.name_of("demo") == "demo"
    assert facts.name_of(str(tmp_path)) == "a model in a folder"
    assert facts.name_of("kerstin/secret") == "a model of another repository"


def test_a_mac_is_asked_for_no_more_than_its_kind(monkeypatch):
    answers = {
        ("sysctl", "-n", "hw.model"): "Mac15,9\n",
        ("sysctl", "-n", "iogpu.wired_limit_mb"): "0\n",
        ("ioreg", "-rc", "AGXAccelerator"): '"IOPlatformSerialNumber" = "C02XY"\n'
        '"gpu-core-count" = 40\n"IOUser" = "kerstin"\n',
    }

    def answer(command, **options):
        return subprocess.CompletedProcess(command, 0, answers[command], "")

    monkeypatch.setattr(facts.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(facts.platform, "mac_ver", lambda: ("15.7", ("", "", ""), "arm64"))
    monkeypatch.setattr(facts.subprocess, "run", answer)
    found = facts.machine_facts()
    assert (found["model"], found["GPU cores"]) == ("Mac15,9", "40")
    assert found["system"].startswith("macOS 15.7") and found["iogpu.wired_limit_mb"] == "0"
    assert not any("C02XY" in said or "kerstin" in said for said in found.values())

"""`mlx-diffgemma report` as it is used: whole on a small model, interrupted, and into a file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mlx_diffgemma
from mlx_diffgemma.bench.device import Device
from mlx_diffgemma.cli.main import app
from mlx_diffgemma.survey import facts, pieces, run, subject
from mlx_diffgemma.survey.pieces import PARTS, Piece
from mlx_diffgemma.survey.table import Row

PLANTED = "planted"


@pytest.fixture
def small(monkeypatch):
    """So little is measured that it takes a CPU a few seconds."""
    extent = replace(subject.SMALL, profiles=("balanced",), puzzles=1, max_tokens=48)
    monkeypatch.setattr(subject, "SMALL", extent)
    device = Device("a device", "m", "float32", operations=1e11, bandwidth=1e10)
    monkeypatch.setattr(subject, "measure_device", lambda dtype: device)
    # Other tests put the emulator of kernels on Python's path.
    monkeypatch.setattr("mlx_diffgemma.cli.report._EMULATOR", "no_emulator")


def report(*arguments):
    return CliRunner().invoke(app, ["report", *arguments], prog_name="mlx-diffgemma")


def test_it_says_what_it_will_do_does_it_and_prints_one_table(small):
    result = report()
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:2] == ["| part | what | result | beside |", "| --- | --- | --- | --- |"]
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
    parts = [part for line in lines[2:] if (part := line.split(" | ")[0].strip("| "))]
    assert parts == list(PARTS)
    assert "**" not in result.stdout and "1 of 1 solved" in result.stdout
    assert "24 of 24 agree" in result.stdout and "there is no Metal GPU" in result.stdout
    for what in ("whole, 16 positions", "chunks of 4096", "one product", "compiled", "counted as"):
        assert what in result.stdout
    said = result.stderr.splitlines()
    assert said[0] == "This checks and measures:"
    takes = next(n for n, line in enumerate(said) if line.startswith("It takes about "))
    count = sum("[" in line for line in said)
    first = next(n for n, line in enumerate(said) if line.startswith(f"[1/{count}] machine"))
    assert len(PARTS) < takes < first and said[first].endswith(" left")
    assert "Nothing failed." in said


def test_nothing_in_it_names_anybody(small, monkeypatch, tmp_path):
    home = tmp_path / f"{PLANTED}-home"
    model = home / f"{PLANTED}-model"
    shutil.copytree(Path(mlx_diffgemma.__file__).parent / "demo" / "checkpoint", model)
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, f"{PLANTED}-user")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HOSTNAME", f"{PLANTED}-host")
    monkeypatch.setattr(facts.socket, "gethostname", lambda: f"{PLANTED}-host.local")
    monkeypatch.setattr(facts.platform, "node", lambda: f"{PLANTED}-host.local")
    monkeypatch.chdir(home)

    def fails(*arguments, **options):
        raise OSError(f"{PLANTED}-user at {PLANTED}-host: no '{model}', no {home}/x y")

    monkeypatch.setattr(pieces, "measure_profiles", fails)
    target = tmp_path / "report.json"
    result = report("--model", str(model), "--json", "--output", str(target))
    assert result.exit_code == 0 and result.stdout == ""
    text = target.read_text()
    assert PLANTED not in text and str(tmp_path) not in text and PLANTED not in result.stderr
    found = json.loads(text)
    assert found["complete"] and {row["part"] for row in found["rows"]} == set(PARTS) - {"layers"}
    wrong = [(row["part"], row["result"]) for row in found["rows"] if row["ok"] is False]
    assert wrong == [("answers", "failed")]
    assert "1 row is wrong." in result.stderr
    assert any(row["result"] == "a model in a folder" for row in found["rows"])


@pytest.mark.parametrize("to_file", [False, True])
def test_ctrl_c_keeps_what_was_found(monkeypatch, tmp_path, to_file):
    target = tmp_path / "found.md"

    def interrupted():
        if to_file:  # also where the process ends without a word
            assert target.read_text().splitlines()[2:] == [
                "| a | x | 1 ms |  |",
                "| rest | from kernels, all on | not run | it was ended before |",
            ]
        raise KeyboardInterrupt

    given = [
        Piece("machine", "x", lambda: [Row("a", "x", "1 ms")], lambda: 1.0),
        Piece("kernels", "all", interrupted, lambda: 1.0),
        Piece("memory", "never", lambda: 1 // 0, lambda: 1.0),
    ]
    monkeypatch.setattr(run, "Pieces", lambda subject: iter(given))
    result = report(*(["--output", str(target)] if to_file else []))
    assert result.exit_code == 130
    text = target.read_text() if to_file else result.stdout
    assert text.splitlines()[2:] == [
        "| a | x | 1 ms |  |",
        "| rest | from kernels, all on | not run | it was ended before |",
    ]


def test_what_cannot_be_reported_is_said_before_anything_runs(tmp_path):
    for arguments, says in (
        (["--part", "engine"], "known are machine, kernels"),
        (["--output", str(tmp_path / "none" / "x.md")], "cannot be written"),
        (["--model", str(tmp_path / "none")], "no such folder"),
    ):
        result = report(*arguments)
        assert result.exit_code in (1, 2) and says in result.stderr
        assert "Measuring" not in result.stderr and result.stdout == ""

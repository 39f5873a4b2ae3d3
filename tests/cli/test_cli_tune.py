"""`mlx-diffgemma tune` with the model that comes with the program: a profile that `generate` reads
and another model refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from editing.small_models import tiny
from typer.testing import CliRunner

from mlx_diffgemma.cli.main import app
from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.fitting import diffusion_config
from mlx_diffgemma.tune.candidates import CANDIDATES


@pytest.fixture
def puzzles(tmp_path):
    rng, lines = np.random.default_rng(6), []
    for _ in range(4):
        puzzle = sudoku.make_puzzle(rng)
        lines.append({"prompt": sudoku.prompt([puzzle]), "answer": puzzle.solution})
    path = tmp_path / "puzzles.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_profile_is_found_written_read_and_refused_for_another_model(
    puzzles, tmp_path, monkeypatch
):
    some = {name: CANDIDATES[name] for name in ("exact", "swift", "stop early")}
    monkeypatch.setattr("mlx_diffgemma.tune.candidates.CANDIDATES", some)
    # What the machine can do is measured with large products, which take a CPU seconds.
    monkeypatch.setattr("mlx_diffgemma.tune.run.floor_seconds", lambda model: 0.001)
    profile = tmp_path / "mine.json"
    arguments = ["tune", "--model", "demo", "--data", str(puzzles), "-m", "64"]
    first = CliRunner(env={"COLUMNS": "120"}).invoke(app, [*arguments, "--profile", str(profile)])
    assert first.exit_code == 0, first.output
    assert "chosen" in first.stdout and "4" in first.stdout
    assert "left" in first.stderr and "on this machine" in first.stderr
    made = json.loads(profile.read_text())
    measured = made["measured"]
    assert measured["chosen"]["mark"] == measured["reference"]["mark"]
    assert measured["chosen"]["passes"] < measured["reference"]["passes"]
    assert "<circle" in profile.with_suffix(".svg").read_text()
    answers = profile.with_suffix(".answers.jsonl").read_bytes()

    again = CliRunner().invoke(app, [*arguments, "--profile", str(profile), "--json"])
    assert json.loads(again.stdout)["chosen"] == measured["chosen"]
    assert profile.with_suffix(".answers.jsonl").read_bytes() == answers  # nothing was asked again

    prompt = json.loads(puzzles.read_text().splitlines()[0])["prompt"].replace("\n", "\\n")
    asked = ["generate", "--model", "demo", "-p", prompt, "--seed", "0", "--json"]
    told = json.loads(CliRunner().invoke(app, [*asked, "--profile", str(profile)]).stdout)
    assert told["text"] and sum(told["denoising_steps"]) <= measured["reference"]["passes"] + 3
    with pytest.raises(UsageError, match="another model"):
        diffusion_config(tiny(12)[0], str(profile))


def test_what_cannot_be_tuned_is_said_before_anything_is_loaded(tmp_path):
    for arguments, says in (
        (["--profile", "mine.txt"], ".json"),
        (["--data", str(tmp_path / "none")], "none"),
        (["--check", "sql:x"], "regex"),
        (["--seeds", "1"], "at least 2"),
    ):
        result = CliRunner().invoke(app, ["tune", "--model", "demo", *arguments])
        assert result.exit_code in (1, 2) and says in result.stderr

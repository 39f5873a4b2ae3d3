"""The command: its errors, its JSON, its table, and OpenBLAS before mlx."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
from typer.testing import CliRunner

from mlx_diffgemma.bench.device import Device
from mlx_diffgemma.bench.openblas import load_openblas
from mlx_diffgemma.cli.main import app
from mlx_diffgemma.errors import UsageError


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """Its peaks, which take seconds to measure."""
    known = Device("d", "m", "float32", operations=1e9, bandwidth=1e9)
    monkeypatch.setattr("mlx_diffgemma.bench.run.measure_device", lambda *_: known)


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments], env={"MLX_DIFFGEMMA_OPENBLAS": ""})


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--prefill 5,x", "--prefill '5,x' is no list of lengths; write 512,2048."),
        ("--prefill 0", "--prefill '0' is no list of lengths; write 512,2048."),
        ("--repeats 0", "--repeats must be at least 1, not 0."),
        ("--model demo --random", "--model and --random exclude each other: drop one."),
        (
            "--model demo --bits 4",
            "--like, --layers, --bits, --recipe and --dtype go with --random: add it, or drop "
            "them.",
        ),
        ("--against x", "--against 'x' is unknown; known are mlx-vlm and mlx-lm MODEL."),
        ("--against mlx-lm", "a model is missing; write --against mlx-lm MODEL."),
        ("twin", "--against mlx-lm is missing; write --against mlx-lm MODEL."),
        ("--profile x", "unknown profile 'x'; known are "),
        ("--vocabulary-pass x", "--vocabulary-pass 'x' is unknown; known are "),
        ("--random --layers 31", "--layers must be between 1 and 30, not 31."),
        ("--random --bits 4 --recipe 4bit", "--bits and --recipe both say how to quantize: "
         "drop one."),
        ("--openblas x", "OpenBLAS must be loaded before mlx is; start a process of its own."),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said_in_one_line(arguments, line):
    result = run(*arguments.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {line}")
    assert result.stderr.count("\n") == 1


def test_a_missing_rival_is_said_before_any_weight_is_drawn(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("mlx_diffgemma.bench.rival.version", missing)
    result = run("--random", "--against", "mlx-vlm")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        'error: --against mlx-vlm: it is not installed; pip install "mlx-vlm==0.7.10".\n'
    )


def test_it_measures_random_weights_in_a_folder_s_shapes(tmp_path, tiny_config):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    arguments = (
        f"--random --like {tmp_path} --prefill 5 --prefix 3 --repeats 1 --canvas-length 4"
    ).split()
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["model"]["random"] and found["model"]["format"] == "unquantized"
    assert found["step"]["parts"][0]["name"] == "layers"
    assert found["prefill"][0]["length"] == 5
    shown = run(*arguments)
    assert shown.exit_code == 0 and "One denoising step" in shown.stdout


def test_a_checkpoint_answers_under_each_profile(monkeypatch):
    monkeypatch.setattr("mlx_diffgemma.bench.run.PROFILES", ["fast"])
    arguments = "--model demo --prefill 5 --prefix 3 --repeats 1 -p sudoku --max-tokens 8 --json"
    result = run(*arguments.split())
    assert result.exit_code == 0, result.stderr
    (speed,) = json.loads(result.stdout)["speeds"]
    assert speed["profile"] == "fast" and 0 < speed["steps"] <= 24
    assert 0 < speed["tokens"] <= 8 and speed["tokens_per_second"] > 0


def test_help_is_quick_and_names_the_options():
    program = (
        "import sys\n"
        "sys.argv = ['mlx-diffgemma', 'bench', '--help']\n"
        "from mlx_diffgemma.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'mlx', 'mlx_lm', 'numpy', 'rich.live'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for option in ("--random", "--like", "--against", "--openblas", "--json"):
        assert option in result.stdout


def test_openblas_comes_before_mlx(tmp_path):
    with pytest.raises(UsageError, match="before mlx is"):
        load_openblas(str(tmp_path))
    # In a process of its own: no file, and a library that is none.
    for path, line in (
        (tmp_path / "no", "there is no file"),
        (tmp_path / "text", "is no OpenBLAS"),
    ):
        (tmp_path / "text").write_text("no library")
        program = f"from mlx_diffgemma.bench.openblas import *; load_openblas({str(path)!r})"
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert line in result.stderr.splitlines()[-1]

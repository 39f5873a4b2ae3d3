from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from checkpoints import ROOT, contents, convert_to, plan_of, run
from typer.testing import CliRunner

from mlx_diffgemma.checkpoint.quantization import RECIPES
from mlx_diffgemma_convert.cli import app


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(part) for part in arguments])


def last_line(result) -> str:
    lines = result.stderr.strip().splitlines()
    assert "Traceback" not in result.stderr
    return lines[-1] if lines else ""


def test_default_recipe_and_json(tiny_source, tiny_4bit, tmp_path):
    result = invoke("--model", tiny_source, "--mlx-path", tmp_path / "out", "-q", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["recipe"] == "4bit" and found["target"] == str(tmp_path / "out")
    assert found["stored_bytes"] == plan_of(tiny_source).stored_bytes()
    assert contents(tmp_path / "out") == contents(tiny_4bit)


def test_flags_of_mlx_lm(tiny_source, tmp_path):
    arguments = ("--hf-path", tiny_source, "-q", "--q-bits", 6, "--q-group-size", 32, "--quiet")
    result = invoke(*arguments, "--mlx-path", tmp_path / "out", "--dtype", "float16")
    assert (result.exit_code, result.stderr, result.stdout) == (0, "", "")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 6, "mode": "affine"}
    assert config["dtype"] == config["text_config"]["dtype"] == "float16"


def test_overrides_say_what_they_matched(tiny_source, tmp_path):
    result = invoke(
        "--model", tiny_source, "--mlx-path", tmp_path / "out", "--recipe", "4bit",
        "--set", "experts=3bit/64", "--set", "layers[0:2].attn=none",
    )  # fmt: skip
    assert result.exit_code == 0
    lines = result.stderr.splitlines()
    assert lines[0].startswith("--set 'experts=3bit/64': 6 module(s): model.decoder.layers.0.exp")
    assert lines[1].startswith("--set 'layers[0:2].attn=none': 8 module(s): ")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert config["model.decoder.layers.1.self_attn.q_proj"] is False
    assert config["model.decoder.layers.1.experts.down_proj"]["bits"] == 3


def test_plan_writes_nothing(tiny_source, tmp_path):
    result = invoke("--model", tiny_source, "--mlx-path", tmp_path / "out", "-q", "--plan")
    assert result.exit_code == 0
    for part in (
        "experts",
        "4bit/64",
        "294,912",
        "total",
        "expected peak memory",
        "Fits Macs with",
    ):
        assert part in result.stdout
    found = json.loads(invoke("--model", tiny_source, "-q", "--plan", "--json").stdout)
    assert sum(row["nbytes"] for row in found["modules"]) == found["stored_bytes"]
    assert sum(row["parameters"] for row in found["modules"]) == found["source_bytes"] / 2
    assert list(tmp_path.iterdir()) == []


def test_recipe_list():
    result = invoke("--recipe", "list")
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(RECIPES)


def test_upload_can_be_rehearsed(tiny_source, tmp_path):
    result = invoke(
        "--model", tiny_source, "--mlx-path", tmp_path / "out", "-q", "--json",
        "--upload-repo", "me/tiny-4bit", "--dry-run",
    )  # fmt: skip
    found = json.loads(result.stdout)["upload"]
    assert found["repository"] == "me/tiny-4bit" and found["dry_run"]
    files = contents(tmp_path / "out")
    assert found["files"] == {name: len(content) for name, content in files.items()}
    again = invoke("upload", tmp_path / "out", "--upload-repo", "me/tiny-4bit", "--dry-run")
    assert again.stdout.startswith("Would upload ") and "README.md" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "error: say what to convert: --model with a folder or a repository."),
        (["--model", "no-such-folder"], 1, "error: no-such-folder: no such folder; give a folder"),
        (["--recipe", "5bit"], 2, "error: recipe '5bit' is unknown; known are 3bit, 4bit"),
        (["--q-bits", "7"], 2, "error: affine has no bits 7; mlx packs 1, 2, 3, 4, 5, 6, 8."),
        (["--q-bits", "4", "--recipe", "4bit"], 2, "error: --q-bits and --recipe exclude each"),
        (["--q-mode", "int4"], 2, "error: quantization mode 'int4' is unknown; known are affine"),
        (["--q-bits", "4", "--q-group-size", "128"], 2, "a group size of 128 does not divide its"),
        (["--dtype", "int8"], 2, "error: --dtype int8 is unknown; known are bfloat16"),
        (["--set", "experts"], 2, "error: 'experts' is no rule; write it as 'experts=3bit/64'."),
        (["--set", "lm_head=4bit"], 2, "error: --set 'lm_head=4bit/64' matches no module; known"),
        (["--dequantize", "-q"], 2, "error: --dequantize takes no recipe and no quantization"),
        (["--to-hf", "--recipe", "4bit"], 2, "error: --to-hf takes no recipe and no quantization"),
        (["--dry-run"], 2, "error: --dry-run is about uploading; name the repository"),
        (["--revision", "main"], 2, "error: --revision is for repositories, and"),
        (["--delete-source-shards"], 2, "error: --delete-source-shards is for repositories, and"),
    ],
)
def test_wrong_use_is_one_line(tiny_source, tmp_path, arguments, code, message):
    if arguments and "--model" not in arguments:
        arguments = ["--model", tiny_source, *arguments]
    result = invoke("--mlx-path", tmp_path / "out", *arguments)
    assert result.exit_code == code
    assert message in last_line(result)
    assert result.stdout == ""
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a folder", "is a folder, where a file is needed; fetch the file again."),
        ("[1]", "is damaged (it holds a list, not an object); fetch the file again."),
        ('{"eos_token_id": [1, 99999]}', "'eos_token_id' is 99999, and ids go from 0 to 191."),
    ],
)
def test_a_damaged_generation_config_is_said_before_any_work(
    tiny_source, tmp_path, content, message
):
    """It was copied as it was, so that the result could not be loaded, or left out unsaid."""
    source = shutil.copytree(tiny_source, tmp_path / "source")
    generation = source / "generation_config.json"
    generation.unlink()
    if content == "a folder":
        generation.mkdir()
    else:
        generation.write_text(content)
    result = invoke("--model", source, "--mlx-path", tmp_path / "out", "-q")
    assert result.exit_code == 1
    assert last_line(result).endswith(message) and generation.name in last_line(result)
    assert not (tmp_path / "out").exists()


def test_targets_that_exist_are_left_alone(tiny_source, tmp_path):
    copy = shutil.copytree(tiny_source, tmp_path / "copy")
    before = contents(copy)
    same = invoke("--model", copy, "--mlx-path", tmp_path / "." / "copy")
    assert same.exit_code == 2 and "is the source itself; choose another" in last_line(same)
    other = invoke("--model", tiny_source, "--mlx-path", copy)
    assert other.exit_code == 2
    assert last_line(other) == (
        f"error: {copy} exists already; remove it or choose another --mlx-path."
    )
    assert contents(copy) == before


def test_a_target_that_cannot_be_made_is_named(tiny_source, tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("--model", tiny_source, "--mlx-path", tmp_path / "file" / "out", "-q")
    assert result.exit_code == 2
    assert last_line(result) == (
        f"error: {tmp_path / 'file' / 'out.partial'} cannot be made (Not a directory); choose "
        "another --mlx-path."
    )


@pytest.mark.parametrize(
    ("arguments", "warned"),
    [(("--recipe", "fp16"), True), (("--dtype", "float16", "-q"), True), (("-q",), False)],
)
def test_float16_is_warned_of(tiny_source, tmp_path, arguments, warned):
    result = invoke("--model", tiny_source, "--mlx-path", tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    assert ("warning: float16 overflows on activations" in result.stderr) == warned


def test_no_room_is_said_with_the_numbers(tiny_source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1000))
    result = invoke("--model", tiny_source, "--mlx-path", tmp_path / "out", "-q")
    assert result.exit_code == 1
    assert "has 1.0 kB free, the conversion needs 0.7 MB; free some" in last_line(result)


def test_debug_shows_the_traceback(tiny_source):
    result = run("--model", tiny_source, "--recipe", "5bit", "--debug")
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['x', '--help']\n"
        "try:\n import mlx_diffgemma_convert.__main__\n"
        "except SystemExit: pass\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'torch', 'numpy', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "--recipe" in result.stdout
    assert result.stderr.strip() == "[]"


def test_ctrl_c_ends_with_130_and_leaves_what_can_be_gone_on_with(
    tiny_source, tiny_4bit, tmp_path, monkeypatch
):
    from mlx_diffgemma_convert import job

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "write_shard", interrupted)
        result = invoke("--model", tiny_source, "--mlx-path", tmp_path / "out", "-q", "--quiet")
    assert result.exit_code == 130 and result.stderr == ""
    convert_to(tmp_path / "out", plan_of(tiny_source))
    assert contents(tmp_path / "out") == contents(tiny_4bit)

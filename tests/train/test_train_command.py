"""`mlx-diffgemma train` as a user has it: what it writes and says, and how it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from mlx_diffgemma import load, load_model
from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.cli.main import app

QUICK = (
    "--model", "demo", "--iters", "2", "--batch-size", "2", "--steps-per-report", "1",
    "--val-batches", "1", "--learning-rate", "1e-3",
)  # fmt: skip


def run(*arguments: object):
    return CliRunner().invoke(app, ["train", *map(str, arguments)], prog_name="mlx-diffgemma")


def refused(result, *words: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.endswith(line + "\n")
    for word in words:
        assert word in line


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    record = json.dumps({"prompt": "say it", "completion": "123"})
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text(f"{record}\n" * 4)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A finished run, and what it said."""
    folder = tmp_path_factory.mktemp("trained") / "adapters"
    result = run(*QUICK, "--data", data, "--adapter-path", folder, "--test", "--eval-generate", 2)
    assert result.exit_code == 0, result.output
    return folder, result


def test_what_a_run_says(trained):
    folder, result = trained
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0] == "4 examples, 104 tokens, the longest 26; 4 held out"
    assert lines[2].startswith("training 198,656 parameters")
    reports = [line for line in lines if line.startswith("step ") and "tokens/s" in line]
    assert [line.split(" · ")[0] for line in reports] == ["step 1/2", "step 2/2"]
    for word in ("loss ", "canvas ", "encoder ", "lr ", "tokens/s", "GB", "left"):
        assert all(word in line for line in reports)
    held_out = [line for line in lines if line.startswith("step ") and "held out" in line]
    assert [line.split(" · ")[0] for line in held_out] == ["step 0/2", "step 2/2"]
    assert all("by noise 0.2: " in line and "exact answers " in line for line in held_out)
    assert any(line.startswith("test split: ") for line in lines)
    assert lines[-1] == f"mlx-diffgemma generate --model demo --adapter-path {folder} -p ..."


def test_what_a_run_writes(trained):
    folder, _ = trained
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapters.safetensors", "adapter_config.json", "history.jsonl", "loss.svg"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {
        "rank": 16, "scale": 2.0, "dropout": 0.0,
        "keys": ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj",
                 "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"],
    }  # fmt: skip
    assert (config["num_layers"], config["fine_tune_type"]) == (-1, "lora")
    assert (config["model"], config["iters"]) == ("demo", 2)
    model, _ = load("demo", adapter_path=str(folder))
    loaded = dict(tree_flatten(model.parameters()))
    stored = mx.load(str(folder / "adapters.safetensors"))
    assert stored
    for name, array in stored.items():
        assert mx.array_equal(loaded[name], array)
        assert mx.isfinite(array).all().item()
    assert any(mx.abs(array).max().item() for name, array in stored.items() if "lora_b" in name)


def test_adapters_say_which_model_they_are_for(trained):
    folder, _ = trained
    arguments = ["generate", "--adapter-path", str(folder), "-p", "say it", "--json"]
    result = CliRunner().invoke(app, [*arguments, "-m", "8", "--steps", "1"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == "demo"


def test_a_finished_run_is_not_written_over_but_goes_on(trained, data):
    folder, _ = trained
    refused(run(*QUICK, "--data", data, "--adapter-path", folder), "holds a run already")
    result = run("--resume", "--adapter-path", folder, "--iters", 3)
    assert result.exit_code == 0, result.output
    assert "step 3/3" in result.stderr
    assert "step 2/3" not in result.stderr
    assert "exact answers" in result.stderr  # --eval-generate of the first sitting
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["iters"], config["batch_size"]) == (3, 2)


def test_a_run_goes_on_only_with_its_own_base(trained, tmp_path):
    folder, _ = trained
    copy = tmp_path / "adapters"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "fingerprint": "0-0-0"}))
    refused(run("--resume", "--adapter-path", copy, "--iters", 9), "another base model")


def test_settings_from_a_file(data, tmp_path):
    """In mlx-lm's form; the command line wins."""
    (tmp_path / "run.yaml").write_text(
        f"""\
model: demo
train: true
data: {data}
adapter_path: {tmp_path / "out"}
iters: 50
batch_size: 2
num_layers: 2
learning_rate: 1e-5
optimizer: adam
optimizer_config: {{adam: {{betas: [0.8, 0.9]}}, adamw: {{}}}}
lora_parameters: {{rank: 4, scale: 10.0, dropout: 0.0, keys: [self_attn.q_proj]}}
lr_schedule: {{name: cosine_decay, warmup: 1, arguments: [1e-4, 50, 1e-5]}}
steps_per_eval: 0
"""
    )
    result = run("-c", tmp_path / "run.yaml", "--iters", 1, "--rank", 2)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {
        "rank": 2, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.q_proj"],
    }  # fmt: skip
    assert (config["iters"], config["num_layers"], config["warmup"]) == (1, 2, 1)
    assert (config["learning_rate"], config["final_learning_rate"]) == (1e-4, pytest.approx(0.1))
    assert config["optimizer_config"] == {"betas": [0.8, 0.9]}
    assert len(mx.load(str(tmp_path / "out" / "adapters.safetensors"))) == 2 * 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'"),
        ("iters: [", "run.yaml, line 2: expected"),
        ("- 1", "key: value"),
        ("lora_parameters: {rank: 8, alpha: 16}", "unknown key 'alpha' (scale is alpha / rank)"),
        ("lora_parameters: {keys: attn}", "keys must be a list"),
        ("lr_schedule: {name: step_decay, arguments: [1]}", "lr_schedule 'step_decay' is unknown"),
        ("hf_dataset: {path: x}", "hf_dataset is not supported"),
        ("iters: 0", "iters must be an integer of at least 1"),
    ],
)
def test_bad_settings_files(tmp_path, content, words):
    (tmp_path / "run.yaml").write_text(content + "\n")
    refused(run("--config", tmp_path / "run.yaml", "--data", "x"), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say what to train on: --data"),
        (["--data", "no such place"], "no such folder"),
        (["--data", "{}", "--target", "attn.w"], "target 'attn.w' matches no module"),
        (["--data", "{}", "--optimizer", "lion"], "optimizer 'lion' is unknown"),
        (["--data", "{}", "--rank", "0"], "rank must be an integer of at least 1"),
        (["--data", "{}", "--max-seq-length", "20"], "train.jsonl, line 1: prompt and response"),
        (["--data", "{}", "--report-to", "paper"], "--report-to paper: paper callback doesn't"),
        (["--data", "{}", "--resume"], "holds no run that could be resumed"),
        (["--data", "{}", "--resume-adapter-file", "x.safetensors"], "cannot be read"),
        (["--data", "{}", "--json"], "add --plan"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml cannot be read"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_line(data, tmp_path, arguments, words):
    arguments = [argument.format(data) for argument in arguments]
    folder = tmp_path / "out"
    refused(run("--model", "demo", "--iters", 1, "--adapter-path", folder, *arguments), words)
    assert not (folder / "adapters.safetensors").exists()


def test_a_training_that_does_not_fit_is_not_begun(data, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 12_000_000)
    result = run(*QUICK, "--data", data, "--adapter-path", tmp_path / "out")
    refused(result, "training demo needs about", "this machine offers 12.0 MB", "--grad-checkpoint",
            code=1)  # fmt: skip


def test_adapters_to_begin_with(trained, data, tmp_path):
    folder, _ = trained
    first = folder / "adapters.safetensors"
    out = tmp_path / "out"
    result = run(
        *QUICK, "--data", data, "--adapter-path", out, "--resume-adapter-file", first,
        "--learning-rate", "1e-12", "--iters", 1, "--steps-per-eval", 0,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    before, after = mx.load(str(first)), mx.load(str(out / "adapters.safetensors"))
    assert all(mx.allclose(before[name], after[name], atol=1e-6).item() for name in before)
    refused(
        run(*QUICK, "--data", data, "--adapter-path", tmp_path / "other", "--rank", 2,
            "--resume-adapter-file", first),
        "does not fit what is trained now",
    )  # fmt: skip


def test_without_held_out_examples(data, tmp_path):
    (tmp_path / "train.jsonl").write_bytes((data / "train.jsonl").read_bytes())
    result = run(*QUICK, "--data", tmp_path, "--adapter-path", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "no valid split: training goes without evaluation." in result.stderr
    assert "held out:" not in result.stderr
    arguments = ("--eval-generate", 2, "--adapter-path", tmp_path / "out2")
    refused(run(*QUICK, "--data", tmp_path, *arguments), "add valid.jsonl")


def test_reports_go_to_services(data, tmp_path, monkeypatch):
    from mlx_lm.tuner import callbacks

    seen = []

    class Service(callbacks.TrainingCallback):
        def __init__(self, project_name, log_dir, config, wrapped_callback) -> None:
            seen.append((project_name, config["iters"]))

        def on_train_loss_report(self, train_info) -> None:
            seen.append(train_info["iteration"])

        def on_val_loss_report(self, val_info) -> None:
            seen.append(("held out", val_info["iteration"]))

    monkeypatch.setitem(callbacks.SUPPORT_CALLBACK, "paper", Service)
    result = run(
        *QUICK, "--data", data, "--adapter-path", tmp_path / "out", "--report-to", "paper",
        "--project-name", "p",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert seen == [("p", 2), ("held out", 0), 1, 2, ("held out", 2)]


def test_ctrl_c_says_how_to_go_on(data, tmp_path):
    folder = tmp_path / "adapters"
    program = [sys.executable, "-m", "mlx_diffgemma.cli.main", "train", *QUICK, "--data", str(data),
               "--adapter-path", str(folder), "--iters", "100000", "--save-every", "1",
               "--steps-per-eval", "0"]  # fmt: skip
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 2/"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130, rest
    *_, last = rest.splitlines()
    assert last.startswith("stopped; adapters and state are saved after step ")
    assert last.endswith(f"mlx-diffgemma train --resume --adapter-path {folder}")
    assert "Traceback" not in rest
    assert (folder / "loss.svg").exists()


def test_the_plan_of_the_release():
    result = run("--plan", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    # By hand, of a sliding layer: (D + O) of q 2816 → 4096, k and v 2816 → 2048, o 4096 → 2816;
    # of a full one: q and o 2816 ↔ 8192, k 2816 → 1024; the MLP of both: 2816 ↔ 2112, three times.
    sliding = 2 * (2816 + 4096) + 2 * (2816 + 2048)
    full = 2 * (2816 + 8192) + (2816 + 1024)
    per_rank = 25 * sliding + 5 * full + 30 * 3 * (2816 + 2112)
    assert plan["trained_parameters"] == 16 * per_rank
    assert plan["bytes"]["trained"] == plan["bytes"]["gradients"] == 4 * 16 * per_rank
    assert plan["bytes"]["optimizer"] == 8 * 16 * per_rank
    assert plan["bytes"]["total"] == sum(v for k, v in plan["bytes"].items() if k != "total")
    assert 15.0e9 < plan["bytes"]["weights"] < 16.0e9
    grid = {(r["grad_checkpoint"], r["batch_size"], r["max_seq_length"]): r for r in plan["grid"]}
    assert grid[False, 4, 2048]["bytes"] == plan["bytes"]["total"]
    assert all(grid[True, b, s]["bytes"] < r["bytes"] for (c, b, s), r in grid.items() if not c)
    assert grid[True, 1, 512]["fits_gb"] == [32, 64, 128]
    assert grid[False, 8, 4096]["fits_gb_with_raised_limit"] == []
    text = run("--plan", "--rank", 8)
    assert f"{8 * per_rank:,} parameters trained" in " ".join(text.stdout.split())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--rank", "4", "--target", "experts", "--target", "self_conditioning"],
        ["--fine-tune-type", "dora", "--num-layers", "2"],
        ["--fine-tune-type", "full"],
        ["--fine-tune-type", "full", "--num-layers", "3"],
    ],
)
def test_a_plan_counts_what_would_be_trained(arguments):
    from mlx_diffgemma.train.adapt import prepare, trainable_count
    from mlx_diffgemma.train.config import LoraParameters, TrainConfig

    result = run("--model", "demo", "--plan", "--json", *arguments)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    names = [name.removeprefix("--").replace("-", "_") for name in arguments[::2]]
    given = {n: int(v) if v.isdigit() else v for n, v in zip(names, arguments[1::2], strict=True)}
    if "target" in given:
        given = {"rank": given["rank"], "keys": tuple(arguments[3::2])}
    lora = {name: given.pop(name) for name in ("rank", "keys") if name in given}
    model, _ = load_model("demo")
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    prepare(model, TrainConfig(**given, lora_parameters=LoraParameters(**lora)))
    assert plan["trained_parameters"] == trainable_count(model)
    assert plan["bytes"]["weights"] == weights

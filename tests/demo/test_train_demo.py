"""The script that trains the demo's model: sittings, and the checkpoint at the end."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from exercises.exam import Marks
from mlx_diffgemma import load
from mlx_diffgemma.train.config import TrainConfig
from mlx_diffgemma.train.gradients import learning_rate
from mlx_diffgemma_convert.verify import verify

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = {
    "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_experts": 2,
    "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"],
    "per_layer_config": {"1": {"head_dim": 64, "num_key_value_heads": 1}},
}  # fmt: skip


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script, about a model of two thin layers, which it examines but in name."""
    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("train_demo")
    shapes = tmp_path / "shapes"
    shutil.copytree(module.SHIPPED, shapes, ignore=shutil.ignore_patterns("model*"))
    config = json.loads((shapes / "config.json").read_text())
    config["text_config"] |= SMALL
    (shapes / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(module, "SHIPPED", shapes)
    monkeypatch.setattr(
        module,
        "examine",
        lambda model, tokenizer, names, count, **_: dict.fromkeys(names, Marks(8, 6, 24, 8, 328)),
    )
    monkeypatch.setattr(module.subprocess, "run", lambda command, check: None)
    return module


def run(script, monkeypatch, folder: Path, *arguments: str) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["train_demo.py", str(folder), *arguments])
    script.main()
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "adapters.safetensors"))


def test_two_sittings_are_one_and_end_in_a_checkpoint(script, tmp_path, monkeypatch):
    settings = ("--batch", "16", "--share", "one=1", "--share", "sort=1")
    usual = script.training
    monkeypatch.setattr(
        script,
        "training",
        lambda recipe: usual(recipe).override(warmup=1, save_every=2, compile=False),
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    kinds = [
        line["kind"] for line in run(script, monkeypatch, whole, "--examples", "64", *settings)
    ]
    assert kinds[-1] == "finished" and "stopped" not in kinds

    first = run(script, monkeypatch, parts, "--examples", "64", "--hours", "0", *settings)
    assert first[-1]["kind"] == "stopped" and first[-1]["examples"] == 32
    assert not (parts / "model").exists()
    last = run(script, monkeypatch, parts)  # the recipe is remembered
    assert last[-1]["kind"] == "finished" and last[-1]["examples"] == 64
    one, other = weights(whole), weights(parts)
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)

    verify(parts / "model")
    model, tokenizer = load(parts / "model")
    name = "model.decoder.layers.1.mlp.up_proj.weight"
    trained = one[name].astype(mx.bfloat16).astype(mx.float32)
    assert (model.layers[1].mlp.up_proj.weight == trained).all()
    start = load(parts / "start")[0].layers[1].mlp.up_proj.weight
    assert float(mx.abs(start - trained).max()) > 1e-3
    assert tokenizer.encode("sudoku")

    script.begin(tmp_path, 1, parts / "model")
    again = load(tmp_path / "start")[0]  # a run can begin where another ended
    assert (again.layers[1].mlp.up_proj.weight == trained).all()
    card = (parts / "model" / "README.md").read_text()
    assert "Seen: 64 examples; the mix of the last sitting was 50% one, 50% sort" in card
    assert "| one | 0.750 ±" in card and "| sort | 0.750 ±" in card


def test_the_rate_stays_and_then_falls_to_nothing():
    config = TrainConfig(learning_rate=1.0, iters=110, warmup=10, lr_schedule="linear", decay=0.3)
    rates = [learning_rate(config, step) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10:81] == [1.0] * 71
    assert rates[81:] == pytest.approx([1 - done / 30 for done in range(1, 30)])
    longer = [learning_rate(config.override(iters=200), step) for step in range(1, 81)]
    assert longer == rates[:80]  # a run can be made longer before it falls

"""`mlx-diffgemma fuse`: the checkpoint that it writes does what base and adapters do."""

from __future__ import annotations

import json
from pathlib import Path

import adapter_models as models
import mlx.core as mx
import numpy as np
import pytest
from demo_checkpoint import CHECKPOINT
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from mlx_diffgemma import load, load_model
from mlx_diffgemma.checkpoint.adapters import fingerprint, load_adapters
from mlx_diffgemma.cli.main import app
from mlx_diffgemma.train.adapt import prepare


def run(folder: Path, *arguments: object):
    """Fuse the adapters in `folder/a` into `folder/f`."""
    arguments = ("--adapter-path", folder / "a", "--save-path", folder / "f", *arguments)
    return CliRunner().invoke(app, ["fuse", *map(str, arguments)], prog_name="mlx-diffgemma")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("fuse") / "4bit"
    result = CliRunner().invoke(
        _converter(), ["--model", str(CHECKPOINT), "--mlx-path", str(target), "-q", "--quiet"]
    )
    assert result.exit_code == 0, result.output
    return target


def _converter():
    from mlx_diffgemma_convert.cli import app as converter

    return converter


def adapters_for(base: object, folder: Path, kind: str = "lora", keys=None) -> np.ndarray:
    """Adapters that look trained, saved in `folder`; the logits of base and adapters."""
    model, _ = load_model(base)
    mark = fingerprint(model)
    config = models.settings(kind, keys)
    named = prepare(model, config)
    models.train_somehow(model, 0.03)
    models.save(model, folder, config, named, mark)
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**content, "model": str(base)}))
    model.eval()
    return models.logits(model)


def difference(ours: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    ("kind", "keys"),
    [("lora", models.EVERYWHERE), ("dora", None), ("full", ("attn",)), ("full", None)],
)
def test_a_plain_base(tmp_path, kind, keys):
    expected = adapters_for("demo", tmp_path / "a", kind, keys)
    result = run(tmp_path, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert difference(models.logits(load_model(tmp_path / "f")[0]), expected) < 1e-5


def test_the_type_of_the_base_is_kept_and_everything_else_copied(tmp_path):
    expected = adapters_for("demo", tmp_path / "a")
    result = run(tmp_path, "--model", "demo")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json",
                 "chat_template.jinja"):  # fmt: skip
        assert (tmp_path / "f" / name).read_bytes() == (CHECKPOINT / name).read_bytes()
    stored = mx.load(str(tmp_path / "f" / "model.safetensors"))
    base = mx.load(str(CHECKPOINT / "model.safetensors"))
    assert {array.dtype for array in stored.values()} == {mx.bfloat16}
    assert {n.removesuffix(".weight") for n in stored} == {n.removesuffix(".weight") for n in base}
    model, _ = load(tmp_path / "f")
    difference_of_bf16 = difference(models.logits(model), expected)
    assert 0 < difference_of_bf16 < 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "f"]
    verified = CliRunner().invoke(_converter(), ["verify", str(tmp_path / "f")])
    assert verified.exit_code == 0, verified.output


def test_a_quantized_base_keeps_its_formats(tmp_path, quantized):
    adapters_for(quantized, tmp_path / "a", keys=models.EVERYWHERE)
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    ours, theirs = (load_model(folder)[0] for folder in (tmp_path / "f", quantized))
    parameters, base = (dict(tree_flatten(m.parameters())) for m in (ours, theirs))
    assert {n: (a.shape, a.dtype) for n, a in parameters.items()} == {
        n: (a.shape, a.dtype) for n, a in base.items()
    }
    changed = {n for n, a in parameters.items() if not mx.array_equal(a, base[n])}
    assert any("experts" in name for name in changed)
    assert not any("router" in name or "norm" in name or "embed" in name for name in changed)
    with_adapters = load_model(quantized)[0]
    load_adapters(with_adapters, tmp_path / "a")
    without = difference(models.logits(theirs), models.logits(with_adapters))
    assert difference(models.logits(ours), models.logits(with_adapters)) < without


def test_a_quantized_base_dequantized(tmp_path, quantized):
    expected = adapters_for(quantized, tmp_path / "a")
    result = run(tmp_path, "--dequantize", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    assert "quantization" not in config
    stored = mx.load(str(tmp_path / "f" / "model.safetensors"))
    assert "model.decoder.layers.0.experts.down_proj" in stored  # the name in transformers
    assert difference(models.logits(load_model(tmp_path / "f")[0]), expected) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["--adapter-path", "{}/nowhere"], "has no adapter_config.json", 1),
        (["--save-path", "{}/a"], "exists already", 2),
        (["--model", "{}/4bit"], "of another base", 1),
        (["--dtype", "int8"], "--dtype int8 is unknown", 2),
    ],
)
def test_what_cannot_be_fused_is_said_in_a_line(tmp_path, quantized, arguments, words, code):
    adapters_for(quantized, tmp_path / "a", keys=("attn.q_proj",))
    other = tmp_path / "4bit"
    other.mkdir()
    for path in quantized.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    stored = mx.load(str(other / "model.safetensors"))
    name = "model.decoder.layers.0.mlp.up_proj.weight"
    stored[name] = stored[name] + 1
    mx.save_safetensors(str(other / "new.safetensors"), stored)
    (other / "new.safetensors").replace(other / "model.safetensors")
    result = run(tmp_path, *(a.format(tmp_path) for a in arguments))
    assert result.exit_code == code
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1

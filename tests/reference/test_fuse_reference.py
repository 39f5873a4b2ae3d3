"""What `mlx-diffgemma fuse` writes loads in transformers, and predicts the same there."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from transformers import DiffusionGemmaForBlockDiffusion
from typer.testing import CliRunner

from mlx_diffgemma import load_model
from mlx_diffgemma.checkpoint.adapters import fingerprint
from mlx_diffgemma.checkpoint.locate import locate
from mlx_diffgemma.cli.main import app
from mlx_diffgemma.model.diffusion_gemma import CanvasView
from mlx_diffgemma.train.adapt import adapter_config, prepare, write_adapter_config
from mlx_diffgemma.train.config import TrainConfig
from mlx_diffgemma_convert.cli import app as converter

pytestmark = pytest.mark.reference


@pytest.mark.parametrize("quantized", [False, True])
def test_fused_weights_in_transformers(tmp_path, quantized):
    base = "demo"
    if quantized:
        base = str(tmp_path / "4bit")
        arguments = ["--model", str(locate("demo")), "--mlx-path", base, "-q", "--quiet"]
        assert CliRunner().invoke(converter, arguments).exit_code == 0
    model, _ = load_model(base)
    mark, config = fingerprint(model), TrainConfig()
    keys = prepare(model, config)
    new = [
        (name, value + 0.03 * mx.random.normal(value.shape, key=mx.random.key(number)))
        for number, (name, value) in enumerate(tree_flatten(model.trainable_parameters()))
    ]
    model.load_weights(new, strict=False)
    model.eval()
    write_adapter_config(
        tmp_path, adapter_config(config, model=base, data="", keys=keys, fingerprint=mark)
    )
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), dict(new))
    arguments = ["fuse", "--adapter-path", str(tmp_path), "--save-path", str(tmp_path / "fused")]
    result = CliRunner().invoke(app, [*arguments, "--dequantize", "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    theirs, info = DiffusionGemmaForBlockDiffusion.from_pretrained(
        tmp_path / "fused", dtype=torch.float32, output_loading_info=True
    )
    # The demo model has no vision tower; the reference makes one at random.
    tower = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
    info["missing_keys"] = {name for name in info["missing_keys"] if not name.startswith(tower)}
    assert not any(info.values()), info
    ids, canvas = np.arange(7, 27), np.arange(30, 94)
    with torch.no_grad():
        expected = theirs.eval()(
            input_ids=torch.tensor(ids[None]), decoder_input_ids=torch.tensor(canvas[None])
        ).logits[0]
    (prefix,) = model.encode([ids.tolist()], [model.empty_prefix()])[1]
    ours = model.logits(model.decode([CanvasView(mx.array(canvas), prefix)]))
    assert ours.shape == expected.shape
    difference = np.abs(np.array(ours) - expected.numpy())
    assert np.median(difference) < 1e-5 * expected.abs().max().item()

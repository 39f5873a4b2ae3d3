"""What transformers' `save_pretrained` writes, loaded by our loader, gives transformers' logits."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from reference_model import Closeness, Prefix, build_reference
from tiny_models import make_config, make_weights
from transformers import DiffusionGemmaForBlockDiffusion

from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.model.diffusion_gemma import CanvasView

pytestmark = pytest.mark.reference


@pytest.mark.parametrize("shard_size", ["5GB", "100KB"], ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(2))
def test_saved_by_transformers(tmp_path, seed, dtype, shard_size):
    raw = make_config(seed)
    saved = build_reference(raw, make_weights(ModelConfig.from_dict(raw), seed)).to(dtype)
    saved.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert ((tmp_path / "model.safetensors.index.json").exists()) == (shard_size == "100KB")
    written = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert "per_layer_config" in written and "global_head_dim" not in written

    theirs = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours, _ = load_model(tmp_path, dtype=mx.float32)
    rng = np.random.default_rng(seed)
    prompt, canvas = (rng.integers(7, ours.config.text.vocab_size, (1, n)) for n in (29, 14))
    prefix = Prefix(theirs, np.ones((1, 29)))
    prefix.encode(prompt)
    (encoded,) = ours.encode(prompt.tolist(), [ours.empty_prefix()])[1]
    hidden = ours.decode([CanvasView(mx.array(canvas[0]), encoded)])
    figures = Closeness()
    figures.add(np.array(ours.logits(hidden))[None], prefix.logits(canvas))
    print(f"\nsaved by transformers, seed {seed}, {dtype}, {shard_size}: {figures}")
    assert figures.largest >= 3
    assert figures.median <= 1e-5
    assert figures.p999 <= 1e-4
    assert figures.argmax == 1

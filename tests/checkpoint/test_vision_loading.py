"""The vision tower of a checkpoint: loaded when it is needed, in whatever form it is stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_pictures import drawn

from make_tiny_checkpoint import SMALL, SMALL_VISION, make_config, write_checkpoint
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.checkpoint.names import vision_shapes
from mlx_diffgemma.errors import CheckpointError, PromptError
from mlx_diffgemma.model.vision import Vision
from mlx_diffgemma.pictured import PictureSpan
from mlx_diffgemma.text.pictures import read_picture

WIDE = {
    **SMALL_VISION, "hidden_size": 32, "intermediate_size": 64, "head_dim": 32,
    "position_embedding_size": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tower") / "plain"
    config = make_config(SMALL, WIDE, 2)
    config["vision_config"]["use_clipped_linears"] = True
    write_checkpoint(folder, config)
    return folder


def changed(folder: Path, target: Path, change) -> Path:
    """A copy of a checkpoint with other weights, a function of those by name."""
    shutil.copytree(folder, target)
    (path,) = target.glob("model*.safetensors")
    weights = dict(mx.load(str(path)))
    mx.eval(weights)
    change(weights)
    (target / "model.safetensors.index.json").unlink()
    path.unlink()
    mx.save_safetensors(str(target / "model.safetensors"), weights)
    return target


def seen(model) -> np.ndarray:
    picture = read_picture(drawn(40, 60), model.config.vision, 70)
    span = PictureSpan(0, picture.soft_tokens, picture.key, picture.patches, picture.columns)
    return np.array(model.embed_picture(span))


def has_tower(model) -> bool:
    return any("vision_tower" in name for name, _ in tree_flatten(model.parameters()))


def test_the_tower_is_loaded_with_the_first_picture(folder):
    model, _ = load_model(folder)
    before = model.identity()
    assert not has_tower(model) and model.never_drawn == (6,)
    first = seen(model)
    assert has_tower(model) and np.isfinite(first).all() and first.std() > 0
    assert model.identity() == before
    again, _ = load_model(folder, vision=True)
    assert has_tower(again)
    np.testing.assert_array_equal(seen(again), first)


def test_a_model_may_be_loaded_without_it(folder):
    model, _ = load_model(folder, vision=False)
    with pytest.raises(PromptError, match="was loaded without its vision tower"):
        seen(model)


def test_a_checkpoint_without_a_tower(folder, tmp_path):
    def drop(weights):
        for name in [name for name in weights if "vision" in name]:
            del weights[name]

    blind = changed(folder, tmp_path / "blind", drop)
    model, _ = load_model(blind)
    assert model.never_drawn == ()
    with pytest.raises(PromptError, match="has no vision tower, so it reads no pictures"):
        seen(model)
    with pytest.raises(CheckpointError, match="has no vision tower"):
        load_model(blind, vision=True)


def test_a_quantized_tower_as_the_community_stores_it(folder, tmp_path):
    """Every matrix that a group of 32 divides is packed, the projection of pixels is not."""
    plain, dequantized = {}, {}

    def pack(weights):
        for name in [name for name in weights if "vision" in name and name.endswith(".weight")]:
            if weights[name].ndim == 2 and "input_proj" not in name:
                packed = mx.quantize(weights[name], group_size=32, bits=8)
                path = name.removesuffix(".weight")
                weights |= dict(
                    zip((name, f"{path}.scales", f"{path}.biases"), packed, strict=True)
                )
                plain[path] = {"group_size": 32, "bits": 8, "mode": "affine"}
                exact = (packed[0], *(part.astype(mx.float32) for part in packed[1:]))
                dequantized[name] = mx.dequantize(*exact, group_size=32, bits=8)

    packed = changed(folder, tmp_path / "packed", pack)
    config = json.loads((packed / "config.json").read_text())
    config["quantization"] = {"group_size": 64, "bits": 4, **plain}
    (packed / "config.json").write_text(json.dumps(config))
    model, _ = load_model(packed, vision=True)
    layers = [m for _, m in model.model.encoder.vision_tower.named_modules()]
    assert sum(isinstance(layer, nn.QuantizedLinear) for layer in layers) == 7
    other = changed(folder, tmp_path / "dequantized", lambda weights: weights.update(dequantized))
    np.testing.assert_allclose(seen(model), seen(load_model(other)[0]), rtol=1e-4, atol=1e-5)


def test_a_damaged_tower_is_named(folder, tmp_path):
    name = "model.encoder.vision_tower.patch_embedder.input_proj.weight"
    missing = changed(folder, tmp_path / "missing", lambda weights: weights.pop(name))
    with pytest.raises(CheckpointError, match=f"tensor {name.split('encoder.')[1]} is missing"):
        load_model(missing, vision=True)
    wrong = changed(
        folder, tmp_path / "wrong", lambda weights: weights.update({name: mx.zeros((3, 3))})
    )
    with pytest.raises(CheckpointError, match=r"has shape \[3, 3\], config.json asks for"):
        load_model(wrong, vision=True)


def test_shapes_are_those_of_the_tower(folder):
    config = load_model(folder)[0].config
    size = config.text.hidden_size
    found = {
        f"model.encoder.{name}": array.shape
        for name, array in tree_flatten(Vision(config.vision, size).parameters())
    }
    assert found == vision_shapes(config.vision, size)

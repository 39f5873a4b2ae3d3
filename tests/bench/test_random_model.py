"""Random models: their formats, and that they load and run."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from one_pass import decoded

from mlx_diffgemma.bench.presets import SMALL, config_like
from mlx_diffgemma.bench.random_model import (
    chosen_dtype,
    chosen_recipe,
    formats_of,
    random_model,
    weight_bytes,
)
from mlx_diffgemma.checkpoint.names import module_class
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import UsageError


@pytest.fixture
def config():
    raw = config_like(SMALL)
    raw["text_config"] = {**raw["text_config"], "vocab_size": 2048}
    return ModelConfig.from_dict({**raw, "canvas_length": 16})


@pytest.mark.parametrize(
    ("bits", "recipe"), [(None, None), (4, None), (None, "4bit"), (None, "mxfp4")]
)
def test_it_predicts_like_a_model_halfway_through(config, bits, recipe):
    model = random_model(config, chosen_recipe(bits, recipe), mx.float32)
    hidden = decoded(model, range(16), model.empty_prefix())
    logits = np.array(model.logits(hidden))
    assert np.isfinite(logits).all()
    assert 2 < logits.std() < 6


def test_its_formats_are_the_recipe_s(config):
    model = random_model(config, chosen_recipe(None, "4bit"), mx.bfloat16)
    formats = formats_of(model)
    assert {f.name for p, f in formats.items() if module_class(p) == "experts"} == {"4bit/64"}
    assert {f.name for p, f in formats.items() if module_class(p) != "experts"} == {"8bit/64"}
    floats = {a.dtype for _, a in tree_flatten(model.parameters()) if a.dtype != mx.uint32}
    assert floats == {mx.bfloat16}


def test_weights_are_their_own_and_repeatable(config):
    first, again, other = (
        random_model(config, chosen_recipe(None, None), mx.float32, seed) for seed in (1, 1, 2)
    )
    weights = [
        np.array(model.model.decoder.layers[0].mlp.gate_proj.weight)
        for model in (first, again, other)
    ]
    assert (weights[0] == weights[1]).all() and (weights[0] != weights[2]).mean() > 0.99
    attention = np.array(first.model.decoder.layers[0].self_attn.q_proj.weight)
    assert (attention[:64, :64] != weights[0][:64, :64]).mean() > 0.99


def test_experts_take_the_memory_that_they_claim(config):
    mx.clear_cache()
    before = mx.get_active_memory()
    model = random_model(config, chosen_recipe(4, None), mx.float32)
    held = mx.get_active_memory() - before
    assert weight_bytes(model) <= held < 1.05 * weight_bytes(model)


def test_errors_are_one_line(config):
    with pytest.raises(UsageError, match=r"^--bits and --recipe both say how"):
        chosen_recipe(4, "4bit")
    with pytest.raises(UsageError, match=r"^--recipe 'x' is unknown; known are 3bit, 4bit"):
        chosen_recipe(None, "x")
    with pytest.raises(UsageError, match=r"^affine has no bits 7; mlx packs 1, 2, 3"):
        chosen_recipe(7, None)
    with pytest.raises(UsageError, match=r"^--dtype 'int8' is unknown; known are float32,"):
        chosen_dtype("int8")


def test_groups_that_do_not_fit_are_named(tiny_config):
    narrow = ModelConfig.from_dict(tiny_config())
    with pytest.raises(UsageError, match=r"^model\.decoder\.\S+ has \d+ columns, which groups of"):
        random_model(narrow, chosen_recipe(4, None), mx.float32)

"""Shapes by name or folder, and how many layers of them."""

from __future__ import annotations

import json

import pytest

from mlx_diffgemma.bench.presets import PRESETS, RELEASE, TINY, config_like
from mlx_diffgemma.config import FULL, SLIDING, ModelConfig
from mlx_diffgemma.errors import UsageError


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_configs_and_all_but_the_tiny_one_have_the_release_vocabulary(name):
    config = ModelConfig.from_dict(config_like(name))
    words = 8320 if name == TINY else 262144
    assert (config.text.vocab_size, config.canvas_length) == (words, 256)


def test_the_release_has_its_documented_shapes():
    text = ModelConfig.from_dict(config_like(RELEASE)).text
    full = [i for i, sizes in enumerate(text.attention) if not sizes.is_sliding]
    assert full == [5, 11, 17, 23, 29]
    assert {(a.num_kv_heads, a.head_dim) for a in text.attention} == {(8, 256), (2, 512)}
    assert (text.hidden_size, text.num_experts, text.top_k_experts) == (2816, 128, 8)


@pytest.mark.parametrize(
    ("layers", "kinds"),
    [(1, [FULL]), (2, [SLIDING, FULL]), (7, [SLIDING] * 5 + [FULL, FULL]), (30, None)],
)
def test_fewer_layers_keep_the_last(layers, kinds):
    config = config_like(RELEASE, layers)
    whole = config_like(RELEASE)["text_config"]["layer_types"]
    assert config["text_config"]["layer_types"] == (kinds or whole)
    assert ModelConfig.from_dict(config).text.num_hidden_layers == layers


@pytest.mark.parametrize("spelling", ["release", "per_layer"])
def test_a_folder_gives_its_shapes_but_not_its_quantization(tmp_path, tiny_config, spelling):
    config = tiny_config(spelling=spelling, layer_types=[SLIDING, FULL, FULL], num_hidden_layers=3)
    stored = {**config, "quantization": {"bits": 4, "group_size": 64}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    whole = ModelConfig.from_dict(config_like(str(tmp_path)))
    assert whole == ModelConfig.from_dict(config)
    fewer = ModelConfig.from_dict(config_like(str(tmp_path), 2))
    assert fewer.text.attention == (whole.text.attention[0], whole.text.attention[2])


def test_what_cannot_be_had_is_said_in_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"^--like 'x/y' is no folder .*; these are google/"):
        config_like("x/y")
    with pytest.raises(UsageError, match=r"^--layers must be between 1 and 30, not 31\.$"):
        config_like(RELEASE, 31)

"""`config.json`: both spellings, and an error that names the key for everything that is wrong."""

from __future__ import annotations

import copy
import json

import pytest
from demo_checkpoint import CHECKPOINT

from mlx_diffgemma.config import FULL, SLIDING, ModelConfig, RopeConfig, both_spellings
from mlx_diffgemma.errors import ConfigError

REMOVE = Ellipsis  # stands for a key that is taken out


def without_globals(text):
    """The text config without the release's spelling of the sizes of full layers."""
    del text["global_head_dim"], text["num_global_key_value_heads"]
    return text


@pytest.mark.parametrize("seed", range(5))
def test_both_spellings_read_the_same(tiny_config, seed):
    release = ModelConfig.from_dict(tiny_config(seed, "release"))
    per_layer = ModelConfig.from_dict(tiny_config(seed, "per_layer"))
    assert release.text == per_layer.text
    assert {a.kind for a in release.text.attention} == {FULL, SLIDING}
    for layer in release.text.attention:
        raw = tiny_config(seed)["text_config"]
        full = layer.kind == FULL
        assert layer.head_dim == raw["global_head_dim" if full else "head_dim"]
        assert (
            layer.num_kv_heads
            == raw["num_global_key_value_heads" if full else "num_key_value_heads"]
        )


@pytest.mark.parametrize("key", ["3", "03", 3])
def test_keys_of_per_layer_config_may_be_padded(tiny_config, key):
    raw = tiny_config(0, layer_types=[SLIDING] * 3 + [FULL], num_hidden_layers=4)
    text = without_globals(raw["text_config"])
    text["per_layer_config"] = {key: {"head_dim": 18, "num_key_value_heads": 4}}
    layer = ModelConfig.from_dict(raw).text.attention[3]
    assert (layer.head_dim, layer.num_kv_heads) == (18, 4)


def test_layers_may_differ_among_themselves(tiny_config):
    raw = tiny_config(0, layer_types=[FULL, SLIDING, FULL], num_hidden_layers=3)
    without_globals(raw["text_config"])["per_layer_config"] = {
        "0": {"head_dim": 20},
        "2": {"head_dim": 22, "num_key_value_heads": 4},
    }
    attention = ModelConfig.from_dict(raw).text.attention
    assert [a.head_dim for a in attention] == [20, raw["text_config"]["head_dim"], 22]
    assert attention[0].num_kv_heads == raw["text_config"]["num_key_value_heads"]


def test_full_layers_without_their_own_kv_heads(tiny_config):
    raw = tiny_config(0)
    del raw["text_config"]["num_global_key_value_heads"]
    last = ModelConfig.from_dict(raw).text.attention[-1]
    assert last.num_kv_heads == raw["text_config"]["num_key_value_heads"]


@pytest.mark.parametrize("spelling", ["release", "per_layer"])
def test_both_spellings_writes_both(tiny_config, spelling):
    raw = tiny_config(1, spelling)
    before = copy.deepcopy(raw)
    written = json.loads(json.dumps(both_spellings(raw)))
    assert raw == before
    expected = ModelConfig.from_dict(raw).text
    for hidden in (["per_layer_config"], ["global_head_dim", "num_global_key_value_heads"]):
        text = {k: v for k, v in written["text_config"].items() if k not in hidden}
        assert ModelConfig.from_dict({**written, "text_config": text}).text == expected


def test_a_config_that_ends_no_answer_is_refused(tiny_config):
    raw = tiny_config(1)
    for place in (raw, raw["text_config"]):
        place.pop("eos_token_id", None)
    with pytest.raises(ConfigError, match=r"so no answer would end; add it to config\.json\.$"):
        ModelConfig.from_dict(raw).end_token_ids()
    assert ModelConfig.from_dict(raw).end_token_ids([7]) == (7,)


def test_both_spellings_of_full_layers_that_differ(tiny_config):
    """The release's spelling cannot say it, so it is not written."""
    raw = tiny_config(0, "per_layer", layer_types=[FULL, SLIDING, FULL], num_hidden_layers=3)
    raw["text_config"]["per_layer_config"] = {"0": {"head_dim": 20}, "2": {"head_dim": 22}}
    written = both_spellings(raw)
    assert "global_head_dim" not in written["text_config"]
    assert ModelConfig.from_dict(written).text == ModelConfig.from_dict(raw).text


def test_the_demo_model():
    config = ModelConfig.from_dict(json.loads((CHECKPOINT / "config.json").read_text()))
    assert config.canvas_length == 64
    assert [a.head_dim for a in config.text.attention] == [32, 32, 64, 32, 32, 64]
    assert [a.num_kv_heads for a in config.text.attention] == [2, 2, 1, 2, 2, 1]
    assert config.text.attention[2].rope == RopeConfig(10000.0, "proportional", 0.25)
    assert (config.image_token_id, config.boi_token_id) == (6, None)
    assert config.text.final_logit_softcapping == 30.0


def test_top_level_fields(tiny_config):
    raw = tiny_config(0)
    raw["boi_token_id"] = 9
    config = ModelConfig.from_dict(raw)
    assert config.eos_token_ids == (1, 5)
    assert (config.image_token_id, config.boi_token_id) == (6, 9)
    assert config.raw is raw
    del raw["eos_token_id"]
    assert ModelConfig.from_dict(raw).eos_token_ids == (1,)


def test_an_empty_quantization_hides_no_other(tiny_config):
    block = {"bits": 4, "group_size": 64}
    raw = tiny_config() | {"quantization": {}, "quantization_config": block}
    assert ModelConfig.from_dict(raw).quantization == block


def test_the_ids_that_end_an_answer(tiny_config):
    raw = tiny_config(0)
    assert ModelConfig.from_dict(raw).end_token_ids([7]) == (1, 5)
    raw["generation_config"] = {"eos_token_id": 3}
    assert ModelConfig.from_dict(raw).end_token_ids([7]) == (3,)
    del raw["generation_config"], raw["eos_token_id"], raw["text_config"]["eos_token_id"]
    config = ModelConfig.from_dict(raw)  # enough for work on token ids
    assert config.end_token_ids({9, 7}) == (7, 9)
    message = r"^neither config\.json nor generation_config\.json nor the tokenizer names an 'eos"
    with pytest.raises(ConfigError, match=message):
        config.end_token_ids()


# Where, what it is set to, and the beginning of what is said.
WRONG = [
    ("model_type", "gemma4", "config.json: model_type is 'gemma4', not 'diffusion_gemma'; use"),
    ("model_type", REMOVE, "config.json: model_type is None, not 'diffusion_gemma'; use"),
    ("text_config", REMOVE, "config.json: 'text_config' is missing; copy config.json from"),
    ("text_config", 3, "config.json: 'text_config' must be an object, not a number."),
    ("canvas_length", REMOVE, "config.json: 'canvas_length' is missing"),
    ("canvas_length", 0, "config.json: 'canvas_length' must be a positive integer, not 0."),
    ("eos_token_id", "x", "config.json: 'eos_token_id' must be a token id or a list of them"),
    ("eos_token_id", [1, 999], "config.json: 'eos_token_id' is 999, and ids go from 0 to"),
    ("text_config.pad_token_id", 999, "config.json: 'text_config.pad_token_id' is 999, and ids"),
    ("text_config.pad_token_id", "0", "config.json: 'text_config.pad_token_id' must be a token"),
    ("text_config.pad_token_id", [0], "config.json: 'text_config.pad_token_id' must be one token"),
    ("tie_word_embeddings", False, "config.json: 'tie_word_embeddings' must be true"),
    ("quantization_config", {"quant_method": "awq"}, "config.json: 'quantization_config' is not"),
    *[
        (f"text_config.{key}", REMOVE, f"config.json: 'text_config.{key}' is missing; copy")
        for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_experts", "top_k_experts",
            "moe_intermediate_size", "sliding_window", "max_position_embeddings", "rms_norm_eps",
            "num_attention_heads", "layer_types", "num_hidden_layers", "global_head_dim",
            "rope_parameters",
        )
    ],
    ("text_config", [], "config.json: 'text_config' must be an object, not a list."),
    ("text_config.hidden_size", 10**30, "config.json: 'text_config.hidden_size' must be at most 1"),
    ("text_config.num_experts", 10**12, "config.json: 'text_config.num_experts' must be at most"),
    ("text_config.rms_norm_eps", float("inf"), "config.json: 'text_config.rms_norm_eps' must be a"),
    ("text_config.rms_norm_eps", float("nan"), "config.json: 'text_config.rms_norm_eps' must be a"),
    (
        f"text_config.rope_parameters.{FULL}.rope_theta",
        float("inf"),
        f"config.json: 'text_config.rope_parameters.{FULL}.rope_theta' must be at most 1e+30, not",
    ),
    ("text_config.per_layer_config", [], "config.json: 'text_config.per_layer_config' must be an"),
    ("text_config.per_layer_config", "x", "config.json: 'text_config.per_layer_config' must be an"),
    ("text_config.per_layer_config", {"²": {}}, "config.json: 'text_config.per_layer_config' has"),
    (
        "text_config.per_layer_config",
        {"2": {"head_dim": 64}},
        "config.json: 'text_config.global_head_dim' is",
    ),
    ("quantization", {"bits": [4]}, "config.json: 'quantization.bits' must be a positive integer"),
    ("quantization", "4bit", "config.json: 'quantization' must be an object, not a text."),
    ("quantization", [], "config.json: 'quantization' must be an object, not a list."),
    ("quantization", False, "config.json: 'quantization' must be an object, not a boolean."),
    (
        "quantization",
        {"bits": 4, "a.b": {"mode": ["affine"]}},
        "config.json: 'quantization.a.b.mode' must be a text, not ['affine'].",
    ),
    (
        "quantization",
        {"bits": 4, "a.b": {"bits": "8"}},
        "config.json: 'quantization.a.b.bits' must be a positive integer, not '8'.",
    ),
    ("quantization", {"bits": 4, "a.b": "x"}, "config.json: 'quantization.a.b' must be an object,"),
    ("quantization", {"bits": 4, "mode": {}}, "config.json: 'quantization.mode' must be a text"),
    (
        "quantization_config",
        {"quant_method": "gptq", "bits": 4},
        "config.json: 'quantization_config' is not in MLX form but that of GPTQ; convert the orig",
    ),
    ("text_config.attention_bias", True, "config.json: 'text_config.attention_bias' must be false"),
    ("text_config.head_dim", REMOVE, "config.json: 'text_config (layer 0).head_dim' is missing"),
    (
        "text_config.num_key_value_heads",
        REMOVE,
        "config.json: 'text_config (layer 0).num_key_value_heads' is missing",
    ),
    ("text_config.vocab_size", True, "config.json: 'text_config.vocab_size' must be a positive"),
    ("text_config.hidden_size", 1.5, "config.json: 'text_config.hidden_size' must be a positive"),
    ("text_config.rms_norm_eps", 0, "config.json: 'text_config.rms_norm_eps' must be a number a"),
    ("text_config.top_k_experts", 99, "config.json: 'text_config.top_k_experts' is 99, more than"),
    ("text_config.num_attention_heads", 3, "config.json: 'text_config.num_attention_heads' is 3,"),
    ("text_config.head_dim", 7, "config.json: 'text_config (layer 0).head_dim' must be even"),
    ("text_config.layer_types", [], "config.json: 'text_config.layer_types' must be a list"),
    ("text_config.layer_types", [FULL], "config.json: 'text_config.layer_types' names 1 layers,"),
    ("text_config.layer_types.0", "mamba", "config.json: 'text_config.layer_types' has 'mamba'"),
    ("text_config.hidden_activation", "silu", "config.json: 'text_config.hidden_activation' must"),
    (
        "text_config.use_bidirectional_attention",
        "all",
        "config.json: 'text_config.use_bidirectional_attention' must be 'vision' or absent.",
    ),
    ("text_config.tie_word_embeddings", False, "config.json: 'text_config.tie_word_embeddings'"),
    ("text_config.per_layer_config", {"x": {}}, "config.json: 'text_config.per_layer_config' has"),
    ("text_config.per_layer_config", {"9": {}}, "config.json: 'text_config.per_layer_config' has"),
    (
        "text_config.per_layer_config",
        {"1": 3},
        "config.json: 'text_config.per_layer_config.1' must be an object, not a number.",
    ),
    (
        f"text_config.rope_parameters.{FULL}",
        REMOVE,
        f"config.json: 'text_config.rope_parameters.{FULL}' is missing",
    ),
    (
        f"text_config.rope_parameters.{FULL}.rope_type",
        "yarn",
        f"config.json: 'text_config.rope_parameters.{FULL}.rope_type' is 'yarn'; known are",
    ),
    (
        f"text_config.rope_parameters.{FULL}.rope_theta",
        REMOVE,
        f"config.json: 'text_config.rope_parameters.{FULL}.rope_theta' is missing",
    ),
    (
        f"text_config.rope_parameters.{FULL}.partial_rotary_factor",
        1.5,
        f"config.json: 'text_config.rope_parameters.{FULL}.partial_rotary_factor' cannot be 1.5",
    ),
    (
        f"text_config.rope_parameters.{SLIDING}.partial_rotary_factor",
        0.5,
        f"config.json: 'text_config.rope_parameters.{SLIDING}.partial_rotary_factor' cannot be",
    ),
]  # fmt: skip


@pytest.mark.parametrize("where, value, message", WRONG, ids=lambda v: str(v)[:50])
def test_what_is_wrong_is_named(tiny_config, where, value, message):
    raw = copy.deepcopy(tiny_config(0, num_key_value_heads=2))
    *path, last = where.split(".")
    place = raw
    for key in path:
        place = place[key]
    if isinstance(place, list):
        place[int(last)] = value
    elif value is REMOVE:
        del place[last]
    else:
        place[last] = value
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(raw)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)

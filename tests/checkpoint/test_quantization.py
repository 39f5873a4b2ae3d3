from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_diffgemma.checkpoint.names import expected_shapes, is_quantizable, module_path
from mlx_diffgemma.checkpoint.quantization import (
    RECIPES,
    Format,
    Rule,
    formats_from_config,
    quantization_entry,
)
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import CheckpointError, ConfigError, UsageError

LAYERS = 6
DATA = {
    "model_type": "diffusion_gemma",
    "canvas_length": 16,
    "text_config": {
        "vocab_size": 64, "hidden_size": 128, "intermediate_size": 128, "num_experts": 2,
        "top_k_experts": 1, "moe_intermediate_size": 64, "sliding_window": 8,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "global_head_dim": 64,
        "num_hidden_layers": LAYERS,
        "layer_types": ["sliding_attention"] * (LAYERS - 1) + ["full_attention"],
        "rope_parameters": {
            kind: {"rope_theta": 1000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
}  # fmt: skip
SHAPES = expected_shapes(ModelConfig.from_dict(DATA))
MODULES = {
    module_path(name): shape for name, shape in SHAPES.items() if is_quantizable(name, len(shape))
}
ATTN = "model.decoder.layers.2.self_attn.q_proj"
DOWN = "model.decoder.layers.0.experts.down_proj"


def stored_shapes(formats: dict[str, Format]) -> dict[str, tuple[int, ...]]:
    """What mlx makes of weights in these formats."""
    shapes = dict(SHAPES)
    for path, fmt in formats.items():
        if fmt.quantized:
            parts = mx.quantize(mx.zeros(MODULES[path]), **fmt.parameters)
            for suffix, part in zip(("weight", "scales", "biases"), parts, strict=False):
                shapes[f"{path}.{suffix}"] = part.shape
    return shapes


def config_with(block) -> ModelConfig:
    return ModelConfig.from_dict({**DATA, "quantization": block})


@pytest.mark.parametrize("text", ["4bit/64", "3bit/128", "8bit/32", "mxfp4", "mxfp8", "nvfp4"])
def test_mlx_packs_every_format_in_the_bits_it_claims(text):
    fmt = Format.parse(text)
    weight = mx.random.normal((4, 256), key=mx.random.key(0)).astype(mx.bfloat16)
    stored = sum(part.nbytes for part in mx.quantize(weight, **fmt.parameters))
    assert stored * 8 / weight.size == fmt.bits_per_weight
    assert Format.parse(fmt.name) == fmt


@given(
    st.sampled_from(["affine", "mxfp4", "mxfp8", "nvfp4"]),
    st.integers(0, 9),
    st.sampled_from([8, 16, 32, 64, 128, 256]),
)
def test_the_formats_known_are_those_of_mlx(mode, bits, group):
    weight = mx.zeros((2, 256))
    try:
        Format(mode, bits, group)
    except UsageError:
        with pytest.raises(ValueError, match="quantize"):
            mx.quantize(weight, group_size=group, bits=bits, mode=mode)
    else:
        mx.eval(mx.quantize(weight, group_size=group, bits=bits, mode=mode))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7bit", "affine has no bits 7; mlx packs 1, 2, 3, 4, 5, 6, 8."),
        ("4bit/16", "affine has no group size 16; mlx packs 32, 64, 128."),
        ("int4", "format 'int4' is unknown; write 4bit, 3bit/128, mxfp4"),
    ],
)
def test_unknown_formats_are_refused(text, message):
    with pytest.raises(UsageError) as error:
        Format.parse(text)
    assert message in str(error.value)
    with pytest.raises(UsageError, match="mode 'int4' is unknown; known are affine, mxfp4"):
        Format.make("int4")


def test_a_group_size_that_does_not_divide_is_named():
    with pytest.raises(UsageError) as error:
        Format.parse("3bit/128").check_fits(DOWN, (2, 128, 64))
    assert str(error.value) == (
        f"{DOWN}: a group size of 128 does not divide its 64 columns; add --set '{DOWN}=3bit/64'."
    )
    with pytest.raises(UsageError, match=r"add --set 'x=none'"):
        Format.parse("mxfp4").check_fits("x", (4, 48))
    Format.parse("3bit/64").check_fits(DOWN, (2, 128, 64))


@pytest.mark.parametrize(
    ("selector", "count"),
    [
        ("all", len(MODULES)),
        ("experts", 2 * LAYERS),
        ("experts.down_proj", LAYERS),
        ("attn", 4 * LAYERS - 1),
        ("attn.v_proj", LAYERS - 1),
        ("embedding", 1),
        ("router", LAYERS),
        ("self_conditioning", 3),
        ("layers[0:3].attn", 12),
        ("layers[-1].attn", 3),
        ("layers[-2:]", 20 - 1),
        ("layers[4].experts.down_proj", 1),
        (ATTN, 1),
        ("model.decoder.layers.*.mlp.*", 3 * LAYERS),
        ("layers.2.self_attn.q_proj", 1),
        ("layers[9]", 0),
        ("lm_head", 0),
    ],
)
def test_selectors(selector, count):
    rule = Rule.parse(f"{selector}=8bit")
    assert sum(rule.matches(path, LAYERS) for path in MODULES) == count


def test_the_last_rule_that_matches_decides():
    recipe, matched = RECIPES["4bit"].with_rules(
        [Rule.parse("layers[0:3].attn=6bit/32"), Rule.parse(f"{ATTN}=none")], MODULES, LAYERS
    )
    assert [len(paths) for _, paths in matched] == [12, 1]
    assert recipe.format_for(ATTN, LAYERS) == Format("none")
    assert recipe.format_for(ATTN.replace("q_proj", "k_proj"), LAYERS) == Format.parse("6bit/32")
    assert recipe.format_for(DOWN, LAYERS) == Format.parse("4bit")
    assert recipe.name == f"4bit+layers[0:3].attn=6bit/32+{ATTN}=none"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("lm_head=4bit", "--set 'lm_head=4bit/64' matches no module; known are all, embedding"),
        ("layers[x].attn=4bit", "layers[x].attn"),
        ("layers[1:2:3]=4bit", "layers[1:2:3] is no range of layers"),
        ("experts", "'experts' is no rule; write it as 'experts=3bit/64'"),
    ],
)
def test_rules_that_mean_nothing_are_refused(rule, message):
    with pytest.raises(UsageError) as error:
        RECIPES["4bit"].with_rules([Rule.parse(rule)], MODULES, LAYERS)
    assert message in str(error.value)


def test_recipes_say_what_their_names_say():
    four = RECIPES["4bit"]
    assert four.format_for(DOWN).name == "4bit/64"
    assert {four.format_for(path).name for path in MODULES if ".experts." not in path} == {
        "8bit/64"
    }
    careful = RECIPES["4bit-hq"]
    assert not careful.format_for("model.decoder.embed_tokens").quantized
    assert not careful.format_for("model.decoder.layers.0.router.proj").quantized
    assert not careful.format_for("model.decoder.self_conditioning.up_proj").quantized
    assert careful.format_for(ATTN).name == "8bit/64"
    assert RECIPES["bf16"].format_for(DOWN) == Format("bf16")
    for recipe in RECIPES.values():
        for path, shape in MODULES.items():
            recipe.format_for(path, LAYERS).check_fits(path, shape)


@pytest.mark.parametrize("name", list(RECIPES))
def test_what_is_written_is_read_back(name):
    recipe, _ = RECIPES[name].with_rules([Rule.parse("layers[1].mlp=5bit/32")], MODULES, LAYERS)
    formats = {path: recipe.format_for(path, LAYERS) for path in MODULES}
    shapes = stored_shapes(formats)
    quantized = {path: fmt for path, fmt in formats.items() if fmt.quantized}
    block = quantization_entry(formats, {path: mx.zeros(s).size for path, s in MODULES.items()})
    assert formats_from_config(config_with(block), shapes) == quantized
    bare = {key: block[key] for key in ("group_size", "bits", "mode")}
    assert formats_from_config(config_with(bare), shapes) == quantized


def test_the_entry_names_what_differs_from_the_default():
    eight, four = Format.parse("8bit"), Format.parse("4bit")
    formats = {"a": eight, "b": four, "c": Format("none"), "d": eight}
    assert quantization_entry(formats, {"a": 1, "b": 9, "c": 99, "d": 1}) == {
        "group_size": 64, "bits": 4, "mode": "affine",
        "a": eight.parameters, "c": False, "d": eight.parameters,
    }  # fmt: skip
    assert quantization_entry(formats)["bits"] == 8
    assert quantization_entry({"c": Format("bf16")}) is None


def test_entries_without_a_mode_are_affine():
    formats = {path: Format.parse("8bit") for path in MODULES}
    block = {"group_size": 32, "bits": 4, "mode": "mxfp4", ATTN: {"group_size": 64, "bits": 8}}
    found = formats_from_config(config_with(block), stored_shapes(formats))
    assert found[ATTN] == Format.parse("8bit")


@pytest.mark.parametrize(
    ("entry", "stored", "message"),
    [
        ({"bits": 4, "group_size": 64}, "8bit", "config.json says 4bit/64, the stored tensors are"),
        (False, "8bit", "config.json says none, the stored tensors are 8bit/64"),
        ({"bits": 7, "group_size": 64}, "8bit", "affine has no bits 7"),
        ("8bit", "8bit", f"quantization.{ATTN}"),
        ({"bits": 8, "mode": ["affine"]}, "8bit", f"'quantization.{ATTN}.mode' must be a text"),
        ({"bits": "8"}, "8bit", f"'quantization.{ATTN}.bits' must be a positive integer, not '8'"),
        (True, "none", f"tensor {ATTN}.scales is missing"),
        ({"bits": 8, "group_size": 64}, "none", f"tensor {ATTN}.scales is missing"),
    ],
)
def test_contradictions_are_named(entry, stored, message):
    shapes = stored_shapes({ATTN: Format.parse(stored)})
    block = {"group_size": 64, "bits": 8, "mode": "affine", ATTN: entry}
    with pytest.raises((CheckpointError, ConfigError)) as error:
        formats_from_config(config_with(block), shapes)
    assert message in str(error.value)


def test_mlx_lm_writes_true_for_the_default():
    formats = {ATTN: Format.parse("8bit")}
    block = {"group_size": 64, "bits": 4, ATTN: True}
    assert formats_from_config(config_with(block), stored_shapes(formats)) == formats


def test_shapes_of_no_format_are_named():
    shapes = stored_shapes({ATTN: Format.parse("8bit")})
    shapes[f"{ATTN}.scales"] = (128, 3)
    block = {"group_size": 64, "bits": 8}
    with pytest.raises(CheckpointError, match=r"are no format that mlx has; convert them again"):
        formats_from_config(config_with(block), shapes)

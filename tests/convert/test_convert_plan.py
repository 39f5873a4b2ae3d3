from __future__ import annotations

import json
import shutil

import mlx.core as mx
import pytest
from checkpoints import (
    contents,
    convert_to,
    edit_config,
    plan_of,
    read_weights,
    write_tiny,
    write_weights,
)

from mlx_diffgemma.checkpoint.quantization import Recipe
from mlx_diffgemma.config import both_spellings
from mlx_diffgemma.errors import CheckpointError, ConfigError, UsageError

STACK = "model.decoder.layers.1.experts.gate_up_proj"
DOWN = "model.decoder.layers.1.experts.down_proj"


@pytest.fixture
def source(tmp_path):
    return write_tiny(tmp_path / "source", layers=2)


def change_weights(folder, change):
    weights = read_weights(folder)
    change(weights)
    write_weights(folder, weights)


def per_expert(weights):
    """One tensor an expert, as exports with merged adapters have it."""
    for name in [n for n in weights if n.endswith((".gate_up_proj", ".experts.down_proj"))]:
        stack = weights.pop(name)
        base = name.rsplit(".", 1)[0]
        for index, expert in enumerate(stack):
            if name.endswith("down_proj"):
                weights[f"{base}.{index}.down_proj.weight"] = expert
            else:
                gate, up = mx.split(expert, 2)
                weights[f"{base}.{index}.gate_proj.weight"] = gate
                weights[f"{base}.{index}.up_proj.weight"] = up


def split_stacks(weights):
    for name in [n for n in weights if n.endswith(".gate_up_proj")]:
        gate, up = mx.split(weights.pop(name), 2, axis=1)
        weights[name.replace("gate_up", "gate")] = gate
        weights[name.replace("gate_up", "up")] = up


def with_tied_copies(weights):
    embedding = weights["model.decoder.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding
    weights["model.encoder.language_model.embed_tokens.weight"] = embedding
    weights["model.encoder.language_model.rotary_emb.inv_freq"] = mx.ones((4,))


@pytest.mark.parametrize("layout", [per_expert, split_stacks, with_tied_copies])
def test_every_layout_of_the_source_gives_the_same_weights(source, tmp_path, layout):
    convert_to(tmp_path / "fused", plan_of(source))
    change_weights(source, layout)
    convert_to(tmp_path / "other", plan_of(source))
    fused, other = read_weights(tmp_path / "fused"), read_weights(tmp_path / "other")
    assert fused.keys() == other.keys()
    assert all(mx.array_equal(fused[name], other[name]) for name in fused)


def test_both_spellings_of_the_source_give_the_same_bytes(source, tmp_path):
    convert_to(tmp_path / "release", plan_of(source))

    def respell(config):
        config.update(both_spellings(config))
        for key in ("global_head_dim", "num_global_key_value_heads"):
            del config["text_config"][key]

    edit_config(source, respell)
    convert_to(tmp_path / "per_layer", plan_of(source))
    release, per_layer = contents(tmp_path / "release"), contents(tmp_path / "per_layer")
    assert release["model.safetensors"] == per_layer["model.safetensors"]
    assert release["conversion.json"] == per_layer["conversion.json"]


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_other_types_of_source(source, tmp_path, dtype):
    change_weights(source, lambda w: w.update({k: v.astype(dtype) for k, v in w.items()}))
    convert_to(tmp_path / "kept", plan_of(source, "8bit"))
    kept = read_weights(tmp_path / "kept")
    assert kept["model.decoder.norm.weight"].dtype == dtype
    assert kept["model.decoder.embed_tokens.scales"].dtype == dtype
    convert_to(tmp_path / "bf16", plan_of(source, "8bit", dtype="bf16"))
    cast = read_weights(tmp_path / "bf16")
    assert cast["model.decoder.norm.weight"].dtype == mx.bfloat16
    vision = "model.encoder.vision_tower.patch_embedder.input_proj.weight"
    assert cast[vision].dtype == dtype


def test_plain_recipes_convert_what_is_never_quantized(source, tmp_path):
    recipe = Recipe.of("mine", ["all=fp16", "experts=4bit"])
    convert_to(tmp_path / "out", plan_of(source, recipe))
    weights = read_weights(tmp_path / "out")
    for name in ("model.decoder.norm.weight", "model.decoder.layers.0.layer_scalar"):
        assert weights[name].dtype == mx.float16
    assert weights["model.decoder.layers.0.experts.down_proj.weight"].dtype == mx.uint32


def test_plan_is_split_into_files_at_the_size_asked_for(source):
    plan = plan_of(source, shard_size=100_000)
    assert len(plan.shards) > 3
    assert list(plan.shards) == [
        f"model-{i:05d}-of-{len(plan.shards):05d}.safetensors"
        for i in range(1, len(plan.shards) + 1)
    ]
    for file, targets in plan.shards.items():
        assert len(targets) == 1 or plan.stored_bytes(file) <= 100_000
    assert len(plan_of(source).shards) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(DOWN), f"tensor {DOWN} is missing; fetch the weights again."),
        (
            lambda w: w.update({"model.decoder.layers.7.layer_scalar": mx.ones((1,))}),
            "tensor model.decoder.layers.7.layer_scalar in model.safetensors has no place",
        ),
        (
            lambda w: w.update({"model.decoder.norm.weight": mx.ones((4,))}),
            "tensor model.decoder.norm.weight in model.safetensors has shape [4], config.json asks "
            "for [128]",
        ),
        (
            lambda w: w.update({f"{STACK[:-13]}.0.down_proj.weight": mx.ones((128, 64))}),
            "experts.down_proj.weight is stored twice, as",
        ),
        (
            lambda w: (per_expert(w), w.pop(f"{STACK[:-13]}.3.up_proj.weight")),
            f"{STACK}.weight: expert 3 is missing",
        ),
        (
            lambda w: (per_expert(w), w.pop(f"{STACK[:-13]}.1.gate_proj.weight")),
            f"{STACK}.weight: expert 1 is missing",
        ),
        (
            lambda w: (per_expert(w), w.pop(f"{STACK[:-13]}.0.up_proj.weight")),
            f"{STACK}.weight: expert 0 (gate or up) is missing",
        ),
        (
            lambda w: w.update({"model.decoder.norm.weight": mx.ones((128,), mx.int32)}),
            "tensor model.decoder.norm.weight in model.safetensors is of type I32; convert from",
        ),
    ],
)
def test_broken_sources_are_named_before_anything_is_written(source, change, message):
    change_weights(source, change)
    with pytest.raises(CheckpointError) as error:
        plan_of(source)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_group_size_that_does_not_fit_is_named(source):
    with pytest.raises(UsageError, match=r"experts.down_proj: a group size of 128 does not divide"):
        plan_of(source, Recipe.of("mine", ["experts=3bit/128"]))


def test_quantized_sources_are_refused(tiny_4bit):
    with pytest.raises(UsageError, match="is quantized already; convert from the original weights"):
        plan_of(tiny_4bit)


def test_another_kind_of_model_is_refused(source):
    edit_config(source, lambda config: config.update(model_type="gemma3"))
    with pytest.raises(ConfigError, match="model_type is 'gemma3'"):
        plan_of(source)


PACKED = "model.decoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.update({f"{PACKED}.weight": w[f"{PACKED}.weight"].view(mx.float32)}),
            f"tensor {PACKED}.weight in model.safetensors is F32 of shape",
        ),
        (
            lambda w: w.update({f"{PACKED}.biases": w[f"{PACKED}.biases"][:, :1]}),
            f"tensor {PACKED}.biases in model.safetensors is BF16 of shape",
        ),
        (
            lambda w: w.update({f"{PACKED}.scales": w[f"{PACKED}.scales"].view(mx.uint16)}),
            "U16",
        ),
    ],
)
def test_packed_weights_that_lie_are_named(tiny_4bit, tmp_path, change, message):
    folder = shutil.copytree(tiny_4bit, tmp_path / "lies")
    change_weights(folder, change)
    with pytest.raises(CheckpointError) as error:
        plan_of(folder, dequantize=True)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_packed_vision_tower_is_unpacked(tiny_4bit, tmp_path):
    folder = shutil.copytree(tiny_4bit, tmp_path / "vision")
    plain = {}

    def pack(weights):
        matrices = [n for n in weights if ".vision_tower." in n and n.endswith(".weight")]
        for name in matrices:
            if weights[name].ndim != 2 or weights[name].shape[-1] % 32:
                continue
            packed = mx.quantize(weights[name], group_size=32, bits=8)
            path = name.removesuffix(".weight")
            weights |= dict(zip((name, f"{path}.scales", f"{path}.biases"), packed, strict=True))
            plain[name] = mx.dequantize(*packed, group_size=32, bits=8)

    change_weights(folder, pack)
    config = json.loads((folder / "config.json").read_text())
    entry = {"group_size": 32, "bits": 8, "mode": "affine"}
    config["quantization"] |= {name.removesuffix(".weight"): entry for name in plain}
    (folder / "config.json").write_text(json.dumps(config))
    assert plain
    convert_to(tmp_path / "out", plan_of(folder, dequantize=True))
    found = read_weights(tmp_path / "out")
    for name, weight in plain.items():
        assert mx.array_equal(found[name], weight)
        assert f"{name.removesuffix('.weight')}.scales" not in found

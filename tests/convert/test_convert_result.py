from __future__ import annotations

import hashlib
import json

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import contents, convert_to, plan_of, read_weights, write_tiny, write_weights
from docs.blocks import blocks_of, check
from one_pass import decoded, encoded
from safetensors import safe_open

from mlx_diffgemma import load_model
from mlx_diffgemma.checkpoint.names import is_quantizable, module_path, to_hugging_face
from mlx_diffgemma.checkpoint.quantization import RECIPES
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma_convert import pack


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_packs_what_mlx_packs_and_loads(name, tiny_source, tmp_path):
    convert_to(tmp_path / "out", plan_of(tiny_source, name))
    source, result = read_weights(tiny_source), read_weights(tmp_path / "out")
    recipe, dtype = RECIPES[name], mx.float16 if name == "fp16" else mx.bfloat16
    for hf_name, weight in source.items():
        path = hf_name.removesuffix(".weight")
        parameter = hf_name if hf_name in result else f"{path}.weight"
        fmt = recipe.format_for(path, 3)
        if "vision" in path:
            expected = {parameter: weight}
        elif fmt.quantized and is_quantizable(parameter, weight.ndim):
            arrays = mx.quantize(weight, **fmt.parameters)
            names = [f"{path}.{part}" for part in ("weight", "scales", "biases")]
            expected = dict(zip(names, arrays, strict=False))
        else:
            expected = {parameter: weight.astype(dtype)}
        for key, value in expected.items():
            assert mx.array_equal(result.pop(key), value), key
    assert not result
    model, config = load_model(tmp_path / "out", dtype=mx.float32)
    assert config["text_config"]["global_head_dim"] == 64
    _, prefix = encoded(model, [3, 4, 5])
    assert mx.isfinite(model.logits(decoded(model, [6] * 8, prefix))).all()


def test_small_blocks_give_the_same_bytes(tiny_source, tiny_4bit, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "_BLOCK_BYTES", 10_000)
    convert_to(tmp_path / "out", plan_of(tiny_source))
    whole, pieces = contents(tiny_4bit), contents(tmp_path / "out")
    assert pieces["model.safetensors"] == whole["model.safetensors"]


def test_files_around_the_weights(tiny_source, tiny_4bit):
    files = contents(tiny_4bit)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert files[name] == (tiny_source / name).read_bytes()
    config = json.loads(files["config.json"])
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"]["bits"] == 8
    assert config["quantization"]["model.decoder.layers.0.experts.down_proj"]["bits"] == 4
    text = config["text_config"]
    assert text["per_layer_config"] == {"2": {"head_dim": 64, "num_key_value_heads": 1}}
    assert (text["global_head_dim"], text["num_global_key_value_heads"]) == (64, 1)
    assert (
        config["vision_config"]
        == json.loads((tiny_source / "config.json").read_text())["vision_config"]
    )


def test_index_names_every_tensor_and_the_totals(tiny_source, tmp_path):
    convert_to(tmp_path / "out", plan_of(tiny_source, shard_size="200kB"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    total = 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "np") as file:
            assert file.metadata() == {"format": "mlx"}
            for name in file.keys():  # noqa: SIM118
                assert index["weight_map"][name] == path.name
        total += sum(array.nbytes for array in mx.load(str(path)).values())
    weights = read_weights(tmp_path / "out")
    assert set(index["weight_map"]) == set(weights)
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == total
    source = read_weights(tiny_source)
    parameters = sum(array.size for name, array in source.items() if "vision" not in name)
    assert index["metadata"]["total_parameters"] == parameters


def test_record_has_checksums_formats_and_errors(tiny_source, tiny_4bit):
    record = json.loads((tiny_4bit / "conversion.json").read_text())
    assert record["recipe"] == "4bit" and record["source"] == "tiny-it"
    assert record["tool"] == "mlx-diffgemma" and record["source_revision"] is None
    source = read_weights(tiny_source)
    for name, entry in record["tensors"].items():
        weight = source[to_hugging_face(name)]
        raw = np.array(weight.view(mx.uint8)).tobytes()
        assert entry["source_sha256"] == hashlib.sha256(raw).hexdigest()
        if is_quantizable(name, weight.ndim):
            four = ".experts." in module_path(name)
            assert entry["format"] == ("4bit/64" if four else "8bit/64")
            assert 0 < entry["relative_error"] < (0.15 if four else 0.02)
            assert entry["worst_of_allowed"] <= 1
    assert "time" not in json.dumps(record)


def test_back_to_plain_weights(tiny_source, tiny_4bit, tmp_path):
    convert_to(tmp_path / "plain", plan_of(tiny_4bit, dequantize=True))
    packed, plain = read_weights(tiny_4bit), read_weights(tmp_path / "plain")
    recipe = RECIPES["4bit"]
    for name, weight in plain.items():
        path = module_path(name)
        if f"{path}.scales" in packed:
            fmt = recipe.format_for(path, 3)
            expected = mx.dequantize(
                packed[name], packed[f"{path}.scales"], packed[f"{path}.biases"], **fmt.parameters
            )
            assert mx.array_equal(weight, expected), name
        else:
            assert mx.array_equal(weight, packed[name]), name
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization" not in config and "quantization_config" not in config


def test_to_mlx_and_back_is_the_same_to_the_bit(tiny_source, tmp_path):
    convert_to(tmp_path / "mlx", plan_of(tiny_source, "bf16"))
    convert_to(tmp_path / "hf", plan_of(tmp_path / "mlx", "bf16", hugging_face=True))
    before, after = read_weights(tiny_source), read_weights(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)


def test_the_card_says_what_it_is(tiny_4bit):
    card = (tiny_4bit / "README.md").read_text()
    head, text = card.split("---\n\n", 1)
    for line in ("license: apache-2.0", "base_model: someone/base", "library_name: mlx", "- mlx"):
        assert line in head
    assert "# base, 4bit" in text
    assert "| experts | 4bit/64 | 294,912 | 4.50 | 0.17 MB |" in text
    assert "mlx-diffgemma generate" in text and "mlx_vlm.generate" in text
    for block in blocks_of(text, "the card"):
        check(block)


@pytest.mark.parametrize("recipe", ["fp16", "4bit"])
@pytest.mark.parametrize(
    "name", ["model.decoder.layers.0.mlp.up_proj.weight", "model.decoder.norm.weight"]
)
def test_weights_that_do_not_fit_float16_are_said_to(tmp_path, recipe, name):
    source = write_tiny(tmp_path / "source", layers=1)
    weights = read_weights(source)
    first = (0,) * weights[name].ndim
    weights[name][first] = 1e5
    write_weights(source, weights)
    with pytest.raises(CheckpointError, match=f"tensor {name} .* does not fit float16 .* to bf16"):
        convert_to(tmp_path / "out", plan_of(source, recipe, dtype="fp16"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_stop_the_conversion(tmp_path, value):
    source = write_tiny(tmp_path / "source", layers=1)
    weights = read_weights(source)
    name = "model.decoder.layers.0.mlp.up_proj.weight"
    weights[name][5, 7] = value
    write_weights(source, weights)
    with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN or infinity; fetch"):
        convert_to(tmp_path / "out", plan_of(source))
    assert not (tmp_path / "out").exists()

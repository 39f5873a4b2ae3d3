"""Every way in which a checkpoint can be broken ends in one line that names the thing."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from one_pass import decoded, encoded
from tiny_models import make_config, make_weights

from mlx_diffgemma import load_model
from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.checkpoint.adapters import load_adapters
from mlx_diffgemma.checkpoint.locate import locate
from mlx_diffgemma.checkpoint.names import to_hugging_face
from mlx_diffgemma.checkpoint.shards import INDEX
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import (
    CheckpointError,
    ConfigError,
    MemoryShortageError,
    UsageError,
)

NORM = "model.decoder.norm.weight"
EXPERTS = "model.decoder.layers.0.experts.down_proj"
SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "head_dim": 8}


class Checkpoint:
    """A small checkpoint in Hugging Face form, to be broken and written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = make_config(seed=1, **SIZES)
        parsed = ModelConfig.from_dict(self.config)
        self.weights = {
            to_hugging_face(name): mx.array(value)
            for name, value in make_weights(parsed, seed=1).items()
        }

    def write(self, shards: int = 1) -> Path:
        (self.folder / "config.json").write_text(json.dumps(self.config))
        names = list(self.weights)
        files, weight_map = [], {}
        for number in range(shards):
            file = "model.safetensors"
            if shards > 1:
                file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = names[number::shards]
            mx.save_safetensors(str(self.folder / file), {n: self.weights[n] for n in part})
            weight_map |= dict.fromkeys(part, file)
            files.append(file)
        if shards > 1:
            self.write_index(weight_map)
        return self.folder

    def write_index(self, weight_map: dict[str, str]) -> None:
        (self.folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    def index(self) -> dict[str, str]:
        return json.loads((self.folder / INDEX).read_text())["weight_map"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path)


def fails(folder: Path, *words: str, **options: object) -> None:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_model(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def logits(model) -> np.ndarray:
    ids = list(range(7, 27))
    _, prefix = encoded(model, ids)
    return np.array(model.logits(decoded(model, ids, prefix)))


@pytest.mark.parametrize("shards", [1, 3])
def test_loads_the_hugging_face_layout(checkpoint: Checkpoint, shards: int) -> None:
    model, config = load_model(checkpoint.write(shards))
    stored = dict(tree_flatten(model.parameters()))
    assert config["model_type"] == "diffusion_gemma"
    for name, value in checkpoint.weights.items():
        name = f"{name}.weight" if name.endswith(("gate_up_proj", "experts.down_proj")) else name
        assert mx.array_equal(stored.pop(name), value), name
    assert not stored


def test_vision_and_tied_weights_stay_on_disk(checkpoint: Checkpoint) -> None:
    extra = mx.ones((2, 2))
    checkpoint.weights["model.encoder.vision_tower.patch_embedder.input_proj.weight"] = extra
    checkpoint.weights["model.encoder.embed_vision.embedding_projection.weight"] = extra
    checkpoint.weights["model.encoder.language_model.norm.weight"] = extra
    checkpoint.weights["lm_head.weight"] = extra
    load_model(checkpoint.write())


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_dtype_is_that_of_weights_and_activations(checkpoint: Checkpoint, dtype: mx.Dtype) -> None:
    model, _ = load_model(checkpoint.write(), dtype=dtype)
    assert model.dtype == dtype
    hidden, prefix = encoded(model, [7, 8])
    assert hidden.dtype == dtype
    assert prefix.layers[0].keys.dtype == dtype


def test_lazy_loading_gives_the_same_model(checkpoint: Checkpoint) -> None:
    folder = checkpoint.write(2)
    eager, lazy = (load_model(folder, lazy=lazy)[0] for lazy in (False, True))
    assert np.array_equal(logits(eager), logits(lazy))


@pytest.mark.parametrize(
    ("mode", "bits", "group"),
    [("affine", 8, 32), ("affine", 4, 32), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)],
)
def test_loads_the_quantized_layout(
    checkpoint: Checkpoint, mode: str, bits: int, group: int
) -> None:
    """Experts in one format, the embedding in another, the router in none; the loaded model
    computes what the dequantized weights give."""
    special = "model.decoder.embed_tokens"
    dense = {}
    quantization = {"group_size": group, "bits": bits, "mode": mode}
    quantization[special] = {"group_size": 64, "bits": 8, "mode": "affine"}
    for name in list(checkpoint.weights):
        value = checkpoint.weights[name]
        if value.ndim < 2 or "router" in name:
            dense[name] = value
            continue
        path = name.removesuffix(".weight")
        how = quantization[special] if path == special else quantization
        how = {key: how[key] for key in ("group_size", "bits", "mode")}
        packed, scales, *biases = mx.quantize(checkpoint.weights.pop(name), **how)
        checkpoint.weights |= {f"{path}.weight": packed, f"{path}.scales": scales}
        if biases:
            checkpoint.weights[f"{path}.biases"] = biases[0]
        dense[name] = mx.dequantize(packed, scales, *biases, **how).astype(mx.float32)
    checkpoint.config["quantization"] = quantization
    quantized, _ = load_model(checkpoint.write())
    assert quantized.dtype == mx.float32

    plain = Checkpoint(checkpoint.folder / "plain")
    plain.folder.mkdir()
    plain.weights = dense
    expected = logits(load_model(plain.write())[0])
    # Quantized products sum in another order, which a router may turn into another expert.
    difference = np.abs(logits(quantized) - expected)
    assert np.median(difference) < 1e-3 * np.abs(expected).max()


def test_folder_missing(tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", "nowhere", "no such folder", "demo")


def test_a_file_in_place_of_the_folder(checkpoint: Checkpoint) -> None:
    fails(checkpoint.write() / "model.safetensors", "is a file", "config.json")


def test_config_missing(checkpoint: Checkpoint) -> None:
    (checkpoint.write() / "config.json").unlink()
    fails(checkpoint.folder, "no config.json")


def test_config_damaged(checkpoint: Checkpoint) -> None:
    (checkpoint.write() / "config.json").write_text("{")
    fails(checkpoint.folder, "config.json", "damaged")


def test_another_model(checkpoint: Checkpoint) -> None:
    checkpoint.config["model_type"] = "gemma4"
    fails(checkpoint.write(), "'gemma4'", "mlx-lm")


def test_no_weights(checkpoint: Checkpoint) -> None:
    (checkpoint.write() / "model.safetensors").unlink()
    fails(checkpoint.folder, "no model*.safetensors")


def test_shard_missing(checkpoint: Checkpoint) -> None:
    shard = checkpoint.write(3) / "model-00002-of-00003.safetensors"
    shard.unlink()
    fails(checkpoint.folder, shard.name, "is missing")


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_shard_truncated(checkpoint: Checkpoint, keep: int) -> None:
    shard = checkpoint.write(2) / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    fails(checkpoint.folder, shard.name, "truncated or damaged")


def test_shard_that_is_a_folder(checkpoint: Checkpoint) -> None:
    checkpoint.write()
    (checkpoint.folder / "model.safetensors").unlink()
    (checkpoint.folder / "model.safetensors").mkdir()
    fails(checkpoint.folder, "model.safetensors is a folder, where a file is needed")


def test_tensor_missing(checkpoint: Checkpoint) -> None:
    del checkpoint.weights[NORM]
    fails(checkpoint.write(), NORM, "is missing")


def test_tensor_extra(checkpoint: Checkpoint) -> None:
    checkpoint.weights["model.decoder.layers.99.mlp.up_proj.weight"] = mx.ones((2, 2))
    fails(checkpoint.write(), "layers.99.mlp.up_proj", "no place")


def test_tensor_of_the_wrong_shape(checkpoint: Checkpoint) -> None:
    checkpoint.weights[EXPERTS] = checkpoint.weights[EXPERTS][:, :-1]
    fails(checkpoint.write(), EXPERTS, "shape", "config.json asks for")


def test_tensor_of_the_wrong_type(checkpoint: Checkpoint) -> None:
    checkpoint.weights[NORM] = checkpoint.weights[NORM].astype(mx.int32)
    fails(checkpoint.write(), NORM, "I32", "floating-point")


def test_experts_one_by_one_need_the_converter(checkpoint: Checkpoint) -> None:
    stack = checkpoint.weights.pop(EXPERTS)
    for number, expert in enumerate(stack):
        name = EXPERTS.replace("down_proj", f"{number}.down_proj.weight")
        checkpoint.weights[name] = expert
    fails(checkpoint.write(), "one by one", "mlx-diffgemma-convert")


def test_index_names_a_tensor_that_no_shard_holds(checkpoint: Checkpoint) -> None:
    checkpoint.write(2)
    checkpoint.write_index({**checkpoint.index(), "ghost": "model-00001-of-00002.safetensors"})
    fails(checkpoint.folder, "ghost", "in no shard", INDEX)


def test_index_leaves_a_tensor_out(checkpoint: Checkpoint) -> None:
    checkpoint.write(2)
    index = checkpoint.index()
    del index[NORM]
    checkpoint.write_index(index)
    fails(checkpoint.folder, NORM, "does not list")


def test_index_without_a_map(checkpoint: Checkpoint) -> None:
    (checkpoint.write(2) / INDEX).write_text("{}")
    fails(checkpoint.folder, INDEX, "weight_map")


def test_stale_shard(checkpoint: Checkpoint) -> None:
    folder = checkpoint.write()
    (folder / "model-old.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    fails(folder, "both in", "model-old.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_finds_values_that_are_not_finite(checkpoint: Checkpoint, value: float) -> None:
    checkpoint.weights[EXPERTS][2, 1, 1] = value
    folder = checkpoint.write()
    load_model(folder)
    fails(folder, EXPERTS, "NaN or infinity", check=True)


def test_generation_config_damaged(checkpoint: Checkpoint) -> None:
    (checkpoint.write() / "generation_config.json").write_text("nonsense")
    fails(checkpoint.folder, "generation_config.json", "damaged")


def test_quantization_of_another_kind(checkpoint: Checkpoint) -> None:
    checkpoint.config["quantization_config"] = {"quant_method": "awq"}
    fails(checkpoint.write(), "quantization_config", "convert the original")


def test_memory_is_estimated_before_loading(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 10_000)
    with pytest.raises(MemoryShortageError, match=r"needs about .* offers 10.0 kB; choose weights"):
        load_model(checkpoint.write())


@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id"])
def test_ids_outside_the_vocabulary_name_file_and_key(checkpoint: Checkpoint, key: str) -> None:
    size = checkpoint.config["text_config"]["vocab_size"]
    (checkpoint.write() / "generation_config.json").write_text(json.dumps({key: size}))
    fails(checkpoint.folder, "generation_config.json", f"'{key}' is {size}", f"to {size - 1}")


def test_ids_outside_the_vocabulary_inside_the_config(checkpoint: Checkpoint) -> None:
    checkpoint.config["generation_config"] = {"eos_token_id": [1, 10**6]}
    fails(checkpoint.write(), "config.json: 'generation_config.eos_token_id' is 1000000")


def test_loading_sets_no_limit_of_the_process(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(limit: int) -> int:
        raise AssertionError(limit)

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    working_set = {"max_recommended_working_set_size": 10**12}
    monkeypatch.setattr(mx, "device_info", lambda device=None: working_set)
    for name in ("set_wired_limit", "set_cache_limit", "set_memory_limit"):
        monkeypatch.setattr(mx, name, refused)
    load_model(checkpoint.write())


def test_adapters_missing(checkpoint: Checkpoint) -> None:
    model, _ = load_model(checkpoint.write())
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        load_adapters(model, checkpoint.folder)


def test_repository_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"nobody/nothing .*\(it is not in the local cache"):
        locate("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./typo", "./typo: no such folder; give a folder"),
        ("../typo", "../typo: no such folder; give a folder"),
        ("/no/such/folder", "/no/such/folder: no such folder; give a folder"),
        ("typo", "typo: no such folder; give a folder"),
        ("a\nb", "'a\\nb': no such folder; give a folder"),
        ("a\0b", "cannot be read (embedded null"),
        ("~nobody-of-that-name/x", "cannot be read (Could not determine home"),
        ("loop", "cannot be read (its symbolic links lead round in a circle)"),
        ("x" * 300, "cannot be read (File name too long)"),
    ],
)
def test_what_is_no_model_is_said_without_asking_the_hub(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError) as caught:
        locate(name)
    assert words in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("name", [None, 5, "", b"demo", ["demo"]])
def test_a_model_is_named_by_a_text_or_a_path(name):
    with pytest.raises(UsageError, match="a model is named by"):
        locate(name)


def test_a_folder_of_adapters_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    fails(tmp_path, "holds adapters and no model", "--adapter-path")


def test_adapters_of_peft_are_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, _ = load_model(checkpoint.write())
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapters / "adapter_model.safetensors").write_text("")
    with pytest.raises(CheckpointError, match=r"in the form of PEFT"):
        load_adapters(model, adapters)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "modelopt"])
def test_packing_of_others_is_named(checkpoint: Checkpoint, method: str) -> None:
    checkpoint.config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 64}
    fails(checkpoint.write(), "config.json: 'quantization_config' is not in MLX form but that of")


def test_sizes_of_another_model_are_refused_before_one_is_made(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.config["text_config"]["num_experts"] = 1 << 24
    checkpoint.config["text_config"]["vocab_size"] = 1 << 24
    checkpoint.write()
    monkeypatch.setattr(memory, "require", lambda *_, **__: None)
    fails(checkpoint.folder, "has shape", "of different models")


def test_an_index_names_files_in_its_folder(checkpoint: Checkpoint) -> None:
    checkpoint.write(shards=2)
    for shard in (5, None, [], "../x.safetensors", "x.bin", "a\nb.safetensors"):
        checkpoint.write_index({**dict.fromkeys(checkpoint.weights, "x.safetensors"), NORM: shard})
        fails(checkpoint.folder, INDEX, NORM, "no name of a safetensors file")


def test_a_cache_that_was_filled_before_adapters_came_is_refused(checkpoint: Checkpoint) -> None:
    model, _ = load_model(checkpoint.write())
    filled, empty = model.make_cache(), model.make_cache()
    _, filled.prefix = encoded(model, [7, 8, 9])
    copied = filled.snapshot()
    write_adapters(model, checkpoint.folder / "adapters")
    load_adapters(model, checkpoint.folder / "adapters")
    empty.require_model(model)
    model.make_cache().require_model(model)
    for cache in (filled, copied):
        with pytest.raises(UsageError, match=r"^adapters were loaded since this prefix_cache was"):
            cache.require_model(model)
        cache.clear()
        cache.require_model(model)


def write_adapters(model, folder: Path) -> None:
    path = "model.decoder.layers.0.mlp.gate_proj"
    outputs, inputs = model.model.decoder.layers[0].mlp.gate_proj.weight.shape
    folder.mkdir()
    parameters = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": [path]}
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = {f"{path}.lora_a": mx.ones((inputs, 2)), f"{path}.lora_b": mx.ones((2, outputs))}
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)

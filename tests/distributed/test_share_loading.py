"""Each rank reads its own bytes of a checkpoint, and its model is a part of the whole one."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_models import make_config, make_weights

from mlx_diffgemma import load, load_model
from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.checkpoint.names import module_class, module_path
from mlx_diffgemma.checkpoint.ranges import RangeReader, runs_of
from mlx_diffgemma.checkpoint.shards import StoredTensor, stored_tensors
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.distributed.loading import load_share, share_of_weights
from mlx_diffgemma.distributed.shares import Split
from mlx_diffgemma.errors import (
    CheckpointError,
    MemoryShortageError,
    PromptError,
    UsageError,
)

SIZES = {
    "hidden_size": 64, "intermediate_size": 192, "moe_intermediate_size": 32, "head_dim": 32,
    "global_head_dim": 64, "num_key_value_heads": 2, "num_experts": 7, "vocab_size": 160,
}  # fmt: skip
FORMATS = {
    "plain": None,
    "affine": {"bits": 4, "group_size": 32, "mode": "affine"},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}


def write_checkpoint(folder: Path, packed: str = "plain") -> Path:
    """A checkpoint in two shards; packed, its experts, MLPs and attention are quantized and all
    else is bfloat16."""
    data = make_config(1, **SIZES)
    weights = {}
    for name, value in make_weights(ModelConfig.from_dict(data), 1).items():
        path, array = module_path(name), mx.array(value)
        how = FORMATS[packed]
        if how is None:
            weights[name] = array
        elif module_class(path) in ("experts", "mlp", "attention") and array.ndim > 1:
            names = (f"{path}.{each}" for each in ("weight", "scales", "biases"))
            weights |= dict(zip(names, mx.quantize(array, **how), strict=False))
        else:
            weights[name] = array.astype(mx.bfloat16)
    if packed != "plain":
        data["quantization"] = FORMATS[packed]
    (folder / "config.json").write_text(json.dumps(data))
    for part in range(2):
        own = dict(list(weights.items())[part::2])
        mx.save_safetensors(str(folder / f"model-{part}.safetensors"), own)
    return folder


@pytest.mark.parametrize("packed", sorted(FORMATS))
@pytest.mark.parametrize("kind", ["tensor", "experts", "pipeline"])
def test_a_rank_loads_its_part_of_the_whole_model(tmp_path: Path, kind: str, packed: str) -> None:
    folder = write_checkpoint(tmp_path, packed)
    whole: dict[str, mx.array] = dict(tree_flatten(load_model(folder)[0].parameters()))
    for rank in range(2):
        loaded = load_share(folder, Split(kind, (3, 2)), rank)
        wanted = share_of_weights(loaded.share, whole)
        found = dict(tree_flatten(loaded.model.parameters()))
        assert found.keys() == wanted.keys()
        for name, array in found.items():
            assert array.dtype == wanted[name].dtype
            np.testing.assert_array_equal(array, wanted[name], name)
        router = loaded.model.layers[0].router
        assert router.proj.weight.shape[0] == SIZES["num_experts"]
        assert loaded.config["model_type"] == "diffusion_gemma"


@pytest.mark.parametrize("packed", ["plain", "affine"])
def test_ranks_read_every_byte_once_but_for_what_all_hold(tmp_path: Path, packed: str) -> None:
    folder = write_checkpoint(tmp_path, packed)
    stored = stored_tensors(folder)
    read = []
    for rank in range(2):
        share = load_share(folder, Split("tensor", (1, 1)), rank).share
        with RangeReader(gap=0) as reader:
            common = 0
            for name, tensor in stored.items():
                part = share.part(name)
                assert part is not None
                before = reader.nbytes
                reader.read(tensor, part.slices(tensor.shape))
                common += (reader.nbytes - before) * (part.axis is None)
        read.append((reader.nbytes, common))
    (first, common), (second, _) = read
    total = sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))
    headers = sum(
        8 + int.from_bytes(shard.read_bytes()[:8], "little")
        for shard in folder.glob("*.safetensors")
    )
    assert first + second - common == total - headers
    assert load_share(folder, Split("tensor", (1, 1)), 0).bytes_read < total - headers


def test_parts_are_read_in_few_reads_and_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "f32": mx.array(rng.normal(size=(5, 6, 7)).astype(np.float32)),
        "f16": mx.array(rng.normal(size=(40, 3000)).astype(np.float16)),
        "bf16": mx.array(rng.normal(size=(9, 33)).astype(np.float32)).astype(mx.bfloat16),
        "u32": mx.array(rng.integers(0, 2**32, (12, 1500), np.uint32)),
        "u8": mx.array(rng.integers(0, 256, (12, 10), np.uint8)),
        "one": mx.array([1.5]),
    }
    shard = tmp_path / "model.safetensors"
    mx.save_safetensors(str(shard), arrays)
    stored = stored_tensors(tmp_path)
    for name, array in arrays.items():
        for gap in (0, 4096):
            for axis in range(array.ndim):
                for start, stop in ((0, array.shape[axis]), (1, 4), (0, 1)):
                    stop = min(stop, array.shape[axis])
                    start = min(start, stop)
                    where = [slice(0, size) for size in array.shape]
                    where[axis] = slice(start, stop)
                    with RangeReader(gap) as reader:
                        found = reader.read(stored[name], where)
                    wanted = array[tuple(where)]
                    assert found.dtype == array.dtype and found.shape == wanted.shape
                    assert mx.array_equal(found, wanted)
                    runs = runs_of(array.shape, where, array.dtype.size)
                    assert runs.nbytes == wanted.nbytes
                    gaps = runs.stride - runs.length if runs.count > 0 else 0
                    merged = gaps <= gap and runs.nbytes
                    between = (runs.count - 1) * gaps if merged else 0
                    assert reader.nbytes == runs.nbytes + between, (name, axis, start, gap)


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    shard = tmp_path / "model.safetensors"
    mx.save_safetensors(str(shard), {"a": mx.zeros((8, 8))})
    tensor = stored_tensors(tmp_path)["a"]
    shard.write_bytes(shard.read_bytes()[:-4])
    every = (slice(0, 8), slice(0, 8))
    with (
        pytest.raises(CheckpointError, match=r"model.safetensors ends within a;"),
        RangeReader() as r,
    ):
        r.read(tensor, every)
    shard.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"), RangeReader() as reader:
        reader.read(tensor, every)
    odd = StoredTensor("a", shard, (8, 8), "I64")
    with pytest.raises(CheckpointError, match="is of type I64"), RangeReader() as reader:
        reader.read(odd, every)


def test_a_share_may_fit_where_the_whole_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path)
    halves = Split.even("tensor", 2)
    whole = sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))
    monkeypatch.setattr(memory, "available_memory", lambda: whole // 4)
    with pytest.raises(MemoryShortageError, match="weights"):
        load_share(folder, halves, 1)
    monkeypatch.setattr(memory, "available_memory", lambda: whole)
    with pytest.raises(MemoryShortageError):
        load_model(folder)
    load_share(folder, halves, 1)


def test_adapters_are_refused() -> None:
    with pytest.raises(UsageError, match="mlx-diffgemma fuse"):
        load("demo", adapter_path="adapters", parallel="tensor")
    with pytest.raises(UsageError, match="lazy=True"):
        load("demo", lazy=True, parallel="tensor")


def test_what_belongs_to_another_model_is_refused_by_every_rank(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    for name, line in (
        ("model.decoder.layers.40.mlp.down_proj.weight", "has no place"),
        ("model.decoder.layers.0.extra", "has no place"),
    ):
        mx.save_safetensors(str(folder / "model-2.safetensors"), {name: mx.zeros((4, 4))})
        for kind in ("tensor", "pipeline"):
            with pytest.raises(CheckpointError, match=line):
                load_share(folder, Split.even(kind, 2), 0)


def test_only_the_first_rank_reads_pictures() -> None:
    for rank in range(2):
        loaded = load_share("demo-image", Split.even("experts", 2), rank)
        assert loaded.model.reads_pictures == (rank == 0)
        if rank:
            with pytest.raises(PromptError, match="without its vision tower"):
                loaded.model.require_vision()
        else:
            loaded.model.require_vision()

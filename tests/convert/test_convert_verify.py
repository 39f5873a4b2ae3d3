from __future__ import annotations

import json
import random
import shutil

import mlx.core as mx
import pytest
from checkpoints import convert_to, plan_of, read_weights, run, write_tiny, write_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.checkpoint.quantization import Format
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma_convert import pack
from mlx_diffgemma_convert.pack import compare
from mlx_diffgemma_convert.source import FolderSource
from mlx_diffgemma_convert.verify import compare_with_source, verify


@pytest.fixture
def copy(tiny_4bit, tmp_path):
    return shutil.copytree(tiny_4bit, tmp_path / "copy")


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_one_flipped_bit_is_found_wherever_it_is(copy):
    dice = random.Random(0)
    verify(copy)
    for path in sorted(copy.iterdir()):
        tries = 40 if path.suffix == ".safetensors" else 8
        bits = [dice.randrange(8 * path.stat().st_size) for _ in range(tries)]
        for bit in [*bits, 0, 70, 8 * path.stat().st_size - 1]:
            flip(path, bit)
            with pytest.raises(CheckpointError) as error:
                verify(copy)
            assert path.name in str(error.value), (path.name, bit)
            flip(path, bit)
    verify(copy)


def test_missing_truncated_and_extra_files_are_named(copy):
    (copy / "model-old.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model-old.safetensors is not of this conversion"):
        verify(copy)
    (copy / "model-old.safetensors").unlink()
    shard = copy / "model.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors has [\d,]+ bytes, not [\d,]+ as"):
        verify(copy)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing; fetch or convert"):
        verify(copy)
    shard.write_bytes(content)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing"):
        verify(copy)
    (copy / "conversion.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no conversion\.json; only what this converter"):
        verify(copy)


def test_results_that_are_wrong_in_themselves_are_found(tiny_source, tmp_path, monkeypatch):
    """Checksums only show what changed after writing; this is about what was written."""
    true_bytes = pack.to_bytes

    def spoil(array):
        data = true_bytes(array)
        if array.dtype == mx.bfloat16:
            data = data.copy()
            data[0:2] = (0xC0, 0x7F)
        return data

    monkeypatch.setattr(pack, "to_bytes", spoil)
    with pytest.raises(CheckpointError, match=r"(scales|biases) holds NaN or infinity"):
        convert_to(tmp_path / "out", plan_of(tiny_source, "8bit"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["3bit", "mxfp4", "nvfp4", "mxfp8", "fp16"])
def test_every_weight_compares_with_the_source(tiny_source, tmp_path, recipe):
    convert_to(tmp_path / "out", plan_of(tiny_source, recipe))
    loss = compare_with_source(tmp_path / "out", FolderSource(tiny_source))
    assert loss.worst <= 1
    assert (loss.relative == 0) == (recipe == "fp16")


def test_another_source_does_not_compare(tmp_path, tiny_4bit):
    other = write_tiny(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"does not come back from .* as it should \(off by"):
        compare_with_source(tiny_4bit, FolderSource(other))


def test_a_changed_norm_does_not_compare(tmp_path, tiny_source, tiny_4bit):
    other = shutil.copytree(tiny_source, tmp_path / "other")
    weights = read_weights(other)
    weights["model.decoder.norm.weight"][0] += 0.5
    write_weights(other, weights)
    with pytest.raises(CheckpointError, match=r"model.decoder.norm.weight differs from the source"):
        compare_with_source(tiny_4bit, FolderSource(other))


FORMATS = [f"{b}bit/{g}" for b in (1, 2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([*FORMATS, "mxfp4", "mxfp8", "nvfp4"]),
    st.sampled_from([mx.bfloat16, mx.float16, mx.float32]),
    st.integers(0, 2**32 - 1),
    st.floats(-4, 2),
    st.floats(-3, 3),
    st.sampled_from([1, 3, 7]),
)
def test_what_mlx_packs_is_within_the_bound(text, dtype, seed, size, shift, power):
    """Normal weights, weights far from zero, and weights with outliers."""
    fmt = Format.parse(text)
    normal = mx.random.normal((8, 256), key=mx.random.key(seed))
    weight = (10**size * (normal**power + shift)).astype(dtype)
    largest = mx.abs(weight).max()
    # Beyond, a range overflows fp16, and nvfp4's 8-bit scales end.
    reach = 6 * 448 if text == "nvfp4" else 2**14 if dtype == mx.float16 else float("inf")
    if not mx.isfinite(largest) or largest > reach:
        return
    compare(weight, mx.quantize(weight, **fmt.parameters), fmt, "a weight")


@pytest.mark.parametrize("text", ["4bit", "8bit", "mxfp4", "mxfp8", "nvfp4"])
def test_a_wrong_group_is_outside_the_bound(text):
    fmt = Format.parse(text)
    weight = mx.random.normal((4, 256), key=mx.random.key(0)).astype(mx.bfloat16)
    arrays = list(mx.quantize(weight, **fmt.parameters))
    arrays[0][2, 5] = arrays[0][2, 5] ^ 0xFFFFFFFF
    with pytest.raises(CheckpointError, match="a weight does not come back from"):
        compare(weight, tuple(arrays), fmt, "a weight")


def test_the_command(tiny_source, tiny_4bit, copy):
    good = run("verify", tiny_4bit, "--source", tiny_source)
    assert good.returncode == 0 and good.stderr == ""
    assert "8 files as written" in good.stdout and "of what their formats allow" in good.stdout
    found = json.loads(run("verify", tiny_4bit, "--json").stdout)
    assert found["files"] == 8
    flip(copy / "model.safetensors", 90_000)
    bad = run("verify", copy)
    assert bad.returncode == 1 and bad.stdout == ""
    assert bad.stderr == (
        f"error: {copy / 'model.safetensors'} is not as it was written (its checksum differs); "
        "fetch or convert it again.\n"
    )

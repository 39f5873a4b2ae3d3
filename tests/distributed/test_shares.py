"""Every parameter is held by the ranks exactly once, but for what all of them hold."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_models import make_config, make_weights

from mlx_diffgemma.bench.presets import config_like
from mlx_diffgemma.checkpoint.locate import RELEASE
from mlx_diffgemma.checkpoint.names import expected_shapes, module_path
from mlx_diffgemma.checkpoint.quantization import (
    RECIPES,
    Format,
    parameter_bytes,
    recipe_formats,
)
from mlx_diffgemma.checkpoint.ranges import GAP, runs_of
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.distributed.loading import local_model, share_of_weights
from mlx_diffgemma.distributed.shares import Share, Split, shares_of
from mlx_diffgemma.errors import UsageError


def release() -> ModelConfig:
    return ModelConfig.from_dict(config_like(RELEASE))


def formats_of(config: ModelConfig, recipe: str) -> dict[str, Format]:
    return recipe_formats(config, RECIPES[recipe])


def read(share: Share, formats: dict[str, Format]) -> int:
    """Bytes that a rank reads from disk of a model in these formats, gaps included."""
    total = 0
    for name, shape in expected_shapes(share.config).items():
        part, fmt = share.part(name), formats.get(module_path(name))
        if part is None:
            continue
        stored = [(shape, 2)]
        if fmt is not None and fmt.quantized:
            *rows, columns = shape
            scales = (*rows, columns // fmt.group_size)
            scale_bytes = round((fmt.bits_per_weight - fmt.bits) * fmt.group_size / 8)
            stored = [((*rows, columns * fmt.bits // 32), 4), (scales, scale_bytes)]
        for each, item in stored:
            total += runs_of(each, part.slices(each), item).with_gaps(GAP)
    return total


@pytest.mark.parametrize("weights", [(1, 1), (1, 1, 1, 1), (2, 1), (1, 2, 4), (1, 1, 1)])
@pytest.mark.parametrize("kind", ["tensor", "experts", "pipeline"])
@pytest.mark.parametrize("recipe", ["4bit", "bf16"])
def test_every_number_of_the_release_is_held_once_or_by_all(
    kind: str, weights: tuple[float, ...], recipe: str
) -> None:
    config = release()
    shares = shares_of(config, Split(kind, weights), formats_of(config, recipe))
    for name, shape in expected_shapes(config).items():
        parts = [part for share in shares if (part := share.part(name)) is not None]
        if all(part.axis is None for part in parts):
            assert len(parts) in (1, len(weights)), name
            continue
        assert len(parts) == len(weights), name
        extent = shape[parts[0].axis or 0]
        assert {part.extent for part in parts} == {extent}, name
        spans = [part.span for part in parts]
        if name.endswith(("k_proj.weight", "v_proj.weight")):  # repeated where heads are few
            spans = sorted(set(spans), key=lambda span: span.start)
        ends = [0, *(span.stop for span in spans)]
        assert [span.start for span in spans] == ends[:-1] and ends[-1] == extent, name


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_rank_holds_its_share_of_the_release(recipe: str, ranks: int) -> None:
    config = release()
    formats = formats_of(config, recipe)
    sizes = parameter_bytes(config, formats)
    whole = sum(sizes.values())
    for kind in ("tensor", "pipeline"):
        for share in shares_of(config, Split.even(kind, ranks), formats):
            assert share.held_bytes(sizes) <= (1 / ranks + 0.05) * whole, (kind, share.rank)
            assert read(share, formats) <= (1 / ranks + 0.05) * whole, (kind, share.rank)


def test_shares_follow_weights() -> None:
    config = release()
    formats = formats_of(config, "4bit")
    sizes = parameter_bytes(config, formats)
    for kind in ("tensor", "pipeline"):
        first, second = shares_of(config, Split(kind, (2, 1)), formats)
        assert 1.8 < first.held_bytes(sizes) / second.held_bytes(sizes) < 2.2
    first, second = shares_of(config, Split("tensor", (2, 1)), formats)
    assert (len(first.experts), len(first.words)) == (85, 21 * 8192)
    assert len(first.width) == 22 * 64
    assert [len(first.heads[0].keys), len(second.heads[0].queries)] == [5, 6]


def test_kv_heads_are_repeated_where_there_are_fewer_than_ranks() -> None:
    shares = shares_of(release(), Split.even("tensor", 4))
    full = [share.heads[5] for share in shares]
    assert [heads.keys for heads in full] == [range(1), range(1), range(1, 2), range(1, 2)]
    assert [heads.queries for heads in full] == [range(a, a + 4) for a in (0, 4, 8, 12)]
    for share in shares_of(release(), Split("tensor", (1, 2, 4))):
        for heads in share.heads:
            assert len(heads.queries) % len(heads.keys) == 0


def test_the_modules_of_a_rank_take_what_it_holds_of_packed_weights() -> None:
    config = ModelConfig.from_dict(
        make_config(3, head_dim=64, global_head_dim=64, hidden_size=64, intermediate_size=192,
                    moe_intermediate_size=64, num_key_value_heads=2, num_experts=5)
    )  # fmt: skip
    plain = {name: mx.array(value) for name, value in make_weights(config).items()}
    packed: dict[str, mx.array] = {}
    formats = {}
    for name, array in plain.items():
        if array.ndim < 2:
            packed[name] = array
            continue
        fmt = formats[module_path(name)] = Format.make(bits=3, group=64)
        weight, scales, biases = mx.quantize(array, **fmt.parameters)
        path = module_path(name)
        packed |= {f"{path}.weight": weight, f"{path}.scales": scales, f"{path}.biases": biases}
    for kind in ("tensor", "experts", "pipeline"):
        for share in shares_of(config, Split(kind, (2, 1)), formats, chunk=64):
            wanted = dict(tree_flatten(local_model(share).parameters()))
            own = share_of_weights(share, plain)
            assert {n: a.shape for n, a in own.items()} == {n: a.shape for n, a in wanted.items()}
            cut = share_of_weights(share, packed)
            for name in plain:
                part, path = share.part(name), module_path(name)
                if path not in formats or part is None:
                    continue
                here = module_path(part.name)
                names = (f"{here}.{each}" for each in ("weight", "scales", "biases"))
                back = mx.dequantize(*(cut[each] for each in names), **formats[path].parameters)
                entire = (packed[f"{path}.{each}"] for each in ("weight", "scales", "biases"))
                whole = mx.dequantize(*entire, **formats[path].parameters)
                np.testing.assert_array_equal(back, whole[part.slices(whole.shape)])


@pytest.mark.parametrize(
    ("split", "changes", "line"),
    [
        (Split.even("tensor", 5), {}, "5 ranks cannot share 4 query heads with"),
        (Split.even("experts", 9), {"num_experts": 8}, "9 ranks cannot share 8 experts;"),
        (Split.even("pipeline", 7), {}, "7 ranks cannot share 6 layers;"),
    ],
)
def test_a_line_says_why_a_model_cannot_be_cut(
    split: Split, changes: dict[str, int], line: str
) -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    data = make_config(num_experts=5, layer_types=kinds, num_hidden_layers=6, top_k_experts=2)
    config = ModelConfig.from_dict(data)
    config = replace(config, text=replace(config.text, **changes))
    with pytest.raises(UsageError, match=line):
        shares_of(config, split)


def test_groups_are_not_cut() -> None:
    config = ModelConfig.from_dict(make_config(intermediate_size=64, num_key_value_heads=4))
    down = {"model.decoder.layers.1.mlp.down_proj": Format.make(bits=4, group=64)}
    with pytest.raises(UsageError, match="1 quantization groups of 64"):
        shares_of(config, Split.even("tensor", 2), down)
    output = {"model.decoder.layers.0.self_attn.o_proj": Format.make(bits=4, group=64)}
    with pytest.raises(UsageError, match="for the quantization groups of the output"):
        shares_of(config, Split.even("tensor", 2), output)


@pytest.mark.parametrize("weights", [(), (1.0, 0.0), (1.0, float("nan")), (1.0, -2.0)])
def test_weights_must_be_above_zero(weights: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="one weight above 0"):
        Split("tensor", weights)
    with pytest.raises(UsageError, match="choose tensor, experts, pipeline"):
        Split("layers", (1.0, 1.0))

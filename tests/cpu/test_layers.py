"""The CPU's layers compute what the layers do whose place they take."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_diffgemma import cpu
from mlx_diffgemma.bench.counted import replaced
from mlx_diffgemma.cpu import layers
from mlx_diffgemma.cpu.layers import (
    DequantizedLinear,
    DequantizedSwitchLinear,
    DequantizedTable,
    GroupedSwitchLinear,
)

FORMATS = [
    {"group_size": 32, "bits": 4, "mode": "affine"},
    {"group_size": 64, "bits": 8, "mode": "affine"},
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
]


def close(a: mx.array, b: mx.array) -> None:
    scale = float(mx.abs(b).max().item())
    np.testing.assert_allclose(np.array(a), np.array(b), rtol=0, atol=2e-3 * scale)
    assert np.median(np.abs(np.array(a) - np.array(b))) < 2e-4 * scale


@pytest.mark.parametrize("how", FORMATS, ids=lambda f: f"{f['mode']}{f['bits']}")
@pytest.mark.parametrize("bias", [False, True])
def test_linear(how: dict, bias: bool) -> None:
    layer = nn.Linear(64, 48, bias=bias).to_quantized(**how)
    x = mx.random.normal((2, 5, 64), key=mx.random.key(1))
    expected = layer(x)
    cpu.use(layer)
    assert type(layer) is DequantizedLinear
    assert layer(x).dtype == mx.float32
    close(layer(x), expected)


@pytest.mark.parametrize("how", [None, *FORMATS])
@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("pairs", [1, 7, 200])
def test_experts(how: dict | None, sort: bool, pairs: int) -> None:
    layer = SwitchLinear(64, 40, 9, bias=False)
    if how is not None:
        layer = layer.to_quantized(**how)
    layer.eval()
    x = mx.random.normal((pairs, 1, 64), key=mx.random.key(2))
    indices = mx.random.randint(0, 7, (pairs,), key=mx.random.key(3)).astype(mx.uint32)
    if sort:
        indices = mx.sort(indices)
    expected = layer(x, indices, sorted_indices=sort)
    cpu.use(layer)
    assert type(layer) in (GroupedSwitchLinear, DequantizedSwitchLinear)
    close(layer(x, indices, sorted_indices=sort), expected)
    with replaced(layers, "_BLOCK", 16 * 64):  # blocks of 16, 16 and 8 of the 40 rows
        close(layer(x, indices, sorted_indices=sort), expected)


def test_a_table_is_dequantized_once_for_both_of_its_products() -> None:
    embedding = nn.Embedding(48, 64).to_quantized(group_size=32, bits=4)
    rows = embedding(mx.arange(48))
    x, weights = (mx.random.normal((3, n), key=mx.random.key(n)) for n in (64, 16))
    table, calls = DequantizedTable.of(embedding, mx.float32).part(16, 32), []

    def dequantize(*args: object, **kwargs: object) -> mx.array:
        calls.append(args)
        return own(*args, **kwargs)

    own = mx.dequantize
    with replaced(mx, "dequantize", dequantize):
        scores, expected = table.product(x), table.expected(weights)
    close(scores, x @ rows[16:32].T)
    close(expected, weights @ rows[16:32])
    assert len(calls) == 1


def test_experts_can_be_differentiated_in_training() -> None:
    layer = SwitchLinear(16, 8, 3, bias=False)
    cpu.use(layer)
    layer.train()
    x, indices = mx.ones((4, 1, 16)), mx.array([0, 2, 2, 1], mx.uint32)
    gradient = mx.grad(lambda x: layer(x, indices).sum())(x)
    assert gradient.shape == x.shape and mx.isfinite(gradient).all().item()


def test_other_layers_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 4))
    cpu.use(model)
    assert [type(layer) for layer in model.layers] == [nn.Linear, nn.Embedding]

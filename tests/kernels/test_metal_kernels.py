"""The Metal source of each kernel against its plain-MLX twin: run on the CPU by the emulator, and
on the GPU itself where there is one (marker `metal`)."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from metal_emulator import MetalEmulator

from mlx_diffgemma.kernels.accept_renoise import accept_renoise
from mlx_diffgemma.kernels.allowed_tokens import pack_allowed
from mlx_diffgemma.kernels.dispatch import Launcher, launch_on_metal, override
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.expert_combine import expert_combine
from mlx_diffgemma.kernels.tile_epilogue import tile_epilogue
from mlx_diffgemma.kernels.vocabulary import vocabulary_pass
from mlx_diffgemma.kernels.weighted_rows import weighted_rows

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
on_linux = pytest.mark.skipif(sys.platform == "darwin", reason="there the GPU runs them: -m metal")


@pytest.fixture(
    params=[
        pytest.param(0, id="forward", marks=on_linux),
        pytest.param(1, id="backward", marks=on_linux),
        pytest.param(7, id="shuffled", marks=on_linux),
        pytest.param("metal", id="metal", marks=pytest.mark.metal),
    ]
)
def launcher(request: pytest.FixtureRequest, emulator_folder: Path) -> Launcher:
    """What runs the Metal source, in every order of its threads."""
    if request.param == "metal":
        return launch_on_metal
    return MetalEmulator(emulator_folder, schedule=request.param)


def normal(
    *shape: int, seed: int = 0, scale: float = 1.0, dtype: mx.Dtype = mx.float32
) -> mx.array:
    values = np.random.default_rng([seed, *shape]).normal(size=shape) * scale
    return mx.array(values.astype(np.float32)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "tokens"), [(1, 1), (3, 127), (2, 128), (9, 700), (2, 4096)])
def test_tile_epilogue(launcher: Launcher, dtype: mx.Dtype, count: int, tokens: int) -> None:
    raw = normal(count, tokens, scale=20, dtype=dtype)
    # Running maxima below, among and above those of the tile.
    before = mx.array(np.linspace(-76, 76, count).astype(np.float32))
    allowed = np.random.default_rng(tokens).random((count, tokens)) < 0.1
    allowed[0] = False
    settings = {"softcap": 30.0, "temperature": 0.4}
    for words, kept in ((None, None), (None, dtype), (pack_allowed(mx.array(allowed)), dtype)):
        args = (raw, before, words)
        ours = tile_epilogue(*args, **settings, dtype=kept, implementation=launcher)
        twin = tile_epilogue(*args, **settings, dtype=kept, implementation="mlx")
        np.testing.assert_allclose(ours.maximum, twin.maximum, rtol=1e-6)
        assert np.array_equal(ours.exceeds, twin.exceeds)
        decided = np.array(twin.exceeds)
        assert np.array_equal(np.array(ours.argmax)[decided], np.array(twin.argmax)[decided])
        np.testing.assert_allclose(ours.masses, twin.masses, rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(ours.weighted, twin.weighted, rtol=1e-4, atol=1e-12)
        if kept is None:
            assert ours.exponentials is None and twin.exponentials is None
            continue
        assert ours.exponentials.dtype == twin.exponentials.dtype == kept
        precision = {mx.float32: 5e-5, mx.float16: 2e-3, mx.bfloat16: 1e-2}[kept]
        np.testing.assert_allclose(
            ours.exponentials.astype(mx.float32),
            twin.exponentials.astype(mx.float32),
            rtol=precision,
            atol=1e-7,
        )


def test_tile_epilogue_takes_the_first_of_equals(launcher: Launcher) -> None:
    raw = np.zeros((4, 1500), np.float32)
    raw[1, [1499, 700, 699]] = 5
    raw[2, [1030, 131, 1029]] = 5
    raw[3] = 400  # all at the softcap
    found = tile_epilogue(
        mx.array(raw),
        mx.full((4,), -80.0),
        None,
        softcap=30.0,
        temperature=0.4,
        dtype=None,
        implementation=launcher,
    )
    assert found.argmax.tolist() == [0, 699, 131, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "chosen", "width"), [(1, 1, 7), (3, 5, 256), (4, 9, 300)])
def test_weighted_rows_of_a_plain_table(
    launcher: Launcher, dtype: mx.Dtype, count: int, chosen: int, width: int
) -> None:
    table = EmbeddingTable(normal(50, width, dtype=dtype), dtype)
    compare_weighted_rows(launcher, table, count, chosen)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("group_size", "dtype"), [(32, mx.float16), (64, mx.bfloat16)])
@pytest.mark.parametrize("width", [64, 320])
def test_weighted_rows_of_an_affine_table(
    launcher: Launcher, bits: int, group_size: int, dtype: mx.Dtype, width: int
) -> None:
    packed = mx.quantize(normal(50, width, dtype=dtype), group_size, bits)
    table = EmbeddingTable(packed[0], dtype, *packed[1:], group_size, bits)
    compare_weighted_rows(launcher, table, 3, 6)


def compare_weighted_rows(
    launcher: Launcher, table: EmbeddingTable, count: int, chosen: int
) -> None:
    rng = np.random.default_rng(count)
    ids = mx.array(rng.integers(0, table.vocab_size, (count, chosen)), mx.int32)
    weights = rng.random((count, chosen)).astype(np.float32)
    weights[:, 1:][rng.random((count, chosen - 1)) < 0.3] = 0
    ours = weighted_rows(ids, mx.array(weights), table, implementation=launcher)
    twin = weighted_rows(ids, mx.array(weights), table, implementation="mlx")
    assert ours.dtype == twin.dtype == mx.float32
    np.testing.assert_allclose(ours, twin, rtol=1e-5, atol=1e-5)


def test_weighted_rows_of_another_form_take_the_twin(launcher: Launcher) -> None:
    packed = mx.quantize(normal(50, 64), 32, 4, mode="mxfp4")
    table = EmbeddingTable(packed[0], mx.bfloat16, packed[1], None, 32, 4, "mxfp4")
    compare_weighted_rows(launcher, table, 3, 6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "top_k", "width"), [(1, 1, 5), (7, 2, 300), (10, 8, 64)])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_expert_combine(
    launcher: Launcher, dtype: mx.Dtype, count: int, top_k: int, width: int, is_sorted: bool
) -> None:
    rng = np.random.default_rng(width)
    outputs = normal(count * top_k, width, dtype=dtype)
    weights = mx.array(rng.random((count, top_k)).astype(np.float32))
    places = mx.argsort(mx.array(rng.permutation(count * top_k))) if is_sorted else None
    ours = expert_combine(outputs, places, weights, implementation=launcher)
    twin = expert_combine(outputs, places, weights, implementation="mlx")
    assert ours.dtype == twin.dtype == dtype
    precision = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 1e-2}[dtype]
    np.testing.assert_allclose(
        ours.astype(mx.float32), twin.astype(mx.float32), rtol=precision, atol=precision
    )


@pytest.mark.parametrize(("rows", "canvas"), [(1, 1), (3, 31), (2, 256), (1, 700)])
@pytest.mark.parametrize("seed", range(3))
def test_accept_renoise(launcher: Launcher, rows: int, canvas: int, seed: int) -> None:
    rng = np.random.default_rng([seed, canvas])
    entropy = (rng.random((rows, canvas)) ** 4).astype(np.float32)
    entropy[:, ::3] = 0  # ties, as converged positions give
    draw = mx.array(rng.integers(0, 1000, (rows, canvas)), mx.int32)
    noise = mx.array(rng.integers(0, 1000, (rows, canvas)), mx.int32)
    args = (mx.array(entropy), draw, noise, 0.1)
    canvas_ours, ours = accept_renoise(*args, implementation=launcher)
    canvas_twin, twin = accept_renoise(*args, implementation="mlx")
    assert canvas_ours.dtype == canvas_twin.dtype == mx.int32
    exact = entropy.astype(np.float64)
    order = np.argsort(exact, axis=-1, kind="stable")
    ascending = np.take_along_axis(exact, order, axis=-1)
    before = np.empty_like(exact)
    np.put_along_axis(before, order, np.cumsum(ascending, axis=-1) - ascending, axis=-1)
    clear = np.abs(before - 0.1) > 1e-5  # the rest is a matter of rounding
    assert clear.mean() > 0.9
    for accepted, chosen in ((ours, canvas_ours), (twin, canvas_twin)):
        assert np.array_equal(np.array(accepted)[clear], (before <= 0.1)[clear])
        assert np.array_equal(chosen, mx.where(accepted, draw, noise))


def test_an_entropy_that_is_not_a_number_is_not_accepted(launcher: Launcher) -> None:
    entropy = mx.array([[0.0, float("nan"), 0.01]])
    ids = mx.zeros((1, 3), mx.int32)
    for implementation in (launcher, "mlx"):
        _, accepted = accept_renoise(entropy, ids, ids + 1, 0.1, implementation=implementation)
        assert accepted.tolist() == [[True, False, True]]


def test_a_whole_pass_with_every_kernel_forced_on(launcher: Launcher) -> None:
    table = EmbeddingTable(normal(1000, 64, scale=0.5), mx.float32)
    hidden = normal(2, 6, 64)
    allowed = np.random.default_rng(0).random((2, 6, 1000)) < 0.5
    arguments = {
        "softcap": 30.0,
        "temperature": 0.5,
        "keys": mx.array([[1, 2], [3, 4]], mx.uint32),
        "allowed": pack_allowed(mx.array(allowed)),
        "tile": 256,
    }
    with override(launcher):
        ours = vocabulary_pass(hidden, table, **arguments)
        mx.eval(ours.soft_embeddings)
    with override("mlx"):
        twin = vocabulary_pass(hidden, table, **arguments)
    assert np.array_equal(ours.argmax, twin.argmax)
    assert np.array_equal(ours.draw, twin.draw)
    np.testing.assert_allclose(ours.entropy, twin.entropy, atol=1e-5)
    np.testing.assert_allclose(ours.soft_embeddings, twin.soft_embeddings, atol=1e-4)
    if isinstance(launcher, MetalEmulator):
        assert launcher.launches.count("tile_epilogue") == 4

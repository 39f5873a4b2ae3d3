"""The Metal source of each kernel against its plain-MLX twin: run on the CPU by the emulator, and
on the GPU itself where there is one (marker `metal`)."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from metal_emulator import MetalEmulator
from vocabulary_cases import make_hidden, make_table, packed

from mlx_diffgemma.kernels.accept_renoise import accept_renoise
from mlx_diffgemma.kernels.allowed_tokens import pack_allowed
from mlx_diffgemma.kernels.dispatch import Launcher, launch_on_metal, override
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.expert_combine import expert_combine
from mlx_diffgemma.kernels.vocabulary import Row, vocabulary_pass
from mlx_diffgemma.kernels.vocabulary_chunk import (
    BEST,
    Chunk,
    Running,
    Wanted,
    vocabulary_chunk,
)
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


def some_chunks(
    sizes: tuple[int, ...],
    count: int,
    dtype: mx.Dtype,
    wanted: Wanted,
    implementation: Launcher | str,
    seed: int = 0,
) -> list[Chunk]:
    """What follows each of the chunks of these sizes, one after another."""
    chunks, state, start = [], Running.start(count), 0
    for place, size in enumerate(sizes):
        raw = normal(count, size, seed=place + seed, scale=20, dtype=dtype)
        chunk = vocabulary_chunk(
            raw,
            state,
            wanted,
            start=start,
            place=place,
            dtype=dtype,
            implementation=implementation,
        )
        chunks.append(chunk)
        state, start = chunk.running, start + size
    return chunks


def wanted_of(count: int, sizes: tuple[int, ...], mode: str) -> Wanted:
    rng = np.random.default_rng([count, *sizes])
    vocab = sum(sizes)
    wanted = Wanted(30.0, mx.array((30 / rng.uniform(0.4, 1, count)).astype(np.float32)))
    if mode in ("draw", "all"):
        chances = rng.random((2 * len(sizes) + 1, count)).astype(np.float32)
        chances[: len(sizes)] = rng.gumbel(size=(len(sizes), count))
        standing = rng.integers(0, vocab, count)
        wanted = replace(wanted, chances=mx.array(chances), standing=mx.array(standing, mx.int32))
    if mode in ("masks", "all"):
        allowed = rng.random((3, vocab)) < 0.1
        allowed[0] = False
        allowed[1] = np.arange(vocab) == vocab - 1
        which = mx.array(rng.integers(-1, 3, count), mx.int32)
        wanted = replace(wanted, which=which, masks=pack_allowed(mx.array(allowed)))
    if mode in ("dense", "all"):
        slots = np.full(count, -1, np.int32)
        slots[rng.random(count) < 0.5] = 0
        slots[-1] = 0
        slots[slots == 0] = np.arange((slots == 0).sum())
        wanted = replace(wanted, slots=mx.array(slots), dense=int(slots.max()) + 1)
    return wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["plain", "draw", "masks", "dense", "all"])
@pytest.mark.parametrize(
    ("count", "sizes"), [(1, (1,)), (3, (127,)), (9, (256, 256, 188)), (2, (2048, 1000))]
)
def test_vocabulary_chunk(
    launcher: Launcher, dtype: mx.Dtype, mode: str, count: int, sizes: tuple[int, ...]
) -> None:
    wanted = wanted_of(count, sizes, mode)
    ours = some_chunks(sizes, count, dtype, wanted, launcher)
    twins = some_chunks(sizes, count, dtype, wanted, "mlx")
    for mine, twin in zip(ours, twins, strict=True):
        here, there = mine.running, twin.running
        assert np.array_equal(here.best_tokens, there.best_tokens)
        assert np.array_equal(here.draw, there.draw)
        for name in ("best", "draw_logit", "standing_logit", "race"):
            np.testing.assert_allclose(getattr(here, name), getattr(there, name), rtol=2e-6)
        np.testing.assert_allclose(here.total, there.total, rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(here.weighted, there.weighted, rtol=1e-4, atol=1e-12)
        assert (mine.exponentials is None) == (twin.exponentials is None) == (wanted.dense == 0)
        if wanted.dense == 0:
            continue
        assert mine.exponentials.dtype == twin.exponentials.dtype == dtype
        precision = {mx.float32: 5e-5, mx.float16: 2e-3, mx.bfloat16: 1e-2}[dtype]
        np.testing.assert_allclose(
            mine.exponentials.astype(mx.float32),
            twin.exponentials.astype(mx.float32),
            rtol=precision,
            atol=1e-7,
        )
        np.testing.assert_allclose(mine.shrink, twin.shrink, rtol=5e-5)


def test_vocabulary_chunk_of_the_size_that_a_gpu_gets(launcher: Launcher) -> None:
    sizes = (8192, 8192)
    wanted = wanted_of(2, sizes, "all")
    ours = some_chunks(sizes, 2, mx.bfloat16, wanted, launcher)[-1].running
    twin = some_chunks(sizes, 2, mx.bfloat16, wanted, "mlx")[-1].running
    assert np.array_equal(ours.tokens, twin.tokens)
    np.testing.assert_allclose(ours.numbers, twin.numbers, rtol=1e-4)


def test_vocabulary_chunk_takes_the_first_of_equals(launcher: Launcher) -> None:
    raw = np.zeros((4, 1500), np.float32)
    raw[1, [1499, 700, 699]] = 5
    raw[2, [1030, 131, 1029]] = 5
    raw[3] = 400  # all at the softcap
    wanted = Wanted(30.0, mx.full((4,), 75.0))
    state = Running.start(4)
    for place in range(2):  # the same again changes nothing
        state = vocabulary_chunk(
            mx.array(raw),
            state,
            wanted,
            start=1536 * place,
            place=place,
            dtype=mx.float32,
            implementation=launcher,
        ).running
    zeros = list(range(BEST))
    expected = [zeros, [699, 700, 1499], [131, 1029, 1030], zeros]
    for row in range(4):
        tops = expected[row]
        if len(tops) == 3:
            tops = [*tops, *(token + 1536 for token in tops), *range(BEST - 6)]
        assert state.best_tokens[row].tolist() == tops


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_product_that_is_not_finite_leaves_no_sum(launcher: Launcher, value: float) -> None:
    raw = normal(3, 700)
    raw[1, 699] = value
    for implementation in (launcher, "mlx"):
        state = vocabulary_chunk(
            raw,
            Running.start(3),
            Wanted(30.0, mx.full((3,), 75.0)),
            start=0,
            place=0,
            dtype=mx.float32,
            implementation=implementation,
        ).running
        assert np.isnan(np.array(state.total)).tolist() == [False, True, False]
        assert np.isfinite(np.array(state.best)).all()


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


@pytest.mark.parametrize("form", ["float32", "bfloat16", "affine-4"])
def test_a_whole_pass_with_every_kernel_forced_on(launcher: Launcher, form: str) -> None:
    table, lengths = make_table(1000, 64, form), (6, 5, 4, 3)
    hidden = make_hidden(*lengths)
    allowed = np.random.default_rng(0).random((6, 1000)) < 0.5
    fixed = np.array([-1, 7, -1, -1], np.int32)
    rows = [
        Row(6, 0.5, mx.array([1, 2], mx.uint32), allowed=packed(allowed)),
        Row(5, 0.8, soft_cutoff=5.0, likely=True),
        Row(4, 0.3, mx.array([3, 4], mx.uint32), fixed=fixed, soft_cutoff=5.0),
        Row(3, 0.6, mx.array([5, 6], mx.uint32), need_soft=False),
    ]
    run = partial(
        vocabulary_pass,
        hidden,
        table,
        rows,
        softcap=30.0,
        chunk=256,
        standing=mx.full((18,), 600, mx.int32),
    )
    with override(launcher):
        ours = run()
        mx.eval(ours.soft_embeddings)
    with override("mlx"):
        twin = run()
    assert np.array_equal(ours.argmax, twin.argmax)
    assert np.array_equal(ours.draw, twin.draw)
    for name in (
        "argmax_log_probability",
        "entropy",
        "log_sum",
        "draw_log_probability",
        "standing_log_probability",
        "dropped_mass",
    ):
        np.testing.assert_allclose(getattr(ours, name), getattr(twin, name), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.soft_embeddings, twin.soft_embeddings, atol=1e-4)
    if isinstance(launcher, MetalEmulator):
        assert launcher.launches.count("vocabulary_chunk") == 4
        assert sum(name.startswith("weighted_rows") for name in launcher.launches) == 1

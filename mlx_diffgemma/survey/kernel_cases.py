"""The Metal source of each kernel beside its plain-MLX twin, over shapes, types and edges.

The tests run these cases on a CPU with an emulator, and `mlx-diffgemma report` on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import mlx.core as mx
import numpy as np

from mlx_diffgemma.kernels.accept_renoise import accept_renoise
from mlx_diffgemma.kernels.allowed_tokens import pack_allowed
from mlx_diffgemma.kernels.dispatch import Implementation, Launcher
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.expert_combine import expert_combine
from mlx_diffgemma.kernels.vocabulary_chunk import BEST, Chunk, Running, Wanted, vocabulary_chunk
from mlx_diffgemma.kernels.weighted_rows import weighted_rows
from mlx_diffgemma.survey.comparing import Case, Comparison

_CHUNK, _RENOISE, _COMBINE = "vocabulary_chunk", "accept_renoise", "expert_combine"
_ROWS, _PLAIN, _AFFINE = "weighted_rows", "weighted_rows_plain", "weighted_rows_affine"
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_PRECISION = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 1e-2}
_MODES = ("plain", "draw", "masks", "dense", "all")
_CHUNKS = ((1, (1,)), (3, (127,)), (9, (256, 256, 188)), (2, (2048, 1000)))
_TINY = 1e-12  # of sums that may be zero


def kernel_cases() -> Iterator[Case]:
    """Every case, kernel by kernel."""
    yield from _of_chunks()
    yield from _of_rows()
    yield from _of_experts()
    yield from _of_acceptance()


def normal(
    *shape: int, seed: int = 0, scale: float = 1.0, dtype: mx.Dtype = mx.float32
) -> mx.array:
    """Random numbers that depend on the seed and the shape alone."""
    values = np.random.default_rng([seed, *shape]).normal(size=shape) * scale
    return mx.array(values.astype(np.float32)).astype(dtype)


def _of_chunks() -> Iterator[Case]:
    for (dtype, kind), mode, (count, sizes) in product(_DTYPES.items(), _MODES, _CHUNKS):
        name = f"{dtype}, {mode}, positions: {count}, chunks: {', '.join(map(str, sizes))}"
        check = partial(_chunks, kind, mode, count, sizes)
        yield Case(_CHUNK, name, check, {_CHUNK: len(sizes)})
    yield Case(_CHUNK, "the size that a GPU gets", _large_chunks, {_CHUNK: 2})
    yield Case(_CHUNK, "of equals the first", _first_of_equals, {_CHUNK: 2})
    for value in ("nan", "inf", "-inf"):
        yield Case(
            _CHUNK, f"a product that is {value}", partial(_not_finite, float(value)), {_CHUNK: 1}
        )


def _wanted(count: int, sizes: tuple[int, ...], mode: str) -> Wanted:
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


def _after_each(
    sizes: tuple[int, ...],
    count: int,
    dtype: mx.Dtype,
    wanted: Wanted,
    implementation: Launcher | Implementation,
) -> list[Chunk]:
    """What there is after each of the chunks of these sizes, one after another."""
    chunks: list[Chunk] = []
    state, start = Running.start(count), 0
    for place, size in enumerate(sizes):
        raw = normal(count, size, seed=place, scale=20, dtype=dtype)
        chunks.append(
            vocabulary_chunk(
                raw, state, wanted,
                start=start, place=place, dtype=dtype, implementation=implementation,
            )
        )  # fmt: skip
        state, start = chunks[-1].running, start + size
    return chunks


def _chunks(
    dtype: mx.Dtype,
    mode: str,
    count: int,
    sizes: tuple[int, ...],
    how: Implementation | Launcher,
    found: Comparison,
) -> None:
    wanted = _wanted(count, sizes, mode)
    ours = _after_each(sizes, count, dtype, wanted, how)
    twins = _after_each(sizes, count, dtype, wanted, "mlx")
    for mine, twin in zip(ours, twins, strict=True):
        here, there = mine.running, twin.running
        found.equal("likeliest tokens", here.best_tokens, there.best_tokens)
        found.equal("draws", here.draw, there.draw)
        for name in ("best", "draw_logit", "standing_logit"):
            found.close(name, getattr(here, name), getattr(there, name), rtol=2e-6)
        found.close("race", here.race, there.race, rtol=2e-6, atol=1e-4)
        for name in ("total", "weighted"):
            found.close(name, getattr(here, name), getattr(there, name), rtol=1e-4, atol=_TINY)
        given = [each.exponentials is not None for each in (mine, twin)]
        found.holds("exponentials where they are wanted", given == [wanted.dense > 0] * 2)
        if mine.exponentials is None or twin.exponentials is None:
            continue
        assert mine.shrink is not None and twin.shrink is not None
        found.holds(f"exponentials in {dtype}", mine.exponentials.dtype == dtype)
        precision = max(5e-5, _PRECISION[dtype])
        found.close("exponentials", mine.exponentials, twin.exponentials, rtol=precision, atol=1e-7)
        found.close("shrink", mine.shrink, twin.shrink, rtol=5e-5)


def _large_chunks(how: Implementation | Launcher, found: Comparison) -> None:
    sizes = (8192, 8192)
    wanted = _wanted(2, sizes, "all")
    ours = _after_each(sizes, 2, mx.bfloat16, wanted, how)[-1].running
    twin = _after_each(sizes, 2, mx.bfloat16, wanted, "mlx")[-1].running
    found.equal("tokens", ours.tokens, twin.tokens)
    found.close("numbers", ours.numbers, twin.numbers, rtol=1e-4)


def _first_of_equals(how: Implementation | Launcher, found: Comparison) -> None:
    raw = np.zeros((4, 1500), np.float32)
    raw[1, [1499, 700, 699]] = 5
    raw[2, [1030, 131, 1029]] = 5
    raw[3] = 400  # all at the softcap
    wanted = Wanted(30.0, mx.full((4,), 75.0))
    state = Running.start(4)
    for place in range(2):  # the same again changes nothing
        state = vocabulary_chunk(
            mx.array(raw), state, wanted,
            start=1536 * place, place=place, dtype=mx.float32, implementation=how,
        ).running  # fmt: skip
    zeros = list(range(BEST))
    expected = [zeros, zeros, zeros, zeros]
    for row, tops in ((1, [699, 700, 1499]), (2, [131, 1029, 1030])):
        expected[row] = [*tops, *(token + 1536 for token in tops), *range(BEST - 6)]
    found.equal("likeliest tokens", state.best_tokens, expected)


def _not_finite(value: float, how: Implementation | Launcher, found: Comparison) -> None:
    raw = normal(3, 700)
    raw[1, 699] = value
    both: tuple[Implementation | Launcher, ...] = (how, "mlx")
    for implementation in both:
        state = vocabulary_chunk(
            raw, Running.start(3), Wanted(30.0, mx.full((3,), 75.0)),
            start=0, place=0, dtype=mx.float32, implementation=implementation,
        ).running  # fmt: skip
        found.equal("sums without a value", mx.isnan(state.total), [False, True, False])
        found.equal("finite logits", mx.isfinite(state.best), np.ones((3, BEST)))


def _of_rows() -> Iterator[Case]:
    shapes = ((1, 1, 7), (3, 5, 256), (4, 9, 300))
    for (dtype, kind), (count, chosen, width) in product(_DTYPES.items(), shapes):
        table = partial(_plain_table, width, kind)
        check = partial(_rows, table, count, chosen)
        yield Case(
            _ROWS, f"{dtype}, sums: {count}, rows: {chosen}, width: {width}", check, {_PLAIN: 1}
        )
    formats = ((32, "float16"), (64, "bfloat16"))
    for bits, (group, dtype), width in product((2, 4, 8), formats, (64, 320)):
        affine = partial(_affine_table, width, group, bits, _DTYPES[dtype])
        name = f"{dtype}, bits: {bits}, groups of {group}, width: {width}"
        yield Case(_ROWS, name, partial(_rows, affine, 3, 6), {_AFFINE: 1})
    yield Case(_ROWS, "mxfp4, which takes the twin", partial(_rows, _mxfp4_table, 3, 6))


def _plain_table(width: int, dtype: mx.Dtype) -> EmbeddingTable:
    return EmbeddingTable(normal(50, width, dtype=dtype), dtype)


def _affine_table(width: int, group: int, bits: int, dtype: mx.Dtype) -> EmbeddingTable:
    packed = mx.quantize(normal(50, width, dtype=dtype), group, bits)
    return EmbeddingTable(packed[0], dtype, *packed[1:], group_size=group, bits=bits)


def _mxfp4_table() -> EmbeddingTable:
    packed = mx.quantize(normal(50, 64), 32, 4, mode="mxfp4")
    return EmbeddingTable(packed[0], mx.bfloat16, packed[1], None, 32, 4, "mxfp4")


def _rows(
    make: Callable[[], EmbeddingTable],
    count: int,
    chosen: int,
    how: Implementation | Launcher,
    found: Comparison,
) -> None:
    table, rng = make(), np.random.default_rng(count)
    ids = mx.array(rng.integers(0, table.vocab_size, (count, chosen)), mx.int32)
    weights = rng.random((count, chosen)).astype(np.float32)
    weights[:, 1:][rng.random((count, chosen - 1)) < 0.3] = 0
    ours = weighted_rows(ids, mx.array(weights), table, implementation=how)
    twin = weighted_rows(ids, mx.array(weights), table, implementation="mlx")
    found.holds("sums in float32", ours.dtype == mx.float32)
    found.close("sums", ours, twin, rtol=1e-5, atol=1e-5)


def _of_experts() -> Iterator[Case]:
    shapes = ((1, 1, 5), (7, 2, 300), (10, 8, 64))
    for (dtype, kind), (count, top_k, width), is_sorted in product(
        _DTYPES.items(), shapes, (True, False)
    ):
        name = f"{dtype}, tokens: {count}, experts: {top_k}, width: {width}"
        check = partial(_experts, kind, count, top_k, width, is_sorted)
        yield Case(_COMBINE, f"{name}, {'sorted' if is_sorted else 'as routed'}", check,
                   {_COMBINE: 1})  # fmt: skip


def _experts(
    dtype: mx.Dtype,
    count: int,
    top_k: int,
    width: int,
    is_sorted: bool,
    how: Implementation | Launcher,
    found: Comparison,
) -> None:
    rng = np.random.default_rng(width)
    outputs = normal(count * top_k, width, dtype=dtype)
    weights = mx.array(rng.random((count, top_k)).astype(np.float32))
    places = mx.argsort(mx.array(rng.permutation(count * top_k))) if is_sorted else None
    ours = expert_combine(outputs, places, weights, implementation=how)
    twin = expert_combine(outputs, places, weights, implementation="mlx")
    precision = _PRECISION[dtype]
    found.holds(f"sums in {dtype}", ours.dtype == dtype)
    found.close("sums", ours, twin, rtol=precision, atol=precision)


def _of_acceptance() -> Iterator[Case]:
    for (rows, canvas), seed in product(((1, 1), (3, 31), (2, 256), (1, 700)), range(3)):
        check = partial(_acceptance, rows, canvas, seed)
        yield Case(
            _RENOISE, f"canvases: {rows}, positions: {canvas}, seed: {seed}", check, {_RENOISE: 1}
        )
    yield Case(_RENOISE, "an entropy that is not a number", _no_number, {_RENOISE: 1})


def _acceptance(
    rows: int, canvas: int, seed: int, how: Implementation | Launcher, found: Comparison
) -> None:
    bound, rng = 0.1, np.random.default_rng([seed, canvas])
    entropy = (rng.random((rows, canvas)) ** 4).astype(np.float32)
    entropy[:, ::3] = 0  # ties, as converged positions give
    draw = mx.array(rng.integers(0, 1000, (rows, canvas)), mx.int32)
    noise = mx.array(rng.integers(0, 1000, (rows, canvas)), mx.int32)
    exact = entropy.astype(np.float64)
    order = np.argsort(exact, axis=-1, kind="stable")
    ascending = np.take_along_axis(exact, order, axis=-1)
    before = np.empty_like(exact)
    np.put_along_axis(before, order, np.cumsum(ascending, axis=-1) - ascending, axis=-1)
    clear = np.abs(before - bound) > 1e-5  # the rest is a matter of rounding
    found.holds("entropies that leave no doubt", bool(clear.mean() > 0.9))
    both: tuple[Implementation | Launcher, ...] = (how, "mlx")
    for implementation in both:
        after, accepted = accept_renoise(
            mx.array(entropy), draw, noise, bound, implementation=implementation
        )
        found.equal("accepted", np.array(accepted)[clear], (before <= bound)[clear])
        found.equal("canvas", after, mx.where(accepted, draw, noise))


def _no_number(how: Implementation | Launcher, found: Comparison) -> None:
    entropy = mx.array([[0.0, float("nan"), 0.01]])
    ids = mx.zeros((1, 3), mx.int32)
    both: tuple[Implementation | Launcher, ...] = (how, "mlx")
    for implementation in both:
        _, accepted = accept_renoise(entropy, ids, ids + 1, 0.1, implementation=implementation)
        found.equal("accepted", accepted, [[True, False, True]])

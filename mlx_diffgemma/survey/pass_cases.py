"""The pass over the vocabulary in chunks: with Metal's kernels beside their twins, and beside the
pass that holds all logits.

Letters: N positions, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_diffgemma.bench.workbench import SOFT
from mlx_diffgemma.kernels.allowed_tokens import pack_allowed
from mlx_diffgemma.kernels.dispatch import Implementation, Launcher
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.materialized import whole_pass
from mlx_diffgemma.kernels.vocabulary import Row, vocabulary_pass
from mlx_diffgemma.survey.comparing import Case, Comparison

SOFTCAP = 30.0
_FORMS = {"float32": "weighted_rows_plain", "bfloat16": "weighted_rows_plain",
          "affine-4": "weighted_rows_affine"}  # fmt: skip
_NUMBERS = (
    "argmax_log_probability", "entropy", "log_sum", "draw_log_probability",
    "standing_log_probability", "dropped_mass",
)  # fmt: skip
_IMPOSSIBLE = -1e30  # below any logarithm of a probability that is not zero


@dataclass(frozen=True)
class Sizes:
    """What the pass in chunks and the whole pass are compared on.

    Attributes:
        words, width: shape of the embedding table.
        canvas: positions of each of two canvases.
        chunks: tokens of a product, of which one after the other is tried.
        dtype: type of the activations.
    """

    words: int = 40_000
    width: int = 256
    canvas: int = 48
    chunks: tuple[int, ...] = (8192, 32768)
    dtype: mx.Dtype = mx.bfloat16


SMALL_SIZES = Sizes(words=1_000, width=64, canvas=6, chunks=(256, 512), dtype=mx.float32)


def make_table(vocab: int, width: int, form: str = "float32", gain: float = 0.6) -> EmbeddingTable:
    """Random embeddings [V, D], held in `form`; the activations are in float32 whatever it is, so
    that float64 is a fair judge of the products."""
    rng = np.random.default_rng([vocab, width])
    weight = mx.array((rng.normal(size=(vocab, width)) * gain).astype(np.float32))
    if form in ("float32", "bfloat16", "float16"):
        return EmbeddingTable(weight.astype(getattr(mx, form)), mx.float32)
    mode, _, bits = form.partition("-")
    module = nn.Embedding(vocab, width)
    module.weight = weight.astype(mx.bfloat16)
    quantized = module.to_quantized(None, int(bits) if bits else None, mode)
    table = EmbeddingTable.of(quantized, mx.float32)
    if table.scales is None or table.biases is None:
        return table
    # In bfloat16, scale · value + bias would be rounded to that.
    scales, biases = table.scales.astype(mx.float32), table.biases.astype(mx.float32)
    return replace(table, scales=scales, biases=biases)


def make_hidden(*lengths: int, width: int = 64, seed: int = 0) -> mx.array:
    """Positions from certain to undecided, [N, D], for canvases of these lengths."""
    rng = np.random.default_rng(seed)
    gains = np.concatenate([np.linspace(0.1, 1.5, length) for length in lengths])[:, None]
    return mx.array((rng.normal(size=(sum(lengths), width)) * gains).astype(np.float32))


def packed(allowed: np.ndarray) -> dict[int, np.ndarray]:
    """Booleans [C, V] as a row takes them."""
    return dict(enumerate(np.array(pack_allowed(mx.array(allowed)))))


def pass_cases() -> Iterator[Case]:
    """A pass in four chunks of rows of every kind, with kernels and with their twins."""
    for form, rows in _FORMS.items():
        launches = {"vocabulary_chunk": 4, rows: 1}
        yield Case("pass with all kernels", form, partial(_with_every_kernel, form), launches)


def _with_every_kernel(form: str, how: Implementation | Launcher, found: Comparison) -> None:
    table, lengths = make_table(1000, 64, form), (6, 5, 4, 3)
    allowed = np.random.default_rng(0).random((6, 1000)) < 0.5
    fixed = np.array([-1, 7, -1, -1], np.int32)
    rows = [
        Row(6, 0.5, mx.array([1, 2], mx.uint32), allowed=packed(allowed)),
        Row(5, 0.8, soft_cutoff=5.0, likely=True),
        Row(4, 0.3, mx.array([3, 4], mx.uint32), fixed=fixed, soft_cutoff=5.0),
        Row(3, 0.6, mx.array([5, 6], mx.uint32), need_soft=False),
    ]
    run = partial(
        vocabulary_pass, make_hidden(*lengths), table, rows,
        softcap=SOFTCAP, chunk=256, standing=mx.full((18,), 600, mx.int32),
    )  # fmt: skip
    ours, twin = run(implementation=how), run(implementation="mlx")
    for name in ("argmax", "draw"):
        found.equal(name, getattr(ours, name), getattr(twin, name))
    for name in _NUMBERS:
        found.close(name, getattr(ours, name), getattr(twin, name), rtol=1e-5, atol=1e-5)
    assert ours.soft_embeddings is not None and twin.soft_embeddings is not None
    found.close("soft embeddings", ours.soft_embeddings, twin.soft_embeddings, rtol=0, atol=1e-4)


def whole_cases(sizes: Sizes) -> Iterator[Case]:
    """The pass in chunks of several sizes beside the whole one, as the model asks for it and under
    constraints."""
    for chunk, bits, soft, bound in product(sizes.chunks, (4, 8), SOFT, (False, True)):
        name = f"chunks of {chunk}, {bits} bits, {soft}{', under constraints' * bound}"
        launches = {"vocabulary_chunk": -(-sizes.words // chunk)}
        if soft == "likely tokens":
            launches["weighted_rows_affine"] = 1
        check = partial(_as_the_whole, sizes, chunk, bits, soft, bound)
        yield Case("chunks as the whole", name, check, launches)


def _as_the_whole(
    sizes: Sizes,
    chunk: int,
    bits: int,
    soft: str,
    bound: bool,
    how: Implementation | Launcher,
    found: Comparison,
) -> None:
    words, canvas, count = sizes.words, sizes.canvas, 2 * sizes.canvas
    table, rows = _table_in_bits(sizes, bits), _rows(sizes, soft, bound)
    gains = mx.linspace(1.0, 4.0, count)[:, None]  # from undecided to nearly certain
    hidden = mx.random.normal((count, sizes.width), key=mx.random.key(3)) * gains
    hidden = hidden.astype(sizes.dtype)
    standing = mx.random.randint(0, words, (count,), key=mx.random.key(4)).astype(mx.int32)
    whole = partial(whole_pass, hidden, table, rows, softcap=SOFTCAP)
    theirs = whole(standing=standing)
    ours = vocabulary_pass(
        hidden, table, rows,
        softcap=SOFTCAP, standing=standing, chunk=chunk, implementation=how,
    )  # fmt: skip
    # Products have 8 bits, so one of 16 may be off by 0.06, and its logit at 0.4 by 0.15.
    near = {"rtol": 0.01, "atol": 0.3}
    for name in ("log_sum", "entropy", "standing_log_probability"):
        mine, other = np.array(getattr(ours, name)), np.array(getattr(theirs, name))
        forbidden = other < _IMPOSSIBLE
        found.equal(f"{name}, where it is impossible", mine < _IMPOSSIBLE, forbidden)
        found.close(name, mine[~forbidden], other[~forbidden], **near)
    # The likeliest few leave out no less than the cutoff does.
    dropped = np.array(ours.dropped_mass)
    found.holds(
        "mass that is left out", bool((dropped >= np.array(theirs.dropped_mass) - 0.02).all())
    )

    # What is likeliest, or drawn, here is as likely there; equal logits may change places.
    def seen_there(tokens: mx.array | None) -> mx.array:
        seen = whole(standing=tokens).standing_log_probability
        assert seen is not None
        return seen

    found.close("argmax", seen_there(ours.argmax), seen_there(theirs.argmax), **near)
    likeliest, drawn = ours.argmax_log_probability, ours.draw_log_probability
    assert likeliest is not None and drawn is not None
    found.close("argmax_log_probability", likeliest, seen_there(ours.argmax), **near)
    found.close("draw_log_probability", drawn, seen_there(ours.draw), **near)
    if bound:
        assert ours.draw is not None
        found.equal("the only token allowed", [ours.argmax[0], ours.draw[0]], [words - 1] * 2)
        bound_at = np.arange(canvas, count, 5)
        found.equal("bound tokens", np.array(ours.argmax)[bound_at], [17] * len(bound_at))
        found.equal("their entropy", np.array(ours.entropy)[bound_at], [0.0] * len(bound_at))
    given = [each.soft_embeddings is not None for each in (ours, theirs)]
    found.holds(
        "soft embeddings where they are wanted", given == [soft != "no soft embeddings"] * 2
    )
    if ours.soft_embeddings is None or theirs.soft_embeddings is None:
        return
    mine, other = (
        np.array(each.astype(mx.float32)) for each in (ours.soft_embeddings, theirs.soft_embeddings)
    )
    # Where the likeliest few stand for all, what they leave out is missing.
    few = dropped if soft == "likely tokens" else np.zeros(count)
    allowed = (0.05 + 2 * few) * np.linalg.norm(other, axis=-1).max()
    apart = np.linalg.norm(mine - other, axis=-1) / allowed
    found.close("soft embeddings", apart, np.zeros(count), rtol=0, atol=1.0)


def _table_in_bits(sizes: Sizes, bits: int) -> EmbeddingTable:
    weight = mx.random.normal((sizes.words, sizes.width), key=mx.random.key(bits))
    weight = (weight * 3 * sizes.width**-0.5).astype(sizes.dtype)
    table = mx.quantize(weight, group_size=64, bits=bits)
    return EmbeddingTable(table[0], sizes.dtype, *table[1:], group_size=64, bits=bits)


def _rows(sizes: Sizes, soft: str, bound: bool) -> list[Row]:
    """Two rows that draw, each at its own temperature. Where they are bound, each position of the
    first has a tenth of the tokens, and one alone has a single token; every fifth position of the
    second is fixed."""
    fixed = np.where(np.arange(sizes.canvas) % 5 == 0, 17, -1).astype(np.int32)
    allowed = np.random.default_rng(0).random((sizes.canvas, sizes.words)) < 0.1
    allowed[0] = np.arange(sizes.words) == sizes.words - 1
    how = SOFT[soft]
    return [
        Row(sizes.canvas, 0.8, mx.random.key(1), allowed=packed(allowed) if bound else {}, **how),
        Row(sizes.canvas, 0.4, mx.random.key(2), fixed=fixed if bound else None, **how),
    ]

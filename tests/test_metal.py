"""What only a Metal GPU can show: `pytest -m metal`.

The demo model solves sudokus in bfloat16, the pass over the vocabulary agrees with the one that
holds all logits, and Apple's compiler takes every kernel. `kernels/test_metal_kernels.py` compares
the kernels over many shapes and types.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_diffgemma.kernels
from mlx_diffgemma import generate, load
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.kernels import dispatch
from mlx_diffgemma.kernels.accept_renoise import accept_renoise
from mlx_diffgemma.kernels.allowed_tokens import pack_allowed
from mlx_diffgemma.kernels.dispatch import MetalKernel
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.expert_combine import expert_combine
from mlx_diffgemma.kernels.materialized import whole_pass
from mlx_diffgemma.kernels.vocabulary import Row, vocabulary_pass
from mlx_diffgemma.kernels.vocabulary_chunk import Running, Wanted, vocabulary_chunk
from mlx_diffgemma.kernels.weighted_rows import weighted_rows

DEVICE = mx.gpu
EXERCISES = Path(__file__).parent / "fixtures" / "sudoku-eval.jsonl"
WORDS, WIDTH, CANVAS = 20_000, 256, 48


@pytest.fixture
def on_the_gpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(DEVICE)
    yield
    mx.set_default_device(before)


@pytest.fixture
def demo(on_the_gpu: None) -> tuple[Any, Any]:
    """The demo model in bfloat16, as it is loaded for a GPU, and its tokenizer."""
    like, tokenizer = load("demo", lazy=True)
    model, _ = load_model("demo", dtype=mx.bfloat16)
    model.config = like.config
    assert model.dtype == mx.bfloat16
    return model, tokenizer


def sudokus(count: int) -> list[dict[str, str]]:
    rows = map(json.loads, EXERCISES.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["task"] == "one"][:count]


@pytest.mark.metal
@pytest.mark.parametrize("profile", ["exact", "balanced", "fast"])
@pytest.mark.parametrize("form", ["as loaded", "in chunks"])
def test_the_demo_model_solves_sudokus_in_bfloat16(
    demo: tuple[Any, Any], profile: str, form: str
) -> None:
    model, tokenizer = demo
    if form == "in chunks":  # as with a vocabulary of the release's size
        model.vocabulary_pass = vocabulary_pass
    solved = [
        generate(model, tokenizer, row["prompt"], seed=seed, profile=profile) == row["answer"]
        for seed, row in enumerate(sudokus(8))
    ]
    assert sum(solved) >= 7, solved


def table_in_bits(bits: int) -> EmbeddingTable:
    weight = mx.random.normal((WORDS, WIDTH), key=mx.random.key(bits)) * 3 * WIDTH**-0.5
    packed = mx.quantize(weight.astype(mx.bfloat16), group_size=64, bits=bits)
    return EmbeddingTable(packed[0], mx.bfloat16, *packed[1:], group_size=64, bits=bits)


def some_allowed() -> dict[int, np.ndarray]:
    """Masks, one a position, of a tenth of the tokens; the first allows one alone."""
    allowed = np.random.default_rng(0).random((CANVAS, WORDS)) < 0.1
    allowed[0] = np.arange(WORDS) == WORDS - 1
    return dict(enumerate(np.array(pack_allowed(mx.array(allowed)))))


def asked(soft: str, masked: bool) -> list[Row]:
    """Two rows that draw, under their own temperatures, and the second with bound positions."""
    how: dict[str, Any] = {
        "likely": {"soft_cutoff": 10.0, "likely": True},
        "dense": {},
        "none": {"need_soft": False},
    }[soft]
    fixed = np.where(np.arange(CANVAS) % 5 == 0, 17, -1).astype(np.int32)
    return [
        Row(CANVAS, 0.8, mx.random.key(1), allowed=some_allowed() if masked else {}, **how),
        Row(CANVAS, 0.4, mx.random.key(2), fixed=fixed if masked else None, **how),
    ]


@pytest.mark.metal
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("soft", ["likely", "dense", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_pass_over_the_vocabulary_is_the_whole_one(
    on_the_gpu: None, bits: int, soft: str, masked: bool
) -> None:
    table, rows = table_in_bits(bits), asked(soft, masked)
    gains = mx.linspace(1.0, 4.0, 2 * CANVAS)[:, None]  # from undecided to nearly certain
    hidden = mx.random.normal((2 * CANVAS, WIDTH), key=mx.random.key(3)) * gains
    hidden = hidden.astype(mx.bfloat16)
    standing = mx.random.randint(0, WORDS, (2 * CANVAS,), key=mx.random.key(4)).astype(mx.int32)
    ours = vocabulary_pass(hidden, table, rows, softcap=30.0, standing=standing)
    whole = whole_pass(hidden, table, rows, softcap=30.0, standing=standing)
    # Products have 8 bits, so one of 16 may be off by 0.06, and its logit at 0.4 by 0.15.
    near = {"rtol": 0.01, "atol": 0.3}
    for name in ("log_sum", "entropy", "standing_log_probability"):
        mine, theirs = np.array(getattr(ours, name)), np.array(getattr(whole, name))
        forbidden = theirs < -1e30
        assert np.array_equal(mine < -1e30, forbidden), name
        np.testing.assert_allclose(mine[~forbidden], theirs[~forbidden], **near, err_msg=name)
    # The likeliest few leave out no less than the cutoff does.
    assert (np.array(ours.dropped_mass) >= np.array(whole.dropped_mass) - 0.02).all()

    # What is likeliest, or drawn, here is as likely there; equal logits may change places.
    def seen_there(tokens: mx.array) -> np.ndarray:
        seen = whole_pass(hidden, table, rows, softcap=30.0, standing=tokens)
        return np.array(seen.standing_log_probability)

    np.testing.assert_allclose(seen_there(ours.argmax), seen_there(whole.argmax), **near)
    np.testing.assert_allclose(ours.argmax_log_probability, seen_there(ours.argmax), **near)
    np.testing.assert_allclose(ours.draw_log_probability, seen_there(ours.draw), **near)
    if masked:
        assert ours.argmax[0].item() == ours.draw[0].item() == WORDS - 1
        bound = np.array(ours.argmax)[CANVAS:][::5]
        assert (bound == 17).all() and (np.array(ours.entropy)[CANVAS:][::5] == 0).all()
    assert (ours.soft_embeddings is None) == (whole.soft_embeddings is None) == (soft == "none")
    if soft != "none":
        mine, theirs = (np.array(each.soft_embeddings.astype(mx.float32)) for each in (ours, whole))
        apart = np.linalg.norm(mine - theirs, axis=-1)
        # Where the likeliest few stand for all, what they leave out is missing.
        few = np.array(ours.dropped_mass) if soft == "likely" else 0.0
        assert (apart <= (0.05 + 2 * few) * np.linalg.norm(theirs, axis=-1).max()).all()


def normal(*shape: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(dtype)


def chunk_of_everything(how: Any) -> list[mx.array]:
    allowed = np.random.default_rng(0).random((2, 600)) < 0.5
    wanted = Wanted(
        30.0,
        mx.array([50.0, 40.0, 60.0]),
        chances=mx.random.uniform(shape=(3, 3), key=mx.random.key(0)),
        standing=mx.array([5, 500, 599], mx.int32),
        which=mx.array([0, -1, 1], mx.int32),
        masks=pack_allowed(mx.array(allowed)),
        slots=mx.array([1, -1, 0], mx.int32),
        dense=2,
    )
    chunk = vocabulary_chunk(
        normal(3, 600) * 10, Running.start(3), wanted,
        start=0, place=0, dtype=mx.bfloat16, implementation=how,
    )  # fmt: skip
    assert chunk.exponentials is not None and chunk.shrink is not None
    return [chunk.running.numbers, chunk.running.tokens, chunk.exponentials, chunk.shrink]


def rows_of(table: EmbeddingTable, how: Any) -> list[mx.array]:
    ids, weights = mx.array([[1, 40, 7], [0, 3, 3]]), mx.array([[0.5, 0.25, 0.0], [1.0, 0.5, 0.5]])
    return [weighted_rows(ids, weights, table, implementation=how)]


def affine_table() -> EmbeddingTable:
    packed = mx.quantize(normal(50, 64), 32, 4)
    return EmbeddingTable(packed[0], mx.bfloat16, *packed[1:], 32, 4)


CASES: dict[str, Callable[[Any], Sequence[mx.array]]] = {
    "vocabulary_chunk": chunk_of_everything,
    "weighted_rows_plain": lambda how: rows_of(
        EmbeddingTable(normal(50, 64), mx.bfloat16), how
    ),
    "weighted_rows_affine": lambda how: rows_of(affine_table(), how),
    "expert_combine": lambda how: [
        expert_combine(
            normal(8, 64), mx.array([3, 1, 0, 2, 7, 5, 4, 6], mx.uint32),
            mx.softmax(normal(4, 2, dtype=mx.float32), axis=-1), implementation=how,
        )
    ],
    "accept_renoise": lambda how: accept_renoise(
        mx.array([[0.0, 0.5, 0.04, 0.03, 0.0]]), mx.array([[1, 2, 3, 4, 5]]),
        mx.array([[6, 7, 8, 9, 10]]), 0.1, implementation=how,
    ),
}  # fmt: skip
"""A call that launches each kernel once, by its name."""


def test_every_kernel_has_a_case() -> None:
    modules = [
        import_module(f"mlx_diffgemma.kernels.{each.name}")
        for each in pkgutil.iter_modules(mlx_diffgemma.kernels.__path__)
    ]
    names = {
        value.name
        for module in modules
        for value in vars(module).values()
        if isinstance(value, MetalKernel)
    }
    assert names == set(CASES)


@pytest.mark.metal
@pytest.mark.parametrize("name", CASES)
def test_every_kernel_compiles_and_equals_its_twin(on_the_gpu: None, name: str) -> None:
    launched = []

    def noted(kernel: MetalKernel, **arguments: Any) -> list[mx.array]:
        launched.append(kernel.name)
        return dispatch.launch_on_metal(kernel, **arguments)

    ours, twin = CASES[name](noted), CASES[name]("mlx")
    assert launched == [name]
    for mine, other in zip(ours, twin, strict=True):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        exact = not mx.issubdtype(other.dtype, mx.floating)
        narrow = other.dtype == mx.bfloat16
        within = 0.0 if exact else 1e-2 if narrow else 1e-4
        mine, other = (np.array(each.astype(mx.float32)) for each in (mine, other))
        np.testing.assert_allclose(mine, other, rtol=within, atol=within)

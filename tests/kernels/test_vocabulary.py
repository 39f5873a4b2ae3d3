"""The tiled pass over the vocabulary against float64 and against the pass in one piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_diffgemma.kernels.allowed_tokens import pack_allowed
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.materialized import materialized
from mlx_diffgemma.kernels.vocabulary import VocabularyResult, vocabulary_pass

SOFTCAP = 30.0
FORMS = ["float32", "bfloat16", "float16", "affine-4", "affine-8", "mxfp4", "mxfp8", "nvfp4"]


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    """Where products are in float32 whatever the table, so that float64 is a fair judge."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@dataclass(frozen=True)
class Expected:
    """What float64 says; `logits` [R, C, V] are after the temperature."""

    logits: np.ndarray
    p: np.ndarray
    log_sum: np.ndarray
    entropy: np.ndarray
    soft: np.ndarray


def make_table(vocab: int, width: int, form: str = "float32", gain: float = 0.6) -> EmbeddingTable:
    rng = np.random.default_rng([vocab, width])
    weight = mx.array((rng.normal(size=(vocab, width)) * gain).astype(np.float32))
    if form in ("float32", "bfloat16", "float16"):
        dtype = getattr(mx, form)
        return EmbeddingTable(weight.astype(dtype), dtype)
    mode, _, bits = form.partition("-")
    module = nn.Embedding(vocab, width)
    module.weight = weight.astype(mx.bfloat16)
    quantized = module.to_quantized(None, int(bits) if bits else None, mode)
    return EmbeddingTable.of(quantized, mx.bfloat16)


def make_hidden(rows: int, canvas: int, width: int, seed: int = 0) -> mx.array:
    """Positions from certain to undecided."""
    rng = np.random.default_rng(seed)
    gains = np.linspace(0.1, 1.5, canvas)[:, None]
    return mx.array((rng.normal(size=(rows, canvas, width)) * gains).astype(np.float32))


def in_float64(
    hidden: mx.array, table: EmbeddingTable, temperature: float, allowed: np.ndarray | None = None
) -> Expected:
    weight = np.array(table.rows(0, table.vocab_size, mx.float32)).astype(np.float64)
    raw = np.array(hidden.astype(mx.float32)).astype(np.float64) @ weight.T
    logits = SOFTCAP * np.tanh(raw / SOFTCAP) / temperature
    if allowed is not None:
        logits = np.where(allowed, logits, -np.inf)
    top = logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(logits - top)
    total = exponentials.sum(axis=-1, keepdims=True)
    p = exponentials / total
    log_sum = (top + np.log(total))[..., 0]
    entropy = -(p * np.where(p > 0, logits - log_sum[..., None], 0)).sum(axis=-1)
    return Expected(logits, p, log_sum, entropy, p @ weight * float(table.scale))


def rms(actual: mx.array, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((np.array(actual).astype(np.float64) - expected) ** 2)))


def assert_close(result: VocabularyResult, expected: Expected, atol: float = 5e-5) -> None:
    np.testing.assert_allclose(result.log_sum, expected.log_sum, rtol=0, atol=atol)
    np.testing.assert_allclose(result.entropy, expected.entropy, rtol=0, atol=atol)
    np.testing.assert_allclose(result.soft_embeddings, expected.soft, rtol=0, atol=20 * atol)
    chosen = np.take_along_axis(expected.logits, np.array(result.argmax)[..., None], axis=-1)
    assert (expected.logits.max(axis=-1) - chosen[..., 0] <= atol).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1000), (3, 700), (1, 40)])
def test_it_computes_what_float64_does(form: str, rows: int, vocab: int) -> None:
    table, hidden = make_table(vocab, 64, form), make_hidden(rows, 17, 64)
    expected = in_float64(hidden, table, 0.5)
    arguments = {"softcap": SOFTCAP, "temperature": 0.5}
    tiled = vocabulary_pass(hidden, table, tile=256, **arguments)
    whole = materialized(hidden, table, **arguments)
    assert_close(tiled, expected)
    assert_close(whole, expected)
    assert tiled.soft_embeddings.dtype == hidden.dtype
    assert np.array_equal(tiled.argmax, whole.argmax)


@pytest.mark.parametrize("gain", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.4, 0.8])
def test_it_is_no_further_from_float64_than_the_whole(gain: float, temperature: float) -> None:
    table, hidden = make_table(20011, 96, gain=gain), make_hidden(1, 64, 96)
    expected = in_float64(hidden, table, temperature)
    arguments = {"softcap": SOFTCAP, "temperature": temperature}
    tiled = vocabulary_pass(hidden, table, **arguments)
    whole = materialized(hidden, table, **arguments)
    for name, value in (
        ("log_sum", expected.log_sum),
        ("entropy", expected.entropy),
        ("soft_embeddings", expected.soft),
    ):
        ours, theirs = rms(getattr(tiled, name), value), rms(getattr(whole, name), value)
        # Both share the rounding of the product; a tenth is room for its chance.
        assert ours <= 1.1 * theirs, (name, ours, theirs)


def test_the_first_of_equal_maxima_wins_across_blocks_and_tiles() -> None:
    weight = np.zeros((900, 32), np.float32)
    weight[[130, 140, 300, 899], 0] = 1.0
    table = EmbeddingTable(mx.array(weight), mx.float32)
    hidden = mx.zeros((1, 2, 32)).at[:, :, 0].add(mx.array([[2.0, -2.0]]))
    result = vocabulary_pass(hidden, table, softcap=SOFTCAP, temperature=0.5, tile=256)
    assert result.argmax.tolist() == [[130, 0]]


@pytest.mark.parametrize("value", [300.0, -300.0])
def test_logits_at_the_softcap_are_finite_and_uniform(value: float) -> None:
    table = EmbeddingTable(mx.ones((300, 32)), mx.float32)
    hidden = mx.full((1, 2, 32), value)
    result = vocabulary_pass(hidden, table, softcap=SOFTCAP, temperature=0.01, tile=128)
    np.testing.assert_allclose(result.entropy, np.full((1, 2), np.log(300)), rtol=1e-6)
    np.testing.assert_allclose(result.soft_embeddings, np.full((1, 2, 32), 32**0.5), rtol=1e-6)
    assert result.argmax.tolist() == [[0, 0]]


def test_a_row_draws_the_same_alone_and_in_a_batch() -> None:
    table, hidden = make_table(1000, 64, gain=0.1), make_hidden(3, 40, 64)
    keys = mx.array([[1, 2], [3, 4], [1, 2]], mx.uint32)
    arguments = {"softcap": SOFTCAP, "temperature": 0.8, "tile": 256}
    together = vocabulary_pass(hidden, table, keys=keys, **arguments)
    for row in range(3):
        alone = vocabulary_pass(hidden[row : row + 1], table, keys=keys[row : row + 1], **arguments)
        assert np.array_equal(alone.draw[0], together.draw[row])
        np.testing.assert_allclose(alone.entropy[0], together.entropy[row], atol=1e-5)
    assert not np.array_equal(together.draw[0], together.draw[1])
    same_hidden = mx.broadcast_to(hidden[:1], hidden.shape)
    again = vocabulary_pass(same_hidden, table, keys=keys, **arguments)
    assert np.array_equal(again.draw[0], again.draw[2])


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    """In standard deviations above its mean; tokens expected less than 10 times count as one."""
    expected = p * counts.sum()
    rare = expected < 10
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    assert counts[~keep].sum() == 0
    degrees = keep.sum() - 1
    value = ((counts[keep] - expected[keep]) ** 2 / expected[keep]).sum()
    return float((value - degrees) / np.sqrt(2 * degrees))


@pytest.mark.slow
@pytest.mark.parametrize(("gain", "constrained"), [(0.02, False), (0.2, True)])
def test_a_million_draws_follow_the_distribution(gain: float, constrained: bool) -> None:
    vocab, canvas, passes = 300, 8192, 128
    table = make_table(vocab, 32, gain=gain)
    hidden = make_hidden(1, 1, 32, seed=3)
    allowed = None
    if constrained:
        allowed = np.random.default_rng(5).random((1, 1, vocab)) < 0.3
    p = in_float64(hidden, table, 0.7, allowed).p[0, 0]
    words = None
    if allowed is not None:
        words = mx.repeat(pack_allowed(mx.array(allowed)), canvas, axis=1)
    counts = np.zeros(vocab)
    for key in range(passes):
        result = vocabulary_pass(
            mx.repeat(hidden, canvas, axis=1),
            table,
            softcap=SOFTCAP,
            temperature=0.7,
            keys=mx.array([[key, 9]], mx.uint32),
            allowed=words,
            need_soft=False,
            tile=256,
        )
        assert result.draw is not None
        counts += np.bincount(np.array(result.draw[0]), minlength=vocab)
    assert counts.sum() >= 1e6
    assert counts[p == 0].sum() == 0
    assert chi_square(counts, p) < 5
    # The test sees a draw that is off by little.
    skewed = p * np.where(np.arange(vocab) % 256 < 128, 1.03, 1.0)
    assert chi_square(counts, skewed / skewed.sum()) > 5


@pytest.mark.parametrize("form", ["float32", "affine-4"])
def test_allowed_sets_and_fixed_tokens(form: str) -> None:
    vocab = 700
    table, hidden = make_table(vocab, 64, form), make_hidden(2, 12, 64)
    allowed = np.random.default_rng(1).random((2, 12, vocab)) < 0.02
    allowed[:, :, 17] = True
    allowed[0, 3] = False
    allowed[0, 3, 699] = True  # one choice: certain
    fixed = np.full((2, 12), -1, np.int32)
    fixed[1, 5] = 123
    expected = in_float64(hidden, table, 0.6, allowed)
    arguments = {
        "softcap": SOFTCAP,
        "temperature": 0.6,
        "keys": mx.array([[1, 2], [3, 4]], mx.uint32),
        "allowed": pack_allowed(mx.array(allowed)),
        "fixed": mx.array(fixed),
    }
    weight = np.array(table.rows(0, vocab, mx.float32))
    for result in (
        vocabulary_pass(hidden, table, tile=256, **arguments),
        materialized(hidden, table, **arguments),
    ):
        entropy, soft = expected.entropy.copy(), expected.soft.copy()
        entropy[1, 5], soft[1, 5] = 0, weight[123] * float(table.scale)
        np.testing.assert_allclose(result.entropy, entropy, atol=2e-5)
        np.testing.assert_allclose(result.soft_embeddings, soft, atol=1e-3)
        argmax = expected.logits.argmax(axis=-1)
        argmax[1, 5] = 123
        assert np.array_equal(result.argmax, argmax)
        assert result.argmax[0, 3].item() == result.draw[0, 3].item() == 699
        assert result.draw[1, 5].item() == 123
        draw = np.array(result.draw)
        inside = np.take_along_axis(allowed, draw[..., None], axis=-1)[..., 0]
        assert (inside | (fixed >= 0)).all()


def test_few_restricted_positions_and_tiles() -> None:
    """Most positions may hold anything, and what is forbidden lies in one tile."""
    table, hidden = make_table(700, 64, "float32"), make_hidden(2, 12, 64)
    allowed = np.ones((2, 12, 700), bool)
    allowed[0, 3, :] = np.arange(700) == 20
    allowed[1, 7, 256:512] = False
    expected = in_float64(hidden, table, 0.6, allowed)
    result = vocabulary_pass(
        hidden, table, softcap=SOFTCAP, temperature=0.6, tile=256,
        keys=mx.array([[1, 2], [3, 4]], mx.uint32), allowed=pack_allowed(mx.array(allowed)),
    )  # fmt: skip
    np.testing.assert_allclose(result.entropy, expected.entropy, atol=2e-5)
    np.testing.assert_allclose(result.soft_embeddings, expected.soft, atol=1e-3)
    assert np.array_equal(result.argmax, expected.logits.argmax(axis=-1))
    assert result.draw[0, 3].item() == 20
    assert not 256 <= result.draw[1, 7].item() < 512


@pytest.mark.parametrize("bound", [[(0, 0), (1, 5), (1, 11)], "all"])
def test_fixed_positions_leave_the_others_as_they_are(bound) -> None:
    table, hidden = make_table(700, 64, "float32"), make_hidden(2, 12, 64)
    fixed = np.full((2, 12), -1 if bound != "all" else 9, np.int32)
    for place in bound if bound != "all" else []:
        fixed[place] = 123
    settings = {"softcap": SOFTCAP, "temperature": 0.6, "soft_cutoff": 9.0, "tile": 256}
    settings["keys"] = mx.array([[1, 2], [3, 4]], mx.uint32)
    settings["guess"] = mx.full((2, 12), 7, mx.int32)
    free = vocabulary_pass(hidden, table, **settings)
    some = vocabulary_pass(hidden, table, fixed=mx.array(fixed), **settings)
    is_open = fixed < 0
    for name in ("argmax", "draw", "entropy", "soft_embeddings", "log_sum", "dropped_mass"):
        seen, alone = np.array(getattr(some, name)), np.array(getattr(free, name))
        np.testing.assert_allclose(seen[is_open], alone[is_open], rtol=1e-5, atol=1e-5)
    for name in ("argmax", "draw"):
        assert np.array_equal(np.array(getattr(some, name))[~is_open], fixed[~is_open])
    assert (np.array(some.entropy)[~is_open] == 0).all()


@pytest.mark.parametrize("form", ["float32", "affine-4", "mxfp4"])
@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize(
    ("gain", "temperature", "least", "most"),
    [
        pytest.param(1.0, 0.1, 1, 8, id="gathered"),
        pytest.param(0.8, 0.6, 9, 120, id="multiplied-at-the-end"),
        pytest.param(0.05, 0.5, 600, 3000, id="multiplied-at-once"),
    ],
)
def test_only_likely_tokens_enter_the_soft_embeddings(
    form: str, constrained: bool, gain: float, temperature: float, least: int, most: int
) -> None:
    table, hidden = make_table(3000, 64, form, gain), make_hidden(1, 5, 64)[:, 2:4]
    allowed = None
    arguments = {"softcap": SOFTCAP, "temperature": temperature, "soft_cutoff": 6.0}
    if constrained:
        allowed = np.random.default_rng(2).random((1, hidden.shape[1], 3000)) < 0.7
        arguments["allowed"] = pack_allowed(mx.array(allowed))
    logits = in_float64(hidden, table, temperature, allowed).logits
    likely = (logits >= logits.max(axis=-1, keepdims=True) - 6.0).sum(axis=-1)
    assert least <= likely.max() <= most  # or this is another case

    tiled = vocabulary_pass(hidden, table, tile=1024, **arguments)
    whole = materialized(hidden, table, **arguments)
    slack = np.array(whole.dropped_mass - tiled.dropped_mass)
    assert (slack > -1e-5).all()
    if most < 600:
        # Else a tile is measured by the maximum so far and keeps some tokens more.
        assert (slack < 1e-5).all()
        assert least == 1 or np.array(whole.dropped_mass).max() > 1e-4
    size = float(mx.abs(table.rows(0, 3000, mx.float32)).max() * table.scale)
    difference = np.abs(np.array(tiled.soft_embeddings - whole.soft_embeddings)).max()
    assert difference < 1e-4 * size + 2 * slack.max() * size
    # A guess, be it the best or the worst, forbidden or not, changes nothing of that.
    for guess in (logits.argmax(axis=-1), logits.argmin(axis=-1), 0 * likely):
        guess = mx.array(guess, mx.int32)
        guessed = vocabulary_pass(hidden, table, tile=1024, guess=guess, **arguments)
        assert np.array_equal(guessed.argmax, tiled.argmax)
        slack_now = np.array(whole.dropped_mass - guessed.dropped_mass)
        assert (slack_now > -1e-5).all() and (slack_now <= slack + 1e-5).all()
        difference = np.abs(np.array(guessed.soft_embeddings - whole.soft_embeddings)).max()
        assert difference < 1e-4 * size + 2 * slack.max() * size
    exact = vocabulary_pass(hidden, table, **{**arguments, "soft_cutoff": None})
    left_out = np.array(tiled.dropped_mass)[..., None]
    moved = np.abs(np.array(tiled.soft_embeddings - exact.soft_embeddings))
    assert (moved <= 2 * left_out * size + 1e-4 * size).all()
    assert not np.array(exact.dropped_mass).any()


def test_a_draw_knows_its_probability() -> None:
    table, hidden = make_table(700, 64), make_hidden(2, 12, 64)
    fixed = mx.full((2, 12), -1, dtype=mx.int32).at[1, 5].add(124)
    keys = mx.array([[1, 2], [3, 4]], mx.uint32)
    result = vocabulary_pass(
        hidden, table, softcap=SOFTCAP, temperature=0.5, keys=keys, fixed=fixed, tile=256
    )
    p = in_float64(hidden, table, 0.5).p
    expected = np.log(np.take_along_axis(p, np.array(result.draw)[..., None], axis=-1)[..., 0])
    expected[1, 5] = 0
    np.testing.assert_allclose(result.draw_log_probability, expected, atol=5e-5)


def test_a_position_without_any_allowed_token_has_no_entropy() -> None:
    table, hidden = make_table(300, 32), make_hidden(1, 2, 32)
    words = pack_allowed(mx.array([[[True] * 300, [False] * 300]]))
    result = vocabulary_pass(hidden, table, softcap=SOFTCAP, temperature=0.5, allowed=words)
    assert np.isnan(np.array(result.entropy)).tolist() == [[False, True]]


def test_a_hidden_state_that_is_not_finite_shows_in_the_entropy() -> None:
    table, hidden = make_table(300, 32), mx.full((1, 1, 32), float("nan"))
    result = vocabulary_pass(hidden, table, softcap=SOFTCAP, temperature=0.5)
    assert np.isnan(result.entropy.item())


def test_what_is_not_asked_for_is_not_there() -> None:
    table, hidden = make_table(300, 32), make_hidden(1, 2, 32)
    result = vocabulary_pass(hidden, table, softcap=SOFTCAP, temperature=0.5, need_soft=False)
    assert result.soft_embeddings is None and result.draw is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile": 100}, "tile is 100; it must be a multiple of 128."),
        ({"tile": 0}, "tile is 0; it must be a multiple of 128."),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0."),
    ],
)
def test_wrong_settings_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        vocabulary_pass(
            make_hidden(1, 2, 32),
            make_table(300, 32),
            **{"softcap": SOFTCAP, "temperature": 0.5, **arguments},
        )
    assert str(raised.value) == message


def test_memory_holds_no_logits() -> None:
    """At the vocabulary and canvas of the release, beyond the table and the hidden states."""
    vocab, canvas, width = 262_144, 256, 32
    table = EmbeddingTable(mx.random.normal((vocab, width), key=mx.random.key(0)), mx.float32)
    hidden = mx.random.normal((1, canvas, width), key=mx.random.key(1))
    mx.eval(hidden, table.weight)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = vocabulary_pass(
        hidden, table, softcap=SOFTCAP, temperature=0.5, keys=mx.array([[1, 2]], mx.uint32)
    )
    mx.eval(result.argmax, result.draw, result.entropy, result.soft_embeddings)
    assert mx.get_peak_memory() - before < 100e6

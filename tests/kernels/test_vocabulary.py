"""The three passes over the vocabulary against float64 and against each other.

The form for a GPU runs by its plain-MLX twin here; `test_metal_kernels.py` compares that with the
Metal source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from vocabulary_cases import FORMS, assert_close, in_float64, of_tokens

from mlx_diffgemma.cpu.vocabulary import tiled_pass
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.materialized import whole_pass
from mlx_diffgemma.kernels.vocabulary import Row, VocabularyResult, vocabulary_pass
from mlx_diffgemma.kernels.vocabulary_chunk import BEST
from mlx_diffgemma.survey.pass_cases import SOFTCAP, make_hidden, make_table, packed

Pass = Callable[..., VocabularyResult]

PASSES = {
    "gpu": partial(vocabulary_pass, softcap=SOFTCAP, chunk=256),
    "cpu": partial(tiled_pass, softcap=SOFTCAP, chunk=256, tile=128),
    "whole": partial(whole_pass, softcap=SOFTCAP),
}
PIECES = ["gpu", "cpu"]

KEYS = [mx.array([1, 2], mx.uint32), mx.array([3, 4], mx.uint32)]


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    """Where products are in float32 to the last bits, so that float64 is a fair judge."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture(params=PASSES)
def run(request: pytest.FixtureRequest) -> Pass:
    return PASSES[request.param]


def both(result: VocabularyResult, other: VocabularyResult) -> Iterator[tuple[str, np.ndarray]]:
    """What is there of two results, by name; what is missing in one must be in the other."""
    for field in fields(VocabularyResult):
        ours, theirs = getattr(result, field.name), getattr(other, field.name)
        assert (ours is None) == (theirs is None), field.name
        if ours is not None:
            yield field.name, np.array(ours), np.array(theirs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("lengths", "vocab"), [((17,), 1000), ((17, 4, 9), 700), ((17,), 40)])
def test_it_computes_what_float64_does(
    run: Pass, form: str, lengths: tuple[int, ...], vocab: int
) -> None:
    table, hidden = make_table(vocab, 64, form), make_hidden(*lengths)
    temperatures = [0.5, 0.9, 0.3][: len(lengths)]
    rows = [Row(length, heat) for length, heat in zip(lengths, temperatures, strict=True)]
    expected = in_float64(hidden, table, np.repeat(temperatures, lengths))
    result = run(hidden, table, rows)
    assert_close(result, expected)
    assert result.soft_embeddings.dtype == hidden.dtype
    assert np.array_equal(result.argmax, PASSES["whole"](hidden, table, rows).argmax)
    assert not np.array(result.dropped_mass).any()


@pytest.mark.parametrize("which", PIECES)
@pytest.mark.parametrize("gain", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.4, 0.8])
def test_it_is_no_further_from_float64_than_the_whole(
    which: str, gain: float, temperature: float
) -> None:
    table, hidden = make_table(20011, 96, gain=gain), make_hidden(64, width=96)
    expected = in_float64(hidden, table, temperature)
    rows = [Row(64, temperature)]
    pieces = {"gpu": vocabulary_pass, "cpu": tiled_pass}[which]
    ours = pieces(hidden, table, rows, softcap=SOFTCAP)
    theirs = whole_pass(hidden, table, rows, softcap=SOFTCAP)

    def rms(actual: mx.array, exact: np.ndarray) -> float:
        return float(np.sqrt(np.mean((np.array(actual).astype(np.float64) - exact) ** 2)))

    for name, exact in (
        ("log_sum", expected.log_sum),
        ("entropy", expected.entropy),
        ("soft_embeddings", expected.soft),
    ):
        # Both share the rounding of the product; a tenth is room for its chance.
        apart, allowed = rms(getattr(ours, name), exact), rms(getattr(theirs, name), exact)
        assert apart <= 1.1 * allowed, (name, apart, allowed)


def test_the_first_of_equal_maxima_wins_across_blocks_and_pieces(run: Pass) -> None:
    weight = np.zeros((900, 32), np.float32)
    weight[[130, 140, 300, 899], 0] = 1.0
    table = EmbeddingTable(mx.array(weight), mx.float32)
    hidden = mx.zeros((2, 32)).at[:, 0].add(mx.array([2.0, -2.0]))
    assert run(hidden, table, [Row(2, 0.5)]).argmax.tolist() == [130, 0]


@pytest.mark.parametrize("value", [300.0, -300.0])
def test_logits_at_the_softcap_are_finite_and_uniform(run: Pass, value: float) -> None:
    table = EmbeddingTable(mx.ones((300, 32)), mx.float32)
    result = run(mx.full((2, 32), value), table, [Row(2, 0.01)])
    # Logits of 3000 leave a whole log sum 2e-4 of precision; sums from the maximum keep all of it.
    precision = 1e-4 if run is PASSES["whole"] else 1e-6
    np.testing.assert_allclose(result.entropy, np.full(2, np.log(300)), rtol=precision)
    np.testing.assert_allclose(result.soft_embeddings, np.full((2, 32), 32**0.5), rtol=1e-6)
    assert result.argmax.tolist() == [0, 0]


def ragged_rows(vocab: int) -> list[Row]:
    """Rows that differ in everything that a row can differ in."""
    rng = np.random.default_rng(4)
    some = rng.random((9, vocab)) < 0.1
    some[:, 5] = True
    most = np.ones((7, vocab), bool)
    most[2, 300:] = False
    fixed = np.where(rng.random(7) < 0.4, 17, -1).astype(np.int32)
    return [
        Row(11, 0.8, KEYS[0]),
        Row(9, 0.5, KEYS[1], allowed=packed(some), soft_cutoff=4.0),
        Row(1, 0.3, KEYS[0], soft_cutoff=6.0, likely=True),
        Row(7, 0.4, fixed=fixed, allowed=packed(most), need_soft=False),
        Row(3, 0.9, KEYS[1], fixed=np.full(3, 8, np.int32)),
        Row(11, 0.8, KEYS[0], soft_cutoff=5.0, likely=np.arange(11) % 2 == 0),
    ]


@pytest.mark.parametrize("form", ["float32", "affine-4"])
def test_a_row_computes_the_same_alone_and_in_any_company(run: Pass, form: str) -> None:
    table = make_table(1000, 64, form, gain=0.2)
    rows = ragged_rows(1000)
    hidden = make_hidden(*(row.length for row in rows))
    standing = mx.array(np.random.default_rng(1).integers(0, 1000, hidden.shape[0]), mx.int32)
    orders = [[0, 1, 2, 3, 4, 5], [5, 3, 1], [4, 3, 2, 1, 0], *([n] for n in range(6))]
    spans = np.cumsum([0, *(row.length for row in rows)])
    seen: dict[int, dict[str, np.ndarray]] = {}
    for order in orders:
        places = np.concatenate([np.arange(spans[n], spans[n + 1]) for n in order])
        at = mx.array(places)
        result = run(hidden[at], table, [rows[n] for n in order], standing=standing[at])
        start = 0
        for n in order:
            stop = start + rows[n].length
            for field in fields(VocabularyResult):
                value = getattr(result, field.name)
                if value is None:
                    continue
                here, earlier = np.array(value[start:stop]), seen.setdefault(n, {})
                expected = earlier.setdefault(field.name, here)
                if here.dtype == np.int32:
                    assert np.array_equal(here, expected), field.name
                else:
                    np.testing.assert_allclose(here, expected, rtol=1e-5, atol=2e-5)
            start = stop
    for n, row in enumerate(rows):
        assert set(seen[n]) == {field.name for field in fields(VocabularyResult)}
        bound = np.array([] if row.fixed is None else np.flatnonzero(row.fixed >= 0), int)
        for name in ("entropy", "standing_log_probability", "log_sum", "dropped_mass"):
            assert not seen[n][name][bound].any()
        if row.fixed is not None:
            for name in ("draw", "argmax"):
                assert np.array_equal(seen[n][name][bound], row.fixed[bound])
        if row.key is None:
            assert np.array_equal(seen[n]["draw"], seen[n]["argmax"])
        assert seen[n]["soft_embeddings"].any() == row.need_soft
    same = make_hidden(11)
    again = run(mx.concatenate([same, same]), table, [rows[0], rows[5]]).draw
    assert np.array_equal(again[:11], again[11:])  # one key, one length
    other = run(same, table, [replace(rows[0], key=KEYS[1])]).draw
    assert not np.array_equal(again[:11], other)


def test_the_passes_agree() -> None:
    table, rows = make_table(1000, 64, gain=0.2), ragged_rows(1000)
    hidden = make_hidden(*(row.length for row in rows))
    standing = mx.full((hidden.shape[0],), 5, mx.int32)
    rows = [replace(row, likely=False, soft_cutoff=None) for row in rows]
    results = {name: run(hidden, table, rows, standing=standing) for name, run in PASSES.items()}
    for name in PIECES:
        for field, ours, theirs in both(results[name], results["whole"]):
            if not field.startswith("draw"):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=5e-5, err_msg=field)


@pytest.mark.parametrize(
    ("vocab", "sizes", "tile"),
    [
        (1000, {"chunk": 256}, 128),
        (1000, {"chunk": 384}, 256),  # tiles that make no whole chunk
        (20_011, {}, None),  # what is used on a GPU and on a CPU
    ],
)
@pytest.mark.parametrize("constrained", [False, True])
def test_a_seed_draws_the_same_on_a_cpu_as_on_a_gpu(
    vocab: int, sizes: dict[str, int], tile: int | None, constrained: bool
) -> None:
    table, hidden = make_table(vocab, 64, gain=0.02), make_hidden(64, 64)
    allowed = np.random.default_rng(3).random((64, vocab)) < 0.3
    masks = {"allowed": packed(allowed)} if constrained else {}
    rows = [Row(64, 0.8, key, need_soft=False, **masks) for key in KEYS]
    ours = tiled_pass(hidden, table, rows, softcap=SOFTCAP, tile=tile, **sizes)
    theirs = vocabulary_pass(hidden, table, rows, softcap=SOFTCAP, **sizes)
    assert np.array_equal(ours.draw, theirs.draw)
    assert len(np.unique(np.array(ours.draw))) > 64  # or rounding would have no part in it
    np.testing.assert_allclose(ours.draw_log_probability, theirs.draw_log_probability, atol=5e-5)


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
@pytest.mark.parametrize(
    ("which", "gain", "constrained"),
    # The twin of the form for a GPU sorts every chunk, which takes a minute.
    [("cpu", 0.02, False), ("cpu", 0.2, True), ("gpu", 0.2, True)],
)
def test_a_million_draws_follow_the_distribution(
    which: str, gain: float, constrained: bool
) -> None:
    vocab, canvas, passes = 300, 8192, 128
    table = make_table(vocab, 32, gain=gain)
    hidden = make_hidden(1, width=32, seed=3)
    allowed = None
    if constrained:
        allowed = np.random.default_rng(5).random((1, vocab)) < 0.3
    p = in_float64(hidden, table, 0.7, allowed).p[0]
    words = {} if allowed is None else dict.fromkeys(range(canvas), packed(allowed)[0])
    counts = np.zeros(vocab)
    for key in range(passes):
        row = Row(canvas, 0.7, mx.array([key, 9], mx.uint32), allowed=words, need_soft=False)
        result = PASSES[which](mx.repeat(hidden, canvas, axis=0), table, [row])
        counts += np.bincount(np.array(result.draw), minlength=vocab)
    assert counts.sum() >= 1e6
    assert counts[p == 0].sum() == 0
    assert chi_square(counts, p) < 5
    # The test sees a draw that is off by little.
    skewed = p * np.where(np.arange(vocab) % 256 < 128, 1.03, 1.0)
    assert chi_square(counts, skewed / skewed.sum()) > 5


@pytest.mark.parametrize("form", ["float32", "affine-4"])
def test_allowed_sets_and_fixed_tokens(run: Pass, form: str) -> None:
    vocab = 700
    table, hidden = make_table(vocab, 64, form), make_hidden(12, 12)
    allowed = np.random.default_rng(1).random((24, vocab)) < 0.02
    allowed[:, 17] = True
    allowed[3] = False
    allowed[3, 699] = True  # one choice: certain
    fixed = np.full(24, -1, np.int32)
    fixed[17] = 123
    expected = in_float64(hidden, table, 0.6, allowed)
    rows = [
        Row(12, 0.6, key, fixed=fixed[part], allowed=packed(allowed[part]))
        for key, part in zip(KEYS, (slice(0, 12), slice(12, 24)), strict=True)
    ]
    result = run(hidden, table, rows, standing=mx.full((24,), 16, mx.int32))
    weight = np.array(table.rows(0, vocab, mx.float32))
    entropy, soft = expected.entropy.copy(), expected.soft.copy()
    entropy[17], soft[17] = 0, weight[123] * float(table.scale)
    np.testing.assert_allclose(result.entropy, entropy, atol=2e-5)
    np.testing.assert_allclose(result.soft_embeddings, soft, atol=1e-3)
    argmax = expected.logits.argmax(axis=-1)
    argmax[17] = 123
    assert np.array_equal(result.argmax, argmax)
    assert result.argmax[3].item() == result.draw[3].item() == 699
    assert result.draw[17].item() == 123
    inside = of_tokens(allowed, result.draw)
    assert (inside | (fixed >= 0)).all()
    # What is forbidden has no probability, even if it stands there.
    standing = np.array(result.standing_log_probability)
    may = allowed[:, 16] & (fixed < 0)
    assert (standing[~may & (fixed < 0)] < -1e30).all() and standing[17] == 0
    log_p = expected.logits[:, 16] - expected.log_sum
    np.testing.assert_allclose(standing[may], log_p[may], atol=5e-5)


def test_few_restricted_positions_and_pieces(run: Pass) -> None:
    """Most positions may hold anything, and what is forbidden lies in one piece."""
    table, hidden = make_table(700, 64), make_hidden(12, 12)
    allowed = np.ones((24, 700), bool)
    allowed[3, :] = np.arange(700) == 20
    allowed[19, 256:512] = False
    expected = in_float64(hidden, table, 0.6, allowed)
    rows = [
        Row(12, 0.6, KEYS[0], allowed=packed(allowed[:12])),
        Row(12, 0.6, KEYS[1], allowed=packed(allowed[12:])),
    ]
    result = run(hidden, table, rows)
    np.testing.assert_allclose(result.entropy, expected.entropy, atol=2e-5)
    np.testing.assert_allclose(result.soft_embeddings, expected.soft, atol=1e-3)
    assert np.array_equal(result.argmax, expected.logits.argmax(axis=-1))
    assert result.draw[3].item() == 20
    assert not 256 <= result.draw[19].item() < 512


@pytest.mark.parametrize("bound", [(0, 17, 23), "all"])
def test_fixed_positions_leave_the_others_as_they_are(run: Pass, bound) -> None:
    table, hidden = make_table(700, 64), make_hidden(12, 12)
    fixed = np.full(24, -1 if bound != "all" else 9, np.int32)
    if bound != "all":
        fixed[list(bound)] = 123
    settings = {"standing": mx.full((24,), 7, mx.int32)}
    rows = [Row(12, 0.6, key, soft_cutoff=9.0) for key in KEYS]
    held = [replace(row, fixed=fixed[n * 12 :][:12]) for n, row in enumerate(rows)]
    free, some = run(hidden, table, rows, **settings), run(hidden, table, held, **settings)
    is_open = fixed < 0
    for name, seen, alone in both(some, free):
        np.testing.assert_allclose(
            seen[is_open], alone[is_open], rtol=1e-5, atol=1e-5, err_msg=name
        )
    for name in ("argmax", "draw"):
        assert np.array_equal(np.array(getattr(some, name))[~is_open], fixed[~is_open])
    assert (np.array(some.entropy)[~is_open] == 0).all()


LIKELY = [
    pytest.param(1.0, 0.1, 1, 8, id="gathered"),
    pytest.param(0.8, 0.6, 9, 120, id="multiplied-at-the-end"),
    pytest.param(0.05, 0.5, 600, 3000, id="multiplied-at-once"),
]


@pytest.mark.parametrize("form", ["float32", "affine-4", "mxfp4"])
@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize(("gain", "temperature", "least", "most"), LIKELY)
def test_only_likely_tokens_enter_the_soft_embeddings_on_a_cpu(
    form: str, constrained: bool, gain: float, temperature: float, least: int, most: int
) -> None:
    table = make_table(3000, 64, form, gain=gain)
    hidden = make_hidden(20)
    if least == 1:  # a canvas that is certain everywhere but for two positions
        hidden = mx.concatenate([hidden[14:], hidden[14:15] * 0.98])
    if least == 9:
        hidden = make_hidden(5)[2:4]
    count = hidden.shape[0]
    row = Row(count, temperature, soft_cutoff=6.0)
    allowed = None
    if constrained:
        allowed = np.random.default_rng(2).random((count, 3000)) < 0.7
        row = replace(row, allowed=packed(allowed))
    logits = in_float64(hidden, table, temperature, allowed).logits
    likely = (logits >= logits.max(axis=-1, keepdims=True) - 6.0).sum(axis=-1)
    assert least <= likely.max() <= most  # or this is another case

    run = partial(tiled_pass, softcap=SOFTCAP, tile=1024)
    tiled, whole = run(hidden, table, [row]), PASSES["whole"](hidden, table, [row])
    slack = np.array(whole.dropped_mass - tiled.dropped_mass)
    rounding = 4e-5 if temperature < 0.5 else 1e-5  # of logits up to 300 in the whole
    assert (slack > -rounding).all()
    if most < 600:
        # Else a tile is measured by the maximum so far and keeps some tokens more.
        assert (slack < rounding).all()
        assert least == 1 or np.array(whole.dropped_mass).max() > 1e-4
    size = float(mx.abs(table.rows(0, 3000, mx.float32)).max() * table.scale)
    difference = np.abs(np.array(tiled.soft_embeddings - whole.soft_embeddings)).max()
    assert difference < 1e-4 * size + 2 * slack.max() * size
    # A guess, be it the best or the worst, forbidden or not, changes nothing of that.
    for guess in (logits.argmax(axis=-1), logits.argmin(axis=-1), 0 * likely):
        guessed = run(hidden, table, [row], standing=mx.array(guess, mx.int32))
        assert np.array_equal(guessed.argmax, tiled.argmax)
        slack_now = np.array(whole.dropped_mass - guessed.dropped_mass)
        assert (slack_now > -rounding).all() and (slack_now <= slack + 1e-5).all()
        difference = np.abs(np.array(guessed.soft_embeddings - whole.soft_embeddings)).max()
        assert difference < 1e-4 * size + 2 * slack.max() * size
    exact = run(hidden, table, [replace(row, soft_cutoff=None)])
    left_out = np.array(tiled.dropped_mass)[:, None]
    moved = np.abs(np.array(tiled.soft_embeddings - exact.soft_embeddings))
    assert (moved <= 2 * left_out * size + 1e-4 * size).all()
    assert not np.array(exact.dropped_mass).any()


@pytest.mark.parametrize("form", ["float32", "affine-4", "mxfp4"])
@pytest.mark.parametrize("constrained", [False, True])
def test_the_likeliest_few_stand_for_all_on_a_gpu_where_they_may(
    form: str, constrained: bool
) -> None:
    table, hidden = make_table(3000, 64, form, gain=0.7), make_hidden(20, 20, 20)
    allowed = np.ones((60, 3000), bool)
    if constrained:
        allowed = np.random.default_rng(2).random((60, 3000)) < 0.7
        allowed[30] = np.arange(3000) < 3  # fewer than are kept
    words = [packed(allowed[part : part + 20]) for part in (0, 20, 40)]
    rows = [
        Row(20, 0.6, allowed=words[0], soft_cutoff=6.0, likely=True),
        Row(20, 0.4, allowed=words[1], soft_cutoff=3.0, likely=True),
        Row(20, 0.6, allowed=words[2], soft_cutoff=6.0, likely=np.arange(20) < 5),
    ]
    result = PASSES["gpu"](hidden, table, rows)
    temperatures, cutoffs = np.repeat([0.6, 0.4, 0.6], 20), np.repeat([6.0, 3.0, 6.0], 20)
    all_of_them = in_float64(hidden, table, temperatures, allowed)
    sixteenth = np.sort(all_of_them.logits, axis=-1)[:, -BEST]
    nearer = np.minimum(cutoffs, all_of_them.logits.max(axis=-1) - sixteenth + 1e-9)
    few = in_float64(hidden, table, temperatures, allowed, nearer)
    kept = all_of_them.logits >= all_of_them.logits.max(axis=-1)[:, None] - nearer[:, None]
    dropped = 1 - np.where(kept, all_of_them.p, 0).sum(axis=-1)
    assert dropped.max() > 0.1 and (kept.sum(axis=-1) < BEST).any()
    np.testing.assert_allclose(result.dropped_mass, dropped, atol=5e-5)
    expected = np.concatenate([few.soft[:45], all_of_them.soft[45:]])
    np.testing.assert_allclose(result.soft_embeddings, expected, rtol=0, atol=1e-3)


def test_a_token_knows_its_probability(run: Pass) -> None:
    table, hidden = make_table(700, 64), make_hidden(12, 12)
    fixed = np.full(12, -1, np.int32)
    fixed[5] = 124
    rows = [Row(12, 0.5, KEYS[0]), Row(12, 0.8, KEYS[1], fixed=fixed)]
    standing = mx.array(np.random.default_rng(0).integers(0, 700, 24), mx.int32)
    result = run(hidden, table, rows, standing=standing)
    log_p = np.log(in_float64(hidden, table, np.repeat([0.5, 0.8], 12)).p)
    for tokens, found in (
        (result.argmax, result.argmax_log_probability),
        (result.draw, result.draw_log_probability),
        (standing, result.standing_log_probability),
    ):
        expected = of_tokens(log_p, tokens)
        expected[17] = 0
        np.testing.assert_allclose(found, expected, atol=5e-5)


def test_a_position_without_any_allowed_token_has_no_entropy(run: Pass) -> None:
    table, hidden = make_table(300, 32), make_hidden(2, width=32)
    row = Row(2, 0.5, allowed=packed(np.array([[True] * 300, [False] * 300])))
    assert np.isnan(np.array(run(hidden, table, [row]).entropy)).tolist() == [False, True]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_entropy(run: Pass, value: float) -> None:
    """The softcap alone would hide an infinity."""
    table, hidden = make_table(300, 32), make_hidden(3, width=32)
    hidden[1, 4] = value
    entropy = np.array(run(hidden, table, [Row(3, 0.5, KEYS[0])]).entropy)
    assert np.isfinite(entropy).tolist() == [True, False, True]
    weight = mx.array(table.weight)
    weight[299, 4] = value
    damaged = replace(table, weight=weight)
    result = run(make_hidden(3, width=32), damaged, [Row(3, 0.5, KEYS[0])])
    assert not np.isfinite(np.array(result.entropy)).any()


def test_what_is_not_asked_for_is_not_there(run: Pass) -> None:
    table, hidden = make_table(300, 32), make_hidden(2, width=32)
    result = run(hidden, table, [Row(2, 0.5, need_soft=False)])
    assert result.soft_embeddings is None and result.draw is None
    assert result.draw_log_probability is None and result.standing_log_probability is None


@pytest.mark.parametrize(
    ("run", "row", "arguments", "message"),
    [
        (
            vocabulary_pass,
            Row(2, 0.5),
            {"chunk": 100},
            "chunk is 100; it must be a multiple of 128.",
        ),
        (tiled_pass, Row(2, 0.5), {"tile": 0}, "tile is 0; it must be a multiple of 128."),
        (vocabulary_pass, Row(2, 0.0), {}, "temperature is 0.0; it must be above 0."),
        (tiled_pass, Row(2, 0.0), {}, "temperature is 0.0; it must be above 0."),
        (whole_pass, Row(2, 0.0), {}, "temperature is 0.0; it must be above 0."),
        (vocabulary_pass, Row(3, 0.5), {}, "rows of 3 positions for 2 hidden states."),
    ],
)
def test_wrong_settings_are_named(run: Pass, row: Row, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        run(make_hidden(2, width=32), make_table(300, 32), [row], softcap=SOFTCAP, **arguments)
    assert str(raised.value) == message


def test_memory_holds_no_logits_on_a_cpu() -> None:
    """At the vocabulary and canvas of the release, beyond the table and the hidden states."""
    vocab, canvas, width = 262_144, 256, 32
    table = EmbeddingTable(mx.random.normal((vocab, width), key=mx.random.key(0)), mx.float32)
    hidden = mx.random.normal((canvas, width), key=mx.random.key(1))
    mx.eval(hidden, table.weight)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = tiled_pass(hidden, table, [Row(canvas, 0.5, KEYS[0])], softcap=SOFTCAP)
    mx.eval(result.argmax, result.draw, result.entropy, result.soft_embeddings)
    assert mx.get_peak_memory() - before < 100e6

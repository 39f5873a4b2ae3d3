"""The pass over few tokens, beside the pass over all of them under masks."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.diffusion.constraints import token_mask
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.few_tokens import few_tokens_pass, gathered
from mlx_diffgemma.kernels.materialized import whole_pass
from mlx_diffgemma.kernels.rows import Row

VOCAB, WIDTH, CAP = 300, 64, 3.0


def table(bits: int | None) -> EmbeddingTable:
    weight = mx.random.normal((VOCAB, WIDTH), key=mx.random.key(1))
    if bits is None:
        return EmbeddingTable(weight, mx.float32)
    packed, scales, biases = mx.quantize(weight, group_size=32, bits=bits)
    return EmbeddingTable(packed, mx.float32, scales, biases, 32, bits)


def both(rng: np.random.Generator, length: int, temperature: float, soft: bool, key: int | None):
    """The same row for either pass."""
    fixed = np.where(rng.random(length) < 0.5, rng.integers(0, VOCAB, length), -1).astype(np.int32)
    fixed[0] = -1
    few = tuple(
        tuple(rng.choice(VOCAB, rng.integers(1, 9), replace=False).tolist())
        for _ in range(int((fixed < 0).sum()))
    )
    places = np.flatnonzero(fixed < 0).tolist()
    masks = {place: token_mask(each, VOCAB) for place, each in zip(places, few, strict=True)}
    shared = {
        "length": length, "temperature": temperature, "fixed": fixed, "need_soft": soft,
        "key": None if key is None else mx.random.key(key),
    }  # fmt: skip
    return Row(**shared, candidates=few), Row(**shared, allowed=masks)


@pytest.mark.parametrize("bits", [None, 4])
def test_few_tokens_are_all_tokens_under_masks(bits):
    rng = np.random.default_rng(3)
    pairs = [both(rng, 7, 0.6, True, None), both(rng, 12, 1.0, False, 2), both(rng, 5, 2, True, 4)]
    hidden = mx.random.normal((24, WIDTH), key=mx.random.key(0))
    few, whole = (
        run(hidden, table(bits), [pair[n] for pair in pairs], softcap=CAP)
        for n, run in enumerate((few_tokens_pass, whole_pass))
    )
    assert few.argmax.tolist() == whole.argmax.tolist()
    for name in ("entropy", "log_sum", "soft_embeddings"):
        ours, theirs = np.array(getattr(few, name)), np.array(getattr(whole, name))
        assert ours == pytest.approx(theirs, abs=2e-5), name
    assert np.abs(np.array(few.soft_embeddings)[:7]).max() > 1
    draws, rows = np.array(few.draw), [pair[0] for pair in pairs]
    allowed = dict(zip(np.flatnonzero(rows[1].fixed < 0), rows[1].candidates, strict=True))
    assert all(draws[7 + n] in each for n, each in allowed.items())
    assert draws[:7].tolist() == np.array(few.argmax)[:7].tolist()


def test_draws_follow_the_probabilities():
    count = 4000
    row = Row(count, 1.0, key=mx.random.key(5), need_soft=False, candidates=((3, 90, 7),) * count)
    hidden = mx.broadcast_to(mx.random.normal((1, WIDTH), key=mx.random.key(2)), (count, WIDTH))
    found = few_tokens_pass(hidden, table(None), [row], softcap=CAP)
    draws = np.array(found.draw)
    seen = zip(draws, np.array(found.draw_log_probability), strict=True)
    p = {int(t): float(np.exp(x)) for t, x in seen}
    for token in (3, 90, 7):
        assert (draws == token).mean() == pytest.approx(p[token], abs=0.03)
    best = np.exp(np.array(found.argmax_log_probability))
    np.testing.assert_allclose(best, max(p.values()), rtol=1e-5)


def test_what_is_not_finite_shows():
    hidden = mx.ones((2, WIDTH)) * mx.array([[1.0], [mx.inf]])
    row = Row(2, 1.0, need_soft=False, candidates=((1, 2), (1, 2)))
    entropy = np.array(few_tokens_pass(hidden, table(None), [row], softcap=CAP).entropy)
    assert np.isfinite(entropy).tolist() == [True, False]


def test_candidates_are_gathered_once():
    ids, may = gathered([(9, 4), (4,), (12, 9, 4)])
    assert ids.tolist() == [4, 9, 12]
    assert may.tolist() == [[True, True, False], [True, False, False], [True, True, True]]

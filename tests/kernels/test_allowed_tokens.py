"""Sets of allowed tokens, a bit for each."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.kernels.allowed_tokens import pack_allowed, unpack_allowed


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 700])
def test_packed_sets_unpack(vocab: int) -> None:
    allowed = np.random.default_rng(vocab).random((2, 3, vocab)) < 0.5
    words = pack_allowed(mx.array(allowed))
    assert words.dtype == mx.uint32 and words.shape == (2, 3, -(-vocab // 32))
    assert np.array_equal(unpack_allowed(words, vocab), allowed)

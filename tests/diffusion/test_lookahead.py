"""What is known of positions ahead, on languages small enough to list."""

from __future__ import annotations

import numpy as np
from test_closing import Words, random_words

from mlx_diffgemma.diffusion.constraints import token_mask
from mlx_diffgemma.diffusion.lookahead import few_tokens_in, look_ahead, tokens_in

EOS = 31
END = token_mask([EOS], 32)


class Sentences(Words):
    """Words that an eos ends."""

    def allowed(self):
        return super().allowed() | (END if self.may_end else 0)

    def signature(self):
        return tuple(self._rest())

    @property
    def must_end(self):
        return self._rest() == [()]

    def copy(self):
        return Sentences(self.words, self.taken)


def test_it_is_what_any_word_has_there():
    rng = np.random.default_rng(2)
    for _ in range(300):
        words = random_words(rng)
        depth = int(rng.integers(1, 12))
        found = [set(tokens_in(mask)) for mask in look_ahead(Sentences(words), depth, END)]
        padded = [(*word, *[EOS] * (depth - len(word)))[:depth] for word in words]
        assert found == [set(column) for column in zip(*padded, strict=True)]


def test_where_too_many_ways_lead_on_it_ends():
    many = [(a, b, 5) for a in range(30) for b in range(30)]
    assert len(look_ahead(Sentences(many), 3, END)) == 3

    class Wide(Sentences):
        def allowed(self):
            return token_mask(range(64), 64)

    end = token_mask([EOS], 64)
    (only,) = look_ahead(Wide(many), 3, end)
    assert set(tokens_in(only)) == set(range(64))


def test_tokens_of_a_mask():
    for size in (32, 70):
        tokens = [0, 3, 31, *([64, 69] if size == 70 else [])]
        assert tokens_in(token_mask(tokens, size)) == tokens


def test_few_tokens_of_a_mask():
    rng = np.random.default_rng(3)
    for count in (0, 1, 4, 5, 6, 300):
        tokens = sorted(rng.choice(4000, count, replace=False).tolist())
        expected = tokens if count <= 5 else None
        assert few_tokens_in(token_mask(tokens, 4000), 5) == expected
    assert few_tokens_in(token_mask(range(6), 32), 5) is None

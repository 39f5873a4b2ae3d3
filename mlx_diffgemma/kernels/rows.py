"""What is asked of a pass over the vocabulary, and what it answers.

A pass takes the canvases of several requests at once, of any length and each with settings of its
own. All arrays are flat: one canvas after another.
Letters: C canvas of a row, N positions of all rows, M of them that no token is bound to, D hidden,
V vocabulary, W = ⌈V / 32⌉ words of a bit mask, K masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_diffgemma.kernels.dispatch import Implementation, Launcher
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable


@dataclass(frozen=True)
class Row:
    """What is asked of the positions of one canvas. The answer is the same whichever other rows go
    through the pass with it.

    Attributes:
        length: C.
        temperature: what the logits are divided by, above 0.
        key: [2] uint32, from which alone the row draws; None draws nothing.
        fixed: [C] int32, the token that a position is bound to, or −1. A bound position has that
            token as argmax and draw, with entropy 0, and takes no part in the pass.
        allowed: the uint32 bit mask [W] of the tokens that a position may take (see
            `pack_allowed`), for each of the C positions that may not take all.
        candidates: the tokens that each position that is not bound may take, in their order, where
            they are few; such a row needs no `allowed`, and goes by `few_tokens_pass`.
        need_soft: whether soft embeddings are wanted, √D · (p @ table).
        soft_cutoff: tokens e^-soft_cutoff times less likely than the likeliest are left out of
            them; None leaves out none.
        likely: whether the likeliest few within the cutoff may stand for all of them, for all
            positions or for each [C]. Only the form for a GPU makes use of it.
    """

    length: int
    temperature: float
    key: mx.array | None = None
    fixed: np.ndarray | None = None
    allowed: Mapping[int, np.ndarray] = field(default_factory=dict)
    candidates: tuple[tuple[int, ...], ...] | None = None
    need_soft: bool = True
    soft_cutoff: float | None = None
    likely: bool | np.ndarray = False


@dataclass(frozen=True)
class VocabularyResult:
    """What the model says of each position, flat.

    Attributes:
        argmax: [N] int32.
        argmax_log_probability: [N] float32, that of `argmax`, 0 where a token is fixed.
        draw: [N] int32, in rows without a key the argmax; None if no row has a key.
        entropy: [N] float32, in nats; NaN where nothing is allowed or a logit is not finite.
        log_sum: [N] float32, the logarithm of the sum of the exponentials of the logits; 0 where a
            token is fixed.
        draw_log_probability: [N] float32, that of `draw`; None without a draw.
        standing_log_probability: [N] float32, that of the token asked about, 0 where a token is
            fixed; None if none was asked about.
        soft_embeddings: [N, D] in the type of the hidden states, zeros in rows that need none; None
            if no row needs them.
        dropped_mass: [N] float32, the probability that a row with a cutoff leaves out of its soft
            embeddings; in the form for a GPU, what they leave out if the likeliest few stand for
            all, whether they do or not. 0 without a cutoff.
    """

    argmax: mx.array
    argmax_log_probability: mx.array
    draw: mx.array | None
    entropy: mx.array
    log_sum: mx.array
    draw_log_probability: mx.array | None
    standing_log_probability: mx.array | None
    soft_embeddings: mx.array | None
    dropped_mass: mx.array


class VocabularyPass(Protocol):
    """Hidden states [N, D] -> what follows from p = softmax(softcap · tanh(hidden @ table.T /
    softcap) / temperature), in float32.

    `standing` [N] int32 are tokens whose log-probability is asked about, such as the canvas has; a
    form may also take them for tokens that a position may well take, to save time.
    """

    def __call__(
        self,
        hidden: mx.array,
        table: EmbeddingTable,
        rows: Sequence[Row],
        *,
        softcap: float,
        standing: mx.array | None = None,
        implementation: Implementation | Launcher = "auto",
    ) -> VocabularyResult: ...


def check(rows: Sequence[Row], count: int) -> None:
    """Raise ValueError where the rows do not fit `count` hidden states, or a setting is wrong."""
    asked = sum(row.length for row in rows)
    if asked != count:
        raise ValueError(f"rows of {asked} positions for {count} hidden states.")
    for row in rows:
        if not row.temperature > 0:
            raise ValueError(f"temperature is {row.temperature}; it must be above 0.")


@dataclass(frozen=True)
class Positions:
    """The rows as flat arrays, all known on the host.

    Attributes:
        rows: the rows that were asked for.
        fixed: [N] int32, the token that a position is bound to, or −1.
        places: [M] which of the N are looked at: those that are not bound, at least one.
        spans: where each row's positions are among the M: the first, and the one after the last.
    """

    rows: tuple[Row, ...]
    fixed: np.ndarray
    places: np.ndarray
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, rows: Sequence[Row], count: int) -> Positions:
        """The positions of `rows`, for `count` hidden states.

        Raises:
            ValueError: the rows do not fit the hidden states, or a temperature is not above 0.
        """
        check(rows, count)
        lengths = [row.length for row in rows]
        free = [
            np.full(row.length, -1, np.int32) if row.fixed is None else row.fixed for row in rows
        ]
        fixed = np.concatenate(free).astype(np.int32)
        is_open = fixed < 0
        if not is_open.any():
            is_open[0] = True
        before = np.concatenate([[0], np.cumsum(is_open)])
        ends = np.cumsum([0, *lengths])
        bounds = before[ends].tolist()
        return cls(
            tuple(rows),
            fixed,
            np.flatnonzero(is_open),
            tuple(pairwise(bounds)),
        )

    @property
    def has_draws(self) -> bool:
        return any(row.key is not None for row in self.rows)

    @cached_property
    def temperatures(self) -> np.ndarray:
        """[M] float32, the temperature of each position."""
        return self.of_rows(lambda row: row.temperature, np.float32)

    def of_rows(self, value: Callable[[Row], float | None], dtype: type) -> np.ndarray:
        """A value of each row at its positions, [M]."""
        counts = [stop - start for start, stop in self.spans]
        return np.repeat(np.array([value(row) for row in self.rows], dtype), counts)

    @cached_property
    def few(self) -> np.ndarray:
        """[M] whether the likeliest tokens stand for all in the soft embeddings."""
        wanted = [
            np.broadcast_to(row.likely, row.length)
            if row.need_soft and row.soft_cutoff is not None
            else np.zeros(row.length, bool)
            for row in self.rows
        ]
        return np.concatenate(wanted)[self.places]

    def allowed(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Which mask each position has, [M] int32 with −1 where all tokens are allowed, and the
        masks [K, W], of which several positions may share one; None where no position has any."""
        which = np.full(len(self.fixed), -1, np.int32)
        masks: dict[int, tuple[int, np.ndarray]] = {}
        first = 0
        for row in self.rows:
            for place, mask in row.allowed.items():
                if self.fixed[first + place] < 0:
                    which[first + place] = masks.setdefault(id(mask), (len(masks), mask))[0]
            first += row.length
        if not masks:
            return None
        return which[self.places], np.stack([mask for _, mask in masks.values()]).astype(np.uint32)

    def taken(self, values: mx.array, axis: int = 0) -> mx.array:
        """From values for all N positions along `axis`, those of the M."""
        if len(self.places) == len(self.fixed):
            return values
        return mx.take(values, mx.array(self.places), axis=axis)

    def spread(self, values: mx.array, bound: mx.array | float = 0) -> mx.array:
        """Values [M] -> [N], with `bound` where a token is fixed."""
        if len(self.places) == len(self.fixed) and not (self.fixed >= 0).any():
            return values
        source = np.zeros(len(self.fixed), np.int32)
        source[self.places] = np.arange(len(self.places))
        return mx.where(mx.array(self.fixed >= 0), bound, values[mx.array(source)])

    def soft_embeddings(
        self, parts: Sequence[tuple[np.ndarray, mx.array]], table: EmbeddingTable, dtype: mx.Dtype
    ) -> mx.array:
        """[N, D] from sums Σ p · embedding [m, D] at some of the M positions each; the embedding of
        its token where one is fixed, and zeros where nothing else is known."""
        source = np.full(len(self.fixed), -1)
        values, count = [], 0
        for among, sums in parts:
            source[self.places[among]] = count + np.arange(len(among))
            values.append(sums)
            count += len(among)
        needed = np.repeat([row.need_soft for row in self.rows], [row.length for row in self.rows])
        bound = np.flatnonzero((self.fixed >= 0) & needed)
        if len(bound):
            source[bound] = count + np.arange(len(bound))
            values.append(table.take(mx.array(self.fixed[bound]), mx.float32))
            count += len(bound)
        if (source < 0).any():
            source[source < 0] = count
            values.append(mx.zeros((1, table.hidden_size)))
        together = values[0] if len(values) == 1 else mx.concatenate(values)
        if not np.array_equal(source, np.arange(together.shape[0])):
            together = together[mx.array(source)]
        return (together * table.scale).astype(dtype)

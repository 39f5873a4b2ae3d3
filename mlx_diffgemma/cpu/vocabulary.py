"""The pass over the vocabulary for a CPU: tiles that fit a cache, in float32.

A tile of the table is dequantized once for all positions and read twice, for the logits and for the
soft embeddings. The host reads what a tile has given, for a wait costs nothing on a CPU, and so
looks only at what a row needs. Letters: N positions of all rows, M of them that no token is bound
to, D hidden, V vocabulary, v tokens of a tile, b blocks of `BLOCK` tokens of it, W words of 32
tokens, K masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_diffgemma.cpu.soft_sum import AllTokens, LikelyTokens, SoftSum
from mlx_diffgemma.cpu.tile_epilogue import TileStatistics, processed_logits, tile_epilogue
from mlx_diffgemma.kernels.allowed_tokens import FORBIDDEN, WORD, forbid
from mlx_diffgemma.kernels.dispatch import Implementation, Launcher
from mlx_diffgemma.kernels.draw import BLOCK, chances, choose_by_mass, race_of
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.rows import Positions, Row, VocabularyResult
from mlx_diffgemma.kernels.vocabulary import CHUNK


def default_tile(width: int) -> int:
    """Tokens at a time for hidden states of `width`: at most 25 MB of embeddings in float32 and
    4096 tokens, a power of 2, so that whole tiles make a chunk."""
    fitting = 6_291_456 // (width + 256)
    return min(4096, max(BLOCK, 1 << fitting.bit_length() - 1))


@dataclass(frozen=True)
class _State:
    """Running results of the tiles so far; `total` and `weighted` are Σe and Σe·(x − maximum) with
    e = exp(x − maximum). The draw is in the block of tokens that starts at `block` [M], whose
    products are `raw` [M, BLOCK]; its chunk ran as far as `race` [M] (see `kernels/draw.py`). They
    are None where no row draws."""

    maximum: mx.array
    argmax: mx.array
    total: mx.array
    weighted: mx.array
    race: mx.array | None
    block: mx.array | None
    raw: mx.array | None

    def arrays(self) -> list[mx.array]:
        arrays = [self.maximum, self.argmax, self.total, self.weighted]
        draw = (self.race, self.block, self.raw)
        return arrays + [each for each in draw if each is not None]


@dataclass(frozen=True)
class _Tile:
    """What a draw needs of a tile: its products `raw` [M, v], the masses [M, b] of its blocks, and
    the running maximum [M] that these are relative to."""

    raw: mx.array
    masses: mx.array
    maximum: mx.array


@dataclass(frozen=True)
class _Logits:
    """How products become logits: `scale` is cap / temperature, one number or [M, 1]; `which` [M]
    and `masks` [K, W] are the allowed tokens as `Positions.allowed` gives them, or None."""

    cap: float
    scale: float | mx.array
    vocab: int
    which: np.ndarray | None = None
    masks: np.ndarray | None = None

    def of_tile(self, raw: mx.array, start: int) -> mx.array:
        """The logits [M, v] of the tile that starts at token `start`."""
        x = processed_logits(raw, self.cap, self.scale)
        if self.which is None or self.masks is None:
            return x
        stop = start + raw.shape[1]
        words = self.masks[:, start // WORD : -(-stop // WORD)]
        full = np.full(words.shape[1], 0xFFFFFFFF, np.uint32)
        if stop % WORD:
            full[-1] = (1 << stop % WORD) - 1
        # Most sets allow all but a few tokens, so most tiles need no look at them.
        lacking = (words != full).any(axis=-1)
        at = np.flatnonzero((self.which >= 0) & lacking[self.which])
        if not len(at):
            return x
        allowed = mx.array(words[self.which[at]])
        if len(at) == len(self.which):
            return forbid(x, allowed)
        rows = mx.array(at)
        x[rows] = forbid(x[rows], allowed)
        return x

    def of_blocks(self, raw: mx.array, block: mx.array) -> mx.array:
        """The logits [M, BLOCK] of the tokens from `block` [M] on."""
        x = processed_logits(raw, self.cap, self.scale)
        x = mx.where(block[:, None] + mx.arange(BLOCK) < self.vocab, x, FORBIDDEN)
        if self.which is None or self.masks is None:
            return x
        count = BLOCK // WORD
        at = np.array(block)[:, None] // WORD + np.arange(count)
        words = self.masks[
            np.maximum(self.which, 0)[:, None], np.minimum(at, self.masks.shape[1] - 1)
        ]
        words = np.where((self.which < 0)[:, None], np.uint32(0xFFFFFFFF), words)
        return forbid(x, mx.array(words))

    def of_tokens(self, raw: mx.array, tokens: mx.array) -> mx.array:
        """The logits [M] of one token [M] a position."""
        x = processed_logits(raw[:, None], self.cap, self.scale)[:, 0]
        if self.which is None or self.masks is None:
            return x
        ids = np.array(tokens)
        word = self.masks[np.maximum(self.which, 0), ids // WORD]
        may = (self.which < 0) | ((word >> (ids % WORD).astype(np.uint32)) & 1 > 0)
        return mx.where(mx.array(may), x, FORBIDDEN)


def tiled_pass(
    hidden: mx.array,
    table: EmbeddingTable,
    rows: Sequence[Row],
    *,
    softcap: float,
    standing: mx.array | None = None,
    implementation: Implementation | Launcher = "auto",
    chunk: int = CHUNK,
    tile: int | None = None,
) -> VocabularyResult:
    """A `VocabularyPass`, `tile` tokens at a time (default: see `default_tile`). Memory grows with
    (M + D) · tile and, where rows draw, with M · chunk: the draws are those of the form for a GPU
    with the same `chunk`, whatever the tile. With a `soft_cutoff`, a good guess in `standing` saves
    time. Both `chunk` and `tile` are multiples of 128.

    Raises:
        ValueError: `chunk` or `tile` is no such multiple, the rows do not fit the hidden states, or
            a temperature is not above 0.
    """
    tile = default_tile(hidden.shape[-1]) if tile is None else tile
    for name, count in (("tile", tile), ("chunk", chunk)):
        if count < 1 or count % BLOCK:
            raise ValueError(f"{name} is {count}; it must be a multiple of {BLOCK}.")
    positions = Positions.of(rows, hidden.shape[0])
    vocab = table.vocab_size
    chunks = range(0, vocab, chunk)
    logits = _logits(positions, softcap, vocab)
    drawn = chances(positions, len(chunks))
    queries = positions.taken(hidden).astype(mx.float32)
    standing_logit = None
    if standing is not None:
        standing = positions.taken(standing).astype(mx.int32)
        raw = (queries * table.take(standing, mx.float32)).sum(axis=-1)
        standing_logit = logits.of_tokens(raw, standing)
    sums = _sums(positions, table, standing_logit, implementation)

    state = _start(positions, softcap, drawn is not None)
    for place, first in enumerate(chunks):
        tiles: list[_Tile] = []
        stop = min(first + chunk, vocab)
        for start in range(first, stop, tile):
            embeddings = table.rows(start, min(start + tile, stop), mx.float32)
            raw = queries @ embeddings.T
            after = tile_epilogue(raw, logits.of_tile(raw, start), state.maximum)
            before, state = state, _merge(state, after, start)
            shrink = mx.exp(before.maximum - state.maximum)
            for (begin, end), soft in sums:
                here = slice(begin, end)
                exponentials, maximum = after.exponentials[here], after.maximum[here]
                soft.add(exponentials, maximum, shrink[here], embeddings, start)
            if drawn is not None:
                tiles.append(_Tile(raw, after.masses, after.maximum))
                if start + tile >= stop:
                    chance = drawn[place], drawn[len(chunks) + place]
                    state = _offer(state, tiles, first, *chance)
            # A tile is computed while the next is being described: memory holds two at most.
            mx.async_eval(state.arrays(), [soft.arrays() for _, soft in sums])
            mx.eval(before.arrays())

    # What is not finite shows in `weighted` alone: the softcap made the logits finite.
    log_total = mx.log(state.total) + state.weighted * 0.0
    log_sum = state.maximum + log_total
    draw = draw_log_p = standing_log_p = None
    if drawn is not None:
        draw, logit = _draw(state, logits, drawn[-1])
        has_key = mx.array(positions.of_rows(lambda row: row.key is not None, np.bool_))
        draw = mx.where(has_key, draw, state.argmax)
        logit = mx.where(has_key, logit, state.maximum)
        draw_log_p = positions.spread(mx.minimum(logit - log_sum, 0.0))
    if standing_logit is not None:
        standing_log_p = positions.spread(mx.minimum(standing_logit - log_sum, 0.0))
    soft_embeddings, dropped = _finished(positions, sums, state, table, hidden.dtype)
    fixed = mx.array(positions.fixed)
    entropy = log_total - state.weighted / state.total
    return VocabularyResult(
        argmax=positions.spread(state.argmax, fixed),
        argmax_log_probability=positions.spread(-log_total),
        draw=None if draw is None else positions.spread(draw, fixed),
        # Rounding may leave a certain position a hair below zero.
        entropy=positions.spread(mx.maximum(entropy, 0.0)),
        log_sum=positions.spread(log_sum),
        draw_log_probability=draw_log_p,
        standing_log_probability=standing_log_p,
        soft_embeddings=soft_embeddings,
        dropped_mass=positions.spread(dropped),
    )


def _logits(positions: Positions, cap: float, vocab: int) -> _Logits:
    scale: float | mx.array = cap / float(positions.temperatures[0])
    if (positions.temperatures != positions.temperatures[0]).any():
        scale = mx.array(cap / positions.temperatures)[:, None]
    return _Logits(cap, scale, vocab, *(positions.allowed() or (None, None)))


def _sums(
    positions: Positions,
    table: EmbeddingTable,
    standing_logit: mx.array | None,
    implementation: Implementation | Launcher,
) -> list[tuple[tuple[int, int], SoftSum]]:
    """How the soft embeddings of each row that needs them are summed, and where its positions are
    among the M."""
    sums: list[tuple[tuple[int, int], SoftSum]] = []
    for row, (start, stop) in zip(positions.rows, positions.spans, strict=True):
        if not row.need_soft or start == stop:
            continue
        if row.soft_cutoff is None:
            sums.append(((start, stop), AllTokens(stop - start, table.hidden_size)))
            continue
        # The last maximum may be below the token's logit by rounding alone, by less than 1.
        floor = None if standing_logit is None else standing_logit[start:stop] - 1.0
        likely = LikelyTokens(stop - start, table, row.soft_cutoff, floor, implementation)
        sums.append(((start, stop), likely))
    return sums


def _start(positions: Positions, cap: float, draws: bool) -> _State:
    count = len(positions.places)
    return _State(
        # Just below the smallest logit there is, so that the first tile always exceeds it.
        maximum=mx.array(-cap / positions.temperatures * (1 + 1e-6)),
        argmax=mx.zeros((count,), mx.int32),
        total=mx.zeros((count,)),
        weighted=mx.zeros((count,)),
        race=mx.full((count,), FORBIDDEN) if draws else None,
        block=mx.zeros((count,), mx.int32) if draws else None,
        raw=mx.zeros((count, BLOCK)) if draws else None,
    )


def _merge(state: _State, after: TileStatistics, start: int) -> _State:
    """The state after a tile that starts at token `start`."""
    shift = state.maximum - after.maximum
    shrink = mx.exp(shift)
    return replace(
        state,
        maximum=after.maximum,
        argmax=mx.where(after.exceeds, start + after.argmax, state.argmax),
        total=state.total * shrink + after.masses.sum(axis=-1),
        weighted=(state.weighted + state.total * shift) * shrink + after.weighted,
    )


def _offer(
    state: _State, tiles: Sequence[_Tile], first: int, gumbel: mx.array, choose: mx.array
) -> _State:
    """The state after the draw was offered the chunk of these tiles, which starts at token `first`;
    see `kernels/draw.py`."""
    assert state.race is not None and state.block is not None and state.raw is not None
    seen = [tile.masses * mx.exp(tile.maximum - state.maximum)[:, None] for tile in tiles]
    masses = seen[0] if len(seen) == 1 else mx.concatenate(seen, axis=1)
    block = choose_by_mass(masses, choose)
    race = race_of(masses.sum(axis=-1), state.maximum, gumbel)
    replaced = race > state.race
    raw, before = state.raw, 0
    for tile in tiles:
        count = tile.masses.shape[1]
        here = replaced & (block >= before) & (block < before + count)
        place = mx.clip(block - before, 0, count - 1)
        raw = mx.where(here[:, None], _block_of(tile.raw, place), raw)
        before += count
    return replace(
        state,
        race=mx.where(replaced, race, state.race),
        block=mx.where(replaced, first + block * BLOCK, state.block),
        raw=raw,
    )


def _block_of(x: mx.array, block: mx.array) -> mx.array:
    """The columns [M, BLOCK] of block `block` [M] of x [M, v]."""
    if missing := -x.shape[-1] % BLOCK:
        x = mx.pad(x, [(0, 0), (0, missing)])
    rows = x.reshape(-1, BLOCK)
    return rows[mx.arange(x.shape[0]) * (x.shape[1] // BLOCK) + block]


def _draw(state: _State, logits: _Logits, uniform: mx.array) -> tuple[mx.array, mx.array]:
    """A token of the block that the draw ended in: [M] int32, and its logit [M]."""
    assert state.block is not None and state.raw is not None
    x = logits.of_blocks(state.raw, state.block)
    place = choose_by_mass(mx.exp(x - state.maximum[:, None]), uniform)
    return state.block + place, mx.take_along_axis(x, place[:, None], axis=-1)[:, 0]


def _finished(
    positions: Positions,
    sums: Sequence[tuple[tuple[int, int], SoftSum]],
    state: _State,
    table: EmbeddingTable,
    dtype: mx.Dtype,
) -> tuple[mx.array | None, mx.array]:
    """The soft embeddings [N, D], or None if no row needs them, and the mass [M] they leave out."""
    parts, dropped = [], mx.zeros_like(state.total)
    for (start, stop), soft in sums:
        expected, left_out = soft.finish(state.maximum[start:stop], state.total[start:stop])
        parts.append((np.arange(start, stop), expected))
        dropped[start:stop] = left_out
    if not any(row.need_soft for row in positions.rows):
        return None, dropped
    return positions.soft_embeddings(parts, table, dtype), dropped

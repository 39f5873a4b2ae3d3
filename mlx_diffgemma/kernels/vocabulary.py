"""The pass over the vocabulary that never holds the logits.

Head, softcap, softmax statistics, argmax, categorical draw, entropy and the self-conditioning
product are attention of each canvas position over the embedding table: queries are the hidden
states, keys and values the embeddings. So they are computed as attention is, tile by tile with a
running maximum. `materialized.py` has the same function in one piece. Letters: R rows, C canvas,
N = R · C positions, D hidden, V vocabulary, v tokens of a tile, W words of 32 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_diffgemma.kernels.allowed_tokens import WORD, restricted_rows
from mlx_diffgemma.kernels.dispatch import Implementation, Launcher
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.soft_sum import AllTokens, LikelyTokens, SoftSum, Summing
from mlx_diffgemma.kernels.tile_draw import Reservoir, Uniforms, choose_by_mass
from mlx_diffgemma.kernels.tile_epilogue import (
    BLOCK,
    TileStatistics,
    processed_logits,
    tile_epilogue,
)


def default_tile(width: int) -> int:
    """Tokens at a time for hidden states of `width`: 25 MB of embeddings in float32, 4096 at most.

    It does not depend on the number of positions, since the draws depend on the tiles, and a row is
    to draw the same alone and in a batch.
    """
    return min(4096, max(BLOCK, 6_291_456 // (width + 256) // BLOCK * BLOCK))


@dataclass(frozen=True)
class VocabularyResult:
    """What the model says of each position of a canvas.

    Attributes:
        argmax: [R, C] int32.
        draw: [R, C] int32, or None if no keys were given.
        entropy: [R, C] float32, in nats; NaN where nothing is allowed.
        soft_embeddings: [R, C, D] in the type of the hidden states, or None if not asked for.
        log_sum: [R, C] float32, the logarithm of the sum of the exponentials of the logits; 0
            where a token is fixed.
        draw_log_probability: [R, C] float32, that of the token drawn, or None without a draw.
        dropped_mass: [R, C] float32, the probability that `soft_embeddings` leaves out.
    """

    argmax: mx.array
    draw: mx.array | None
    entropy: mx.array
    soft_embeddings: mx.array | None
    log_sum: mx.array
    draw_log_probability: mx.array | None
    dropped_mass: mx.array


@dataclass(frozen=True)
class _State:
    """Running results of the tiles so far; `total` and `weighted` are Σe and Σe·(x − maximum) with
    e = exp(x − maximum)."""

    maximum: mx.array
    argmax: mx.array
    total: mx.array
    weighted: mx.array
    soft: SoftSum | None
    reservoir: Reservoir | None

    def arrays(self) -> list[mx.array]:
        arrays = [self.maximum, self.argmax, self.total, self.weighted]
        if self.soft is not None:
            arrays += self.soft.arrays()
        if self.reservoir is not None:
            arrays += [self.reservoir.start, self.reservoir.raw]
            if self.reservoir.words is not None:
                arrays.append(self.reservoir.words)
        return arrays


def vocabulary_pass(
    hidden: mx.array,
    table: EmbeddingTable,
    *,
    softcap: float,
    temperature: float,
    keys: mx.array | None = None,
    allowed: mx.array | None = None,
    fixed: mx.array | None = None,
    need_soft: bool = True,
    soft_cutoff: float | None = None,
    guess: mx.array | None = None,
    tile: int | None = None,
    implementation: Implementation | Launcher = "auto",
) -> VocabularyResult:
    """Hidden states [R, C, D] -> argmax, draw, entropy and soft embeddings of each position.

    p = softmax(softcap · tanh(hidden @ table.T / softcap) / temperature), in float32.

    Args:
        keys: [R, 2] uint32, one a row, from which alone the row draws; None draws nothing.
        allowed: [R, C, W] uint32, the tokens that a position may take (see `pack_allowed`).
        fixed: [R, C] int32, a token that a position is bound to, or −1: its argmax and draw, with
            entropy 0. It takes no part in the pass over the vocabulary.
        need_soft: whether to compute the soft embeddings, √D · (p @ table).
        soft_cutoff: leave tokens out of them that are e^-soft_cutoff times less likely than the
            likeliest; None leaves out none.
        guess: [R, C] int32, a token that each position may well take, such as the canvas has: with
            a `soft_cutoff` a good guess saves time. No result depends on it beyond that cutoff.
        tile: tokens at a time, a multiple of 128 (default: see `default_tile`). Memory grows with
            (R · C + D) · tile.
        implementation: of the kernels.
    """
    tile = default_tile(hidden.shape[-1]) if tile is None else tile
    if tile < 1 or tile % BLOCK:
        raise ValueError(f"tile is {tile}; it must be a multiple of {BLOCK}.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0.")
    rows, canvas, width = hidden.shape
    dtype = table.product_dtype
    starts = range(0, table.vocab_size, tile)
    queries = hidden.reshape(-1, width).astype(dtype)
    words = None if allowed is None else allowed.reshape(rows * canvas, -1)
    guess = None if guess is None else guess.flatten()
    uniforms = None if keys is None else Uniforms.of(keys, canvas, len(starts))
    places = None if fixed is None else _open_places(fixed)
    if places is not None:  # what is bound needs no look at the vocabulary
        queries = queries[places]
        words = None if words is None else words[places]
        guess = None if guess is None else guess[places]
        uniforms = None if uniforms is None else uniforms.at(places)
    restricted = None
    if words is not None:
        restricted = restricted_rows(words, starts, tile, table.vocab_size)

    summing: Summing | None = None
    if need_soft and soft_cutoff is not None:
        floor = None
        if guess is not None:
            floor = _floor(queries, table, guess, words, softcap, temperature)
        summing = LikelyTokens(soft_cutoff, table, floor, implementation)
    elif need_soft:
        summing = AllTokens()

    state = _start(len(queries), width, dtype, softcap / temperature, summing, uniforms, words)
    for place, start in enumerate(starts):
        stop = min(start + tile, table.vocab_size)
        embeddings = table.rows(start, stop, dtype)
        raw = queries @ embeddings.T
        tile_words = None if words is None else words[:, start // WORD : -(-stop // WORD)]
        seen = tile_epilogue(
            raw,
            state.maximum,
            tile_words,
            softcap=softcap,
            temperature=temperature,
            dtype=dtype if need_soft else None,
            restricted=None if restricted is None else restricted[place],
            implementation=implementation,
        )
        before, state = state, _merge(state, seen, start)
        if summing is not None and before.soft is not None:
            shrink = mx.exp(before.maximum - state.maximum)
            soft_sum = summing.add(before.soft, seen, shrink, embeddings, start)
            state = replace(state, soft=soft_sum)
        if uniforms is not None and state.reservoir is not None:
            draws = uniforms.tile[place], uniforms.block[place]
            kept = state.reservoir.offer(raw, tile_words, seen.masses, state.total, start, *draws)
            state = replace(state, reservoir=kept)
        # One tile is computed while the next is being described: memory holds two at most.
        mx.async_eval(state.arrays())
        mx.eval(before.arrays())

    def placed(values: mx.array, *shape: int) -> mx.array:
        """What is known of each position that was looked at, in the shape of the canvas."""
        if places is not None:
            all_values = mx.zeros((rows * canvas, *values.shape[1:]), values.dtype)
            all_values[places] = values
            values = all_values
        return values.reshape(rows, canvas, *shape)

    entropy = mx.log(state.total) - state.weighted / state.total
    log_sum = state.maximum + mx.log(state.total)
    draw = draw_log_p = soft = None
    if uniforms is not None and state.reservoir is not None:
        draw, logit = _draw(state, uniforms.token, softcap, temperature, table.vocab_size)
        draw, draw_log_p = placed(draw), placed(mx.minimum(logit - log_sum, 0.0))
    dropped = mx.zeros_like(entropy)
    if summing is not None and state.soft is not None:
        expected, dropped = summing.finish(state.soft, state.maximum, state.total)
        soft = placed((expected * table.scale).astype(hidden.dtype), width)
    result = VocabularyResult(
        argmax=placed(state.argmax),
        draw=draw,
        # Rounding may leave a certain position a hair below zero.
        entropy=placed(mx.maximum(entropy, 0.0)),
        soft_embeddings=soft,
        log_sum=placed(log_sum),
        draw_log_probability=draw_log_p,
        dropped_mass=placed(dropped),
    )
    return result if fixed is None else bind(result, fixed, table)


def bind(result: VocabularyResult, fixed: mx.array, table: EmbeddingTable) -> VocabularyResult:
    """`result` with the positions where `fixed` [R, C] is not −1 certain of that token."""
    bound = fixed >= 0
    soft, log_p = result.soft_embeddings, result.draw_log_probability
    if soft is not None:
        exact = table.take(mx.maximum(fixed, 0), mx.float32) * table.scale
        soft = mx.where(bound[..., None], exact.astype(soft.dtype), soft)
    return VocabularyResult(
        argmax=mx.where(bound, fixed, result.argmax),
        draw=None if result.draw is None else mx.where(bound, fixed, result.draw),
        entropy=mx.where(bound, 0.0, result.entropy),
        soft_embeddings=soft,
        log_sum=mx.where(bound, 0.0, result.log_sum),
        draw_log_probability=None if log_p is None else mx.where(bound, 0.0, log_p),
        dropped_mass=mx.where(bound, 0.0, result.dropped_mass),
    )


def _open_places(fixed: mx.array) -> mx.array | None:
    """The positions that no token is bound to, at least one; None for all."""
    places = np.flatnonzero(np.array(fixed).reshape(-1) < 0)
    if len(places) == fixed.size:
        return None
    return mx.array(places if len(places) else [0])


def _start(
    positions: int,
    width: int,
    dtype: mx.Dtype,
    largest: float,
    summing: Summing | None,
    uniforms: Uniforms | None,
    words: mx.array | None,
) -> _State:
    empty = None
    if uniforms is not None:
        empty = Reservoir.empty(positions, dtype, constrained=words is not None)
    return _State(
        # Just below the smallest logit there is, so that the first tile always exceeds it.
        maximum=mx.full((positions,), -largest * (1 + 1e-6)),
        argmax=mx.zeros((positions,), mx.int32),
        total=mx.zeros((positions,)),
        weighted=mx.zeros((positions,)),
        soft=None if summing is None else summing.start(positions, width),
        reservoir=empty,
    )


def _merge(state: _State, seen: TileStatistics, start: int) -> _State:
    """The state after a tile that starts at token `start`."""
    shift = state.maximum - seen.maximum
    shrink = mx.exp(shift)
    return replace(
        state,
        maximum=seen.maximum,
        argmax=mx.where(seen.exceeds, start + seen.argmax, state.argmax),
        total=state.total * shrink + seen.masses.sum(axis=-1),
        weighted=(state.weighted + state.total * shift) * shrink + seen.weighted,
    )


def _draw(
    state: _State, uniform: mx.array, softcap: float, temperature: float, vocab: int
) -> tuple[mx.array, mx.array]:
    """A token of the block that remained in the reservoir: [N] int32, and its logit [N]."""
    assert state.reservoir is not None
    kept = state.reservoir
    x = processed_logits(kept.raw, kept.words, softcap, temperature)
    exists = kept.start[:, None] + mx.arange(BLOCK) < vocab
    masses = mx.where(exists, mx.exp(x - state.maximum[:, None]), 0.0)
    place = choose_by_mass(masses, uniform)
    return kept.start + place, mx.take_along_axis(x, place[:, None], axis=-1)[:, 0]


def _floor(
    queries: mx.array,
    table: EmbeddingTable,
    guess: mx.array,
    words: mx.array | None,
    softcap: float,
    temperature: float,
) -> mx.array:
    """What the maximum of each position [N] is at least, given one token [N] of each."""
    rows = table.take(guess, queries.dtype).astype(mx.float32)
    raw = (queries.astype(mx.float32) * rows).sum(axis=-1, keepdims=True)
    bit = None
    if words is not None:
        word = mx.take_along_axis(words, (guess // WORD)[:, None], axis=-1)
        bit = word >> (guess % WORD)[:, None].astype(mx.uint32)
    logit = processed_logits(raw, bit, softcap, temperature)[:, 0]
    return logit - 1.0  # products in a narrow type differ by less

"""Encoding tokens into a prefix, a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import mlx.core as mx

from mlx_diffgemma.diffusion.events import PrefillProgress
from mlx_diffgemma.model.cache import PrefixCache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

_NEAR = 64  # tokens that are sooner encoded again than a mark is kept


def encode(
    model: DiffusionGemma,
    cache: PrefixCache,
    ids: Sequence[int],
    *,
    row: int = 0,
    step_size: int | None = None,
    room: int = 0,
    marks: Sequence[int] = (),
    ahead: bool = False,
) -> Iterator[PrefillProgress]:
    """Make the prefix in `cache` that of `ids`, from the longest beginning of them that it can go
    back to. Yields before the first chunk and after each, and may be left there: the cache then
    holds a shorter prefix, and a true one.

    Args:
        step_size: tokens of a chunk, so that memory does not grow with the square of the prompt;
            None takes the model's.
        room: positions to make room for behind `ids`.
        marks: how many of the `ids` precede each place to come back to later.
        ahead: hand the work to the device without waiting for it where it is no more than one chunk
            of tokens, for a caller that has more to queue.
    """
    cache.begin(ids)
    start, total = len(cache.prefix), len(ids)
    cache.prefix = cache.prefix.with_room(total - start + room)
    yield PrefillProgress(row, 0, total - start)
    size = step_size or model.prefill_step_size
    finish = mx.async_eval if ahead and total - start <= size else mx.eval
    edges = sorted({start, *(mark for mark in marks if start < mark < total), total})
    # Behind a mark whole chunks begin anew: every chunk reads all weights.
    firsts = [first for a, b in pairwise(edges) for first in range(a, b, size)]
    for first, last in pairwise([*firsts, total]):
        # The shorter prefix is given up as soon as the longer one is there, whose arrays may then
        # be written where its own were.
        cache.prefix = model.encode([ids[first:last]], [cache.prefix])[1][0]
        finish(cache.prefix.arrays())
        mx.clear_cache()
        if last in marks:
            cache.prefix = cache.prefix.marked(cache.mark_bytes)
        cache.rest()
        yield PrefillProgress(row, last - start, total - start)


def ends_of_turns(ids: Sequence[int], eos_token_ids: Sequence[int]) -> tuple[int, ...]:
    """Where to mark a prompt: behind its first turn, which may be a system prompt that others
    share, and behind its last whole turn, since templates change what they write after it once the
    answer is known; and at its end, unless that is near."""
    ends = [place + 1 for place, token in enumerate(ids) if token in eos_token_ids]
    marks = {*ends[:1], *ends[-1:]}
    if not ends or len(ids) - ends[-1] > _NEAR:
        marks.add(len(ids))
    return tuple(sorted(marks))

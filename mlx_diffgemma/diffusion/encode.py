"""Encoding tokens into a prefix, a chunk at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import pairwise

import mlx.core as mx

from mlx_diffgemma.diffusion.events import Looking, PrefillProgress
from mlx_diffgemma.model.cache import PrefixCache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.pictured import PictureSpan, pictures_of

_NEAR = 64  # most tokens that are encoded again rather than that a mark is kept for them


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
    back to. Yields before the first chunk and after each. A caller may stop at any yield: the cache
    then holds the prefix of the tokens that are encoded by then.

    Args:
        row: number of the sequence, for the events.
        step_size: tokens of a chunk, so that memory does not grow with the square of the prompt;
            None takes the model's own number.
        room: positions to make room for behind `ids`.
        marks: how many of the `ids` precede each place to come back to later.
        ahead: whether the work is handed to the device without waiting for it where it is no more
            than one chunk of tokens, for a caller that has more to queue.
    """
    pictures = pictures_of(ids)
    cache.begin(ids)
    start, total = len(cache.prefix), len(ids)
    cache.prefix = cache.prefix.with_room(total - start + room)
    yield PrefillProgress(row, 0, total - start)
    size = step_size or model.prefill_step_size
    finish = mx.async_eval if ahead and total - start <= size else mx.eval
    edges = sorted({start, *(mark for mark in marks if start < mark < total), total})
    looking = Looking(0, 0.0)
    for first, last in chunks(edges, size, pictures):
        seen = {}
        for span in pictures:
            if first <= span.start < last:
                seen[span], looking = _look(model, span, looking)
        # The shorter prefix is given up as soon as the longer one is there, whose arrays may then
        # be written where its own were.
        with_pictures = ([seen],) if seen else ()
        cache.prefix = model.encode([ids[first:last]], [cache.prefix], *with_pictures)[1][0]
        del seen, with_pictures
        finish(cache.prefix.arrays())
        mx.clear_cache()
        if last in marks:
            cache.prefix = cache.prefix.marked(cache.mark_bytes)
        cache.rest()
        yield PrefillProgress(row, last - start, total - start, looking)


def chunks(
    edges: Sequence[int], size: int, pictures: Sequence[PictureSpan] = ()
) -> list[tuple[int, int]]:
    """The first position of each chunk, and the one behind its last.

    A chunk has at most `size` positions, or those of one picture. No chunk crosses one of the
    ascending `edges` or cuts one of the `pictures`; an edge inside a picture is no edge. Behind an
    edge chunks have `size` positions again, for every chunk reads all weights."""
    whole = {place: span for span in pictures for place in range(span.start + 1, span.stop)}
    edges = [edge for edge in edges if edge not in whole]
    cut = []
    for start, end in pairwise(edges):
        while start < end:
            stop = min(start + size, end)
            if (span := whole.get(stop)) is not None:
                stop = span.start if span.start > start else span.stop
            cut.append((start, stop))
            start = stop
    return cut


def _look(model: DiffusionGemma, span: PictureSpan, before: Looking) -> tuple[mx.array, Looking]:
    """The embeddings [S, D] of a picture, S soft tokens of D hidden dimensions, and how many
    pictures were looked at so far, in how many seconds."""
    begun = time.perf_counter()
    seen = model.embed_picture(span)
    mx.eval(seen)
    mx.clear_cache()
    return seen, Looking(before.pictures + 1, before.seconds + time.perf_counter() - begun)


def ends_of_turns(ids: Sequence[int], eos_token_ids: Sequence[int]) -> tuple[int, ...]:
    """Where to mark a prompt: behind its first turn, which may be a system prompt that others
    share, and behind its last whole turn, since templates change what they write after it once the
    answer is known; and at its end, unless that is near."""
    ends = [place + 1 for place, token in enumerate(ids) if token in eos_token_ids]
    marks = {*ends[:1], *ends[-1:]}
    if not ends or len(ids) - ends[-1] > _NEAR:
        marks.add(len(ids))
    return tuple(sorted(marks))

"""What rank 0 tells the followers to do, as JSON: passes, and what they start from.

Numbers that only the device knows go with an order as arrays, by a collective.
Letters: R rows, P masks, W words of a bit mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.kernels.rows import Row
from mlx_diffgemma.model.cache import Prefix
from mlx_diffgemma.pictured import PictureSpan

Order = dict[str, Any]

_ANY = 1 << 62  # bytes that no marks ever take


def told_prefix(prefix: Prefix) -> Order:
    """How a prefix of rank 0 is called."""
    return {
        "origin": None if prefix.origin is None else prefix.origin.number,
        "length": len(prefix),
        "room": prefix.room,
        "marks": [mark.length for mark in prefix.marks],
    }


def found_prefix(told: Order, held: Mapping[int, Prefix], empty: Prefix) -> Prefix:
    """A follower's own part of a prefix that rank 0 calls so, with the same marks, from the
    prefixes that it has `held` by their origins."""
    whole = empty if told["origin"] is None else held[told["origin"]]
    marks = []
    for length in told["marks"]:
        here = next((mark for mark in whole.marks if mark.length == length), None)
        # What rank 0 has marked since is the end of something that it had cut.
        marks.append(here or _cut(whole, length).marked(most_bytes=_ANY).marks[-1])
    return replace(_cut(whole, told["length"]), room=told["room"], marks=tuple(marks))


def _cut(prefix: Prefix, length: int) -> Prefix:
    """The first `length` tokens, which rank 0 may have come to by way of a mark behind them."""
    if prefix.can_be_cut(length):
        return prefix.cut(length)
    ways = (prefix.cut(mark.length) for mark in prefix.marks if mark.length > length)
    return next(way for way in ways if way.can_be_cut(length)).cut(length)


def told_pictures(pictures: Sequence[Mapping[PictureSpan, mx.array]]) -> list[list[list[Any]]]:
    """The pictures of each sequence, in the order in which their embeddings are given."""
    return [[[span.start, span.stop, span.key] for span in row] for row in pictures]


def told_row(row: Row) -> Order:
    """A row of a pass over the vocabulary, without its key and its masks."""
    few = row.candidates
    return {
        "length": row.length,
        "temperature": float(row.temperature),
        "draws": row.key is not None,
        "fixed": None if row.fixed is None else row.fixed.tolist(),
        "candidates": None if few is None else [list(map(int, each)) for each in few],
        "need_soft": bool(row.need_soft),
        "soft_cutoff": None if row.soft_cutoff is None else float(row.soft_cutoff),
        "likely": row.likely.tolist() if isinstance(row.likely, np.ndarray) else bool(row.likely),
    }


def found_row(told: Order) -> Row:
    """The row that was told so."""
    fixed, few, likely = told["fixed"], told["candidates"], told["likely"]
    return Row(
        length=told["length"],
        temperature=told["temperature"],
        fixed=None if fixed is None else np.array(fixed, np.int32),
        candidates=None if few is None else tuple(map(tuple, few)),
        need_soft=told["need_soft"],
        soft_cutoff=told["soft_cutoff"],
        likely=np.array(likely, bool) if isinstance(likely, list) else likely,
    )


def told_masks(rows: Sequence[Row]) -> tuple[list[list[list[int]]], list[np.ndarray]]:
    """Which of P masks each position of the rows has, as pairs of place and mask for each row, and
    the masks [W] uint32."""
    masks: dict[int, tuple[int, np.ndarray]] = {}
    which = [
        [
            [int(place), masks.setdefault(id(mask), (len(masks), mask))[0]]
            for place, mask in row.allowed.items()
        ]
        for row in rows
    ]
    return which, [mask for _, mask in masks.values()]

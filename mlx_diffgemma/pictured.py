"""Token ids with pictures among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True)
class PictureSpan:
    """A picture in a sequence of token ids.

    Attributes:
        start, stop: its image tokens stand from `start` to before `stop`.
        key: a fingerprint of what it shows; equal ids with another key are another sequence.
        patches: [P, 3 · side²] uint8, what the vision tower reads; None where it was read before.
        columns: patches in a row.
    """

    start: int
    stop: int
    key: str
    patches: np.ndarray | None = field(default=None, repr=False, compare=False)
    columns: int = field(default=0, repr=False, compare=False)

    def __len__(self) -> int:
        return self.stop - self.start

    def known(self) -> PictureSpan:
        """This span without its patches, which are needed only until the picture is encoded."""
        return replace(self, patches=None)


class PicturedIds(list[int]):
    """Token ids, and the pictures whose image tokens are among them, in order."""

    def __init__(self, ids: Iterable[int], pictures: Sequence[PictureSpan]) -> None:
        super().__init__(ids)
        self.pictures = tuple(pictures)


def pictures_of(ids: Sequence[int]) -> tuple[PictureSpan, ...]:
    """The pictures among token ids; none in a plain list."""
    return ids.pictures if isinstance(ids, PicturedIds) else ()


def followed_by(ids: Sequence[int], more: Sequence[int]) -> list[int]:
    """Token ids with plain ones behind them, the pictures kept."""
    return PicturedIds([*ids, *more], pictures_of(ids))


def in_common(*rows: Sequence[int]) -> int:
    """How many tokens two or more rows of ids begin with alike. Whole pieces are compared at a
    time."""
    first, *others = (tuple(row) for row in rows)  # a list never equals a tuple

    def alike(start: int, stop: int) -> bool:
        return all(row[start:stop] == first[start:stop] for row in others)

    least, most = 0, min(len(first), *map(len, others))
    if alike(0, most):
        return most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if alike(least, middle) else (least, middle)
    return least

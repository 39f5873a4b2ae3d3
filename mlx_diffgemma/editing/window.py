"""Where the canvas lies in a text with gaps.

The gaps and what follows them must be in one canvas, since the prefix is causal. What comes before
the gaps goes into the prefix as far as the canvas has no room for it; what comes after them is cut
where the canvas ends. Letter: W words of a bit mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mlx_diffgemma.diffusion.constraints import FREE, Layout
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.errors import UsageError


@dataclass(frozen=True)
class Gap:
    """A place in a text that the model fills.

    Attributes:
        lengths: how many tokens it may take; where there are several lengths, the model chooses.
        allowed: mask [W] of what each of its positions may hold; None for any text.
        joins: whether its ends may share a token with the text around it.
        given: tokens that it begins with.
        following: masks [W] of what the first positions behind `given` may hold; the others hold
            what is `allowed`.
    """

    lengths: tuple[int, ...]
    allowed: np.ndarray | None = None
    joins: bool = True
    given: tuple[int, ...] = ()
    following: tuple[np.ndarray, ...] = ()

    @property
    def middle(self) -> int:
        """The length in the middle of the candidates."""
        return sorted(self.lengths)[len(self.lengths) // 2]


@dataclass(frozen=True)
class Span:
    """Where a gap lies in the canvas, from `start` to before `stop`. `before` and `after` are the
    text around the gap that its first and its last token hold too."""

    start: int
    stop: int
    before: bytes = b""
    after: bytes = b""

    @property
    def places(self) -> range:
        """The positions of the gap in the canvas."""
        return range(self.start, self.stop)

    def bytes_in(self, vocabulary: Vocabulary, canvas: Sequence[int]) -> bytes:
        """What fills the gap, without the text around it."""
        whole = vocabulary.bytes_of(canvas[self.start : self.stop])
        return whole[len(self.before) : len(whole) - len(self.after)]


@dataclass(frozen=True)
class Window:
    """The canvas of a text with gaps.

    Attributes:
        prefix: tokens of the text that come before the canvas.
        layout: what the canvas must hold.
        spans: the gaps that lie in it, from the first on.
        cut: tokens of the text that come after the canvas and that the model does not see.
    """

    prefix: tuple[int, ...]
    layout: Layout
    spans: tuple[Span, ...]
    cut: int


@dataclass
class _Cells:
    """The whole text as positions, each with a token or `FREE`, and masks [W] by position of what
    some may hold."""

    tokens: list[int] = field(default_factory=list)
    allowed: dict[int, np.ndarray] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)


def lay_out(
    vocabulary: Vocabulary,
    literals: Sequence[str],
    gaps: Sequence[Gap],
    candidates: Sequence[Sequence[int]],
    canvas_length: int,
) -> list[Window]:
    """One window for each of the `candidates`, all with the same prefix.

    Args:
        literals: the text before, between and after the gaps: one more than there are gaps.
        candidates: the length of every gap, for each window.

    Raises:
        UsageError: the first gap does not fit in the canvas.
    """
    _check_width(max(lengths[0] for lengths in candidates), canvas_length)
    encoded = [vocabulary.encode(literal) for literal in literals]
    # What is longer than the canvas does not fit, however much longer it is.
    capped = [[min(length, canvas_length) for length in lengths] for lengths in candidates]
    cells = [_cells(vocabulary, encoded, gaps, lengths) for lengths in capped]
    longest = max(cells, key=lambda c: len(c.tokens))
    first = longest.spans[0]
    _check_width(max(c.spans[0].stop - c.spans[0].start for c in cells), canvas_length)
    # One position is left for the end of the answer.
    room = max(0, canvas_length - 1 - (len(longest.tokens) - first.start))
    start = max(0, first.start - room)
    return [_window(vocabulary, c, start, canvas_length) for c in cells]


def _check_width(width: int, canvas_length: int) -> None:
    if width >= canvas_length:
        raise UsageError(
            f"a gap of {width} tokens does not fit in the canvas of {canvas_length}; make it "
            "shorter, or take a longer --canvas-length."
        )


def _window(vocabulary: Vocabulary, cells: _Cells, start: int, canvas_length: int) -> Window:
    stop = start + canvas_length
    tokens = cells.tokens[start:stop]
    tail = [vocabulary.end] * (canvas_length - len(tokens))
    allowed = {
        place - start: mask for place, mask in cells.allowed.items() if start <= place < stop
    }
    spans = [
        Span(span.start - start, span.stop - start, span.before, span.after)
        for span in cells.spans
        if span.stop <= stop
    ]
    return Window(
        prefix=tuple(cells.tokens[:start]),
        layout=Layout((*tokens, *tail), allowed),
        spans=tuple(spans),
        cut=max(0, len(cells.tokens) - stop),
    )


def _cells(
    vocabulary: Vocabulary,
    literals: Sequence[Sequence[int]],
    gaps: Sequence[Gap],
    lengths: Sequence[int],
) -> _Cells:
    cells = _Cells(tokens=list(literals[0]))
    for index, (gap, length) in enumerate(zip(gaps, lengths, strict=True)):
        left, right = literals[index], literals[index + 1]
        start, before, after = len(cells.tokens), b"", b""
        # A literal of one token between two gaps can grow into the first of them only.
        if gap.joins and left and cells.tokens[-1] != FREE:
            before = _whole(vocabulary, left[-1])
        if before:
            start -= 1
            cells.tokens[-1] = FREE
            cells.allowed[start] = vocabulary.starting_with(before)
        _add_gap(cells, vocabulary, gap, length)
        stop = len(cells.tokens)
        if gap.joins and right:
            after = _whole(vocabulary, right[0])
        if after:
            cells.allowed[stop] = vocabulary.ending_with(after)
            cells.tokens += [FREE, *right[1:]]
            stop += 1
        else:
            cells.tokens += right
        cells.spans.append(Span(start, stop, before, after))
    return cells


def _add_gap(cells: _Cells, vocabulary: Vocabulary, gap: Gap, length: int) -> None:
    cells.tokens += gap.given[:length]
    for place in range(len(gap.given), length):
        behind = place - len(gap.given)
        mask = gap.following[behind] if behind < len(gap.following) else gap.allowed
        cells.allowed[len(cells.tokens)] = vocabulary.text if mask is None else mask
        cells.tokens.append(FREE)


def _whole(vocabulary: Vocabulary, token: int) -> bytes:
    """The bytes of a token that may grow into the gap: whole characters only."""
    piece = vocabulary.pieces[token]
    return piece if piece.decode(errors="ignore").encode() == piece else b""

"""Filling the gaps of a text: how long each becomes, then what stands there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod

import numpy as np

from mlx_diffgemma.diffusion.constraints import FREE, Layout
from mlx_diffgemma.diffusion.denoiser import Look
from mlx_diffgemma.editing.session import Denoised, Session
from mlx_diffgemma.editing.window import Gap, Span, Window, lay_out
from mlx_diffgemma.errors import UsageError

_COMBINATIONS = 64  # most lengths of several gaps that are compared with each other


@dataclass(frozen=True)
class Filled:
    """What became of a gap.

    Attributes:
        text: what stands there now.
        tokens: its tokens in the canvas; the first and the last may also hold text around it.
        entropy: nats of uncertainty of each of these tokens.
        steps: denoising steps of the canvas in which it was filled.
        scores: by candidate length, the model's confidence in it; empty where there was no choice.
        converged: whether its canvas was done before its steps were used up.
    """

    text: str
    tokens: tuple[int, ...] = ()
    entropy: tuple[float, ...] = ()
    steps: int = 0
    scores: dict[int, float] = field(default_factory=dict)
    converged: bool = True


@dataclass(frozen=True)
class Evidence:
    """What speaks for the lengths of some gaps, at first sight, in nats.

    Attributes:
        around: log-probability of all that stands around the gaps.
        inside: mean confidence, the negative entropy, in what fills them.
        alone: mean confidence in what fills the gaps with nothing but noise around them, which
            these lengths bring by themselves; None where it was not asked for.
    """

    around: float
    inside: float
    alone: float | None = None

    @property
    def score(self) -> float:
        """How much the model believes in the lengths."""
        return self.around + self.inside


@dataclass(frozen=True)
class FilledText:
    """A text without gaps: `literals` as they were, with `gaps` between them.

    Attributes:
        cut: most tokens of the text behind a gap that the model did not see.
    """

    literals: tuple[str, ...]
    gaps: tuple[Filled, ...]
    cut: int = 0

    @property
    def text(self) -> str:
        pieces = [self.literals[0]]
        for gap, literal in zip(self.gaps, self.literals[1:], strict=True):
            pieces += [gap.text, literal]
        return "".join(pieces)


def fill_gaps(
    session: Session, literals: Sequence[str], gaps: Sequence[Gap], *, first_only: bool = False
) -> FilledText:
    """Fill every gap between the `literals`, from left to right, several in one canvas where their
    lengths are known; with `first_only`, settle none but the first.

    Raises:
        UsageError: a gap is longer than a canvas.
    """
    left, rest, waiting = literals[0], list(literals[1:]), list(gaps)
    filled: list[Filled] = []
    scores: list[dict[int, float]] = [{}] * len(waiting)
    cut = 0
    while waiting and not (first_only and filled):
        if len(waiting[0].lengths) > 1:
            scores[len(filled) :] = choose_lengths(session, [left, *rest], waiting)
        window = _window(session, [left, *rest], waiting)
        done = session.denoise(
            session.prefix(window.prefix),
            window.layout,
            watched=window.spans[0].places if first_only else None,
        )
        cut = max(cut, window.cut)
        for span in window.spans:
            if len(waiting[0].lengths) > 1 or (first_only and filled):
                break
            gap = read(session, span, done)
            filled.append(replace(gap, scores=scores[len(filled)]))
            left += gap.text + rest.pop(0)
            del waiting[0]
    return FilledText(tuple(literals), tuple(filled), cut)


def choose_lengths(
    session: Session, literals: Sequence[str], gaps: list[Gap]
) -> list[dict[int, float]]:
    """Fix the length of the first gap, and of those behind it as far as all their combinations can
    be compared, in place. Returns for each gap the score of its candidates.

    Raises:
        UsageError: none of the candidates fits in the canvas.
    """
    found = {
        lengths: evidence.score
        for lengths, evidence in look_at_lengths(session, literals, gaps).items()
    }
    best = max(found, key=lambda lengths: found[lengths])
    scores: list[dict[int, float]] = [{} for _ in gaps]
    for place, length in enumerate(best):
        for lengths, score in found.items():
            known = scores[place].get(lengths[place], score)
            scores[place][lengths[place]] = max(known, score)
        gaps[place] = replace(gaps[place], lengths=(length,))
    return scores


def read(session: Session, span: Span, done: Denoised) -> Filled:
    """What a canvas holds in the gap of `span`."""
    return Filled(
        text=span.bytes_in(session.vocabulary, done.tokens).decode(errors="replace"),
        tokens=tuple(done.tokens[span.start : span.stop]),
        entropy=tuple(done.entropy[span.start : span.stop]),
        steps=done.steps,
        converged=done.converged,
    )


def look_at_lengths(
    session: Session, literals: Sequence[str], gaps: Sequence[Gap], *, alone: bool = False
) -> dict[tuple[int, ...], Evidence]:
    """What speaks for each combination of lengths of the first gaps, by one pass over all of the
    combinations; with `alone`, by a second pass with nothing but noise around the gaps.

    That one pass shows how well a length fits is the idea of "Diffusion LMs Can Approximate Optimal
    Infilling Lengths Implicitly" (https://arxiv.org/abs/2602.00476), which takes off the bias that
    lengths bring by themselves. A model that replaces tokens, rather than masks, also says how well
    what is around a gap stands where this length puts it, and with that the bias no longer matters:
    `scripts/bench_infill.py` compares them.

    Raises:
        UsageError: no length of the first gap fits in the canvas.
    """
    first = [n for n in sorted(set(gaps[0].lengths)) if n + 2 <= session.length]
    if not first:
        raise UsageError(
            f"a gap of {min(gaps[0].lengths)} tokens does not fit in the canvas of "
            f"{session.length}; make it shorter, or take a longer --canvas-length."
        )
    candidates = [tuple(first), *(tuple(sorted(set(gap.lengths))) for gap in gaps[1:])]
    together = len(gaps)
    while True:
        while together > 1 and prod(map(len, candidates[:together])) > _COMBINATIONS:
            together -= 1
        others = [gap.middle for gap in gaps[together:]]
        combinations = list(product(*candidates[:together]))
        windows = lay_out(
            session.vocabulary,
            literals,
            gaps,
            [[*lengths, *others] for lengths in combinations],
            session.length,
        )
        visible = min(len(window.spans) for window in windows)
        if visible >= together:
            break
        together = max(1, visible)
    prefix = session.prefix(windows[0].prefix)
    seen = session.first_look(prefix, [window.layout for window in windows])
    bias = None
    if alone:
        bias = session.first_look(prefix, [_alone(window, together) for window in windows])
    found = {}
    for row, (lengths, window) in enumerate(zip(combinations, windows, strict=True)):
        inside = _inside(window, together)
        found[lengths] = Evidence(
            around=float(seen[row].standing[~window.layout.open].sum()),
            inside=_certainty(seen[row], window.layout, inside),
            alone=None if bias is None else _certainty(bias[row], window.layout, inside),
        )
    return found


def _certainty(look: Look, layout: Layout, places: list[int]) -> float:
    """Mean confidence in what fills some positions: the negative entropy, or the log-probability
    of a token that is given."""
    return float(np.where(layout.open, -look.entropy, look.standing)[places].mean())


def _inside(window: Window, count: int) -> list[int]:
    """The positions of the first `count` gaps."""
    return [place for span in window.spans[:count] for place in range(span.start, span.stop)]


def _alone(window: Window, count: int) -> Layout:
    """The layout of a window whose first `count` gaps have nothing but noise around them."""
    inside = set(_inside(window, count))
    return Layout(
        tuple(
            token if place in inside else FREE for place, token in enumerate(window.layout.tokens)
        ),
        {place: mask for place, mask in window.layout.allowed.items() if place in inside},
    )


def _window(session: Session, literals: Sequence[str], gaps: Sequence[Gap]) -> Window:
    lengths = [gap.middle for gap in gaps]
    return lay_out(session.vocabulary, literals, gaps, [lengths], session.length)[0]

"""Computing settled positions rarely, which is an experiment (the setting `settled_after`).

A position that kept its token and stayed certain for several steps is left out of a pass; the other
positions attend to the keys and values that it had in the last pass over it. A full pass, over all
positions, is run every few steps. A canvas that looks done after a pass over a part of it is
committed only where a full pass says so too. Letters: C canvas, A positions computed.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diffusion.canvas import Canvas, Passed, Prediction, Settled
from mlx_diffgemma.diffusion.stopping import has_converged

_CERTAIN = 0.01  # nats below which a position may settle
_FULL_EVERY = 4  # passes over a part between two over the whole
_BUCKETS = 8  # sizes of an active set, so that few shapes occur


def active_places(canvas: Canvas, least: int) -> np.ndarray | None:
    """The positions [A] that the next pass computes, at least `least` of them; None where it
    computes all."""
    known, after = canvas.settled, canvas.settings.settled_after
    if known is None or after is None or canvas.is_last_step:
        return None
    if canvas.layout is not None and canvas.layout.pins:
        return None
    if not known.passed.whole and has_converged(canvas):
        return None
    length = len(canvas)
    active = int((known.streak < after).sum())
    size = -(-active * _BUCKETS // length) * length // _BUCKETS
    size = max(size, -(-least // _BUCKETS) * _BUCKETS)
    if active == 0 or known.since_full >= _FULL_EVERY or size > length * 3 // 4:
        return None
    return np.sort(np.argsort(known.streak, kind="stable")[:size])


def remembered(canvas: Canvas, part: Prediction, places: np.ndarray) -> Prediction:
    """The prediction of a whole canvas: `part` at the positions `places` [A], and what the last
    pass left at the others."""
    assert canvas.settled is not None
    source = np.arange(len(canvas))
    source[places] = len(canvas) + np.arange(len(places))
    index = mx.array(source)
    return canvas.settled.passed.prediction.followed_by(part).map(lambda values: values[index])


def settle(canvas: Canvas, passed: Passed, argmax: np.ndarray, entropy: np.ndarray) -> Settled:
    """What to remember of a canvas after a pass, given what it found likeliest [C] and with what
    entropies [C] in nats."""
    known, before, since_full = canvas.settled, np.zeros(len(canvas), int), 0
    same = entropy < _CERTAIN
    if known is not None:
        same &= argmax == known.argmax
        before = known.streak
        since_full = 0 if passed.whole else known.since_full + 1
    return Settled(passed, argmax, np.where(same, before + 1, 0), since_full)

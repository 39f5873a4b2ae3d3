"""How probable the model finds some tokens at a place in a canvas whose rest is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diffusion.constraints import FREE, CanvasConstraint, Layout
from mlx_diffgemma.editing.session import Session, repeated
from mlx_diffgemma.model.cache import PrefixCache

_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Option:
    """Tokens at a place in a canvas: `tokens` [C] holds them from `start` to `stop`, in front of at
    least one other. `row` says which sequence of a batch they continue."""

    row: int
    tokens: tuple[int, ...]
    start: int
    stop: int


def comparable(options: Sequence[Option]) -> list[Option]:
    """The same options, made longer by the token behind them where their lengths differ: a short
    one that is the beginning of a long one must say that it ends there."""
    if len({option.stop - option.start for option in options}) == 1:
        return list(options)
    return [replace(option, stop=option.stop + 1) for option in options]


def option_log_probs(
    session: Session, cache: PrefixCache, options: Sequence[Option], draw: int = 0
) -> np.ndarray:
    """Log-probability of each option, in nats, at temperature 1: of its first token with noise in
    the place of all of them, of its second with the first pinned, and so on.

    Options of one token for the same place and surroundings share one forward pass. `draw` numbers
    the noise.
    """
    noise = session.noise.initial_canvas([0], draw, *session.shape)
    rows: dict[tuple[int, tuple[int, ...], int], int] = {}
    asked: list[list[tuple[int, int]]] = []
    for option in options:
        asked.append([])
        for place in range(option.start, option.stop):
            hidden = [FREE] * (option.stop - place)
            canvas = (*option.tokens[:place], *hidden, *option.tokens[option.stop :])
            row = rows.setdefault((option.row, canvas, place), len(rows))
            asked[-1].append((row, option.tokens[place]))
    keys, found = list(rows), list[np.ndarray]()
    for start in range(0, len(keys), _ROWS_AT_ONCE):
        some = keys[start : start + _ROWS_AT_ONCE]
        layouts = [Layout(canvas) for _, canvas, _ in some]
        constraint = CanvasConstraint.of(layouts, session.vocabulary.size)
        canvas_ids = constraint.pin(mx.repeat(noise, len(some), axis=0))
        hidden_states = session.model.decode(
            canvas_ids, repeated(cache, [sequence for sequence, _, _ in some])
        )
        places = mx.array([place for _, _, place in some])[:, None, None]
        logits = session.model.logits(mx.take_along_axis(hidden_states, places, axis=1))[:, 0]
        log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        found.append(np.array(log_p))
        session.passes += 1
    log_probs = np.concatenate(found)
    return np.array([sum(float(log_probs[row, token]) for row, token in each) for each in asked])


def softmax(log_weights: np.ndarray) -> np.ndarray:
    """Probabilities in proportion to exp(`log_weights`)."""
    weights = np.exp(log_weights - log_weights.max())
    return np.asarray(weights / weights.sum())

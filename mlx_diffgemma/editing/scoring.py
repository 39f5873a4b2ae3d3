"""How probable the model finds some tokens at a place in a canvas whose rest is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_diffgemma.diffusion.canvas import Canvas
from mlx_diffgemma.diffusion.constraints import FREE, Layout
from mlx_diffgemma.editing.session import Session
from mlx_diffgemma.model.cache import Prefix


@dataclass(frozen=True)
class Option:
    """Tokens at a place in a canvas: `tokens` [C] holds them from `start` to `stop`, in front of at
    least one other. `row` says which sequence of a batch they continue."""

    row: int
    tokens: tuple[int, ...]
    start: int
    stop: int


def comparable(options: Sequence[Option]) -> list[Option]:
    """The options, made longer by the token behind them where their lengths differ: a short option
    that is the beginning of a long one must say that it ends there."""
    if len({option.stop - option.start for option in options}) == 1:
        return list(options)
    return [replace(option, stop=option.stop + 1) for option in options]


def option_log_probs(
    session: Session, prefixes: Sequence[Prefix], options: Sequence[Option], draw: int = 0
) -> np.ndarray:
    """Log-probability of each option, in nats, at temperature 1: the sum over its tokens, the first
    with noise in the place of all of them, the second with the first pinned, and so on.

    Options of one token for the same place and surroundings share one canvas. `draw` numbers the
    noise; the row of an option says which of the `prefixes` it continues.
    """
    canvases: dict[tuple[int, tuple[int, ...], int], int] = {}
    candidates: list[list[int]] = []
    asked: list[list[tuple[int, int]]] = []
    for option in options:
        asked.append([])
        for place in range(option.start, option.stop):
            hidden = [FREE] * (option.stop - place)
            tokens = (*option.tokens[:place], *hidden, *option.tokens[option.stop :])
            index = canvases.setdefault((option.row, tokens, place), len(canvases))
            if index == len(candidates):
                candidates.append([])
            asked[-1].append((index, len(candidates[index])))
            candidates[index].append(option.tokens[place])
    found = session.denoiser.score(
        [
            Canvas.start(
                session.config,
                session.noise,
                draw,
                session.length,
                session.vocabulary.size,
                layout=Layout(tokens),
            )
            for _, tokens, _ in canvases
        ],
        [prefixes[row] for row, _, _ in canvases],
        [place for _, _, place in canvases],
        candidates,
    )
    session.passes += 1
    return np.array([sum(float(found[index][n]) for index, n in each) for each in asked])


def softmax(log_weights: np.ndarray) -> np.ndarray:
    """Probabilities in proportion to exp(`log_weights`)."""
    weights = np.exp(log_weights - log_weights.max())
    return np.asarray(weights / weights.sum())

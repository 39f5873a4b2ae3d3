"""What a step asks of the model: not logits, but what follows from them.

Letters: N positions of all canvases of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diffusion.active_set import active_places, remembered
from mlx_diffgemma.diffusion.canvas import Canvas, Passed, Prediction
from mlx_diffgemma.kernels.vocabulary import Row
from mlx_diffgemma.model.cache import Prefix
from mlx_diffgemma.model.diffusion_gemma import CanvasView, DiffusionGemma

_GROUPED = 4  # pairs of token and expert, for each expert, from which on MLX groups them by expert


class Predict(Protocol):
    """One forward pass over canvases, each behind its own prefix; nothing is evaluated."""

    def __call__(self, canvases: Sequence[Canvas], prefixes: Sequence[Prefix]) -> list[Passed]: ...


class Predictor:
    """Computes the forward passes of a step with a model (see `Predict`)."""

    def __init__(self, model: DiffusionGemma) -> None:
        self.model = model

    def __call__(self, canvases: Sequence[Canvas], prefixes: Sequence[Prefix]) -> list[Passed]:
        text = self.model.config.text
        least = -(-_GROUPED * text.num_experts // text.top_k_experts)
        places = [active_places(canvas, least) for canvas in canvases]
        views = [
            CanvasView(
                canvas.tokens,
                prefix,
                canvas.soft_embeddings,
                place,
                () if canvas.settled is None else canvas.settled.passed.layers,
            )
            for canvas, prefix, place in zip(canvases, prefixes, places, strict=True)
        ]
        hidden, layers = self.model.decode_keeping(views)
        # What nobody needs later is let go of before the layers are computed.
        layers = tuple(
            kept if canvas.settings.settled_after is not None else ()
            for canvas, kept in zip(canvases, layers, strict=True)
        )
        rows = [
            _row(canvas, np.arange(len(canvas)) if place is None else place)
            for canvas, place in zip(canvases, places, strict=True)
        ]
        parts = self._predicted(hidden, rows, [_computed(view) for view in views])
        return [
            Passed(
                part if place is None else remembered(canvas, part, place),
                place is None,
                kept,
            )
            for canvas, part, place, kept in zip(canvases, parts, places, layers, strict=True)
        ]

    def _predicted(
        self, hidden: mx.array, rows: Sequence[Row], standing: Sequence[mx.array]
    ) -> list[Prediction]:
        """The prediction of each row. Those that may take few tokens go by themselves: in a pass
        over the vocabulary they would be drawn from other random numbers than alone."""
        few = [row.candidates is not None for row in rows]
        spans = list(pairwise(accumulate((row.length for row in rows), initial=0)))
        found: dict[int, Prediction] = {}
        for kind in sorted(set(few)):
            some = [n for n in range(len(rows)) if few[n] == kind]
            states = hidden
            if len(some) < len(rows):
                states = mx.concatenate([hidden[slice(*spans[n])] for n in some])
            asked = [rows[n] for n in some]
            seen = self.model.predict(states, asked, mx.concatenate([standing[n] for n in some]))
            draw, log_p = seen.draw, seen.draw_log_probability
            if draw is None or log_p is None:
                draw, log_p = seen.argmax, seen.argmax_log_probability
            whole = Prediction(
                argmax=seen.argmax,
                probability=mx.exp(seen.argmax_log_probability),
                draw=draw,
                entropy=seen.entropy,
                confidence=mx.exp(log_p),
                soft_embeddings=seen.soft_embeddings,
                dropped_mass=seen.dropped_mass,
            )
            found.update(zip(some, split(whole, [row.length for row in asked]), strict=True))
        return [found[n] for n in range(len(rows))]


def split(prediction: Prediction, lengths: Sequence[int]) -> list[Prediction]:
    """The prediction of N positions as those of canvases that lie one behind the other."""
    if len(lengths) == 1:
        return [prediction]
    spans = pairwise(accumulate(lengths, initial=0))
    return [prediction.map(itemgetter(slice(start, stop))) for start, stop in spans]


def _row(canvas: Canvas, places: np.ndarray) -> Row:
    """What is asked of the vocabulary for a canvas of which the positions `places` are computed. No
    step follows the last one, so it needs no soft embeddings."""
    layout, settings = canvas.layout, canvas.settings
    few = None if layout is None or len(places) < len(canvas) else layout.few
    allowed = {} if layout is None or few else layout.masks(canvas.vocab)
    if len(places) < len(canvas):
        allowed = {
            at: allowed[place] for at, place in enumerate(places.tolist()) if place in allowed
        }
    return Row(
        length=len(places),
        temperature=canvas.temperature,
        key=canvas.noise.draw_key(canvas.index, canvas.turn) if canvas.draws else None,
        fixed=layout.fixed if layout is not None and layout.pins else None,
        allowed=allowed,
        candidates=few,
        need_soft=not canvas.is_last_step,
        soft_cutoff=settings.soft_cutoff,
        likely=canvas.few_suffice[places],
    )


def _computed(view: CanvasView) -> mx.array:
    return view.tokens if view.places is None else view.tokens[mx.array(view.places)]

"""What a step asks of the model: not logits, but what follows from them.

Letters: C canvas, N positions of all canvases of a batch, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import accumulate, pairwise
from typing import Any, Protocol

import mlx.core as mx

from mlx_diffgemma.diffusion.active_set import active_places, remembered
from mlx_diffgemma.diffusion.canvas import Canvas, Passed, Prediction
from mlx_diffgemma.kernels.vocabulary import Row
from mlx_diffgemma.model.cache import Prefix
from mlx_diffgemma.model.diffusion_gemma import CanvasView, DiffusionGemma

_GROUPED = 4  # token-expert pairs an expert from which MLX multiplies the tokens of one together


class Predict(Protocol):
    """One forward pass over canvases, each behind its own prefix; nothing is evaluated."""

    def __call__(self, canvases: Sequence[Canvas], prefixes: Sequence[Prefix]) -> list[Passed]: ...


class Predictor:
    """Predictions of a model."""

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
        rows = [
            _row(canvas, len(canvas) if place is None else len(place))
            for canvas, place in zip(canvases, places, strict=True)
        ]
        seen = self.model.predict(hidden, rows, mx.concatenate([_computed(view) for view in views]))
        assert seen.draw is not None and seen.draw_log_probability is not None
        whole = Prediction(
            argmax=seen.argmax,
            draw=seen.draw,
            entropy=seen.entropy,
            confidence=mx.exp(seen.draw_log_probability),
            soft_embeddings=seen.soft_embeddings,
            dropped_mass=seen.dropped_mass,
        )
        parts = split(whole, [row.length for row in rows])
        return [
            Passed(
                part if place is None else remembered(canvas, part, place),
                place is None,
                kept if canvas.settings.settled_after is not None else (),
            )
            for canvas, part, place, kept in zip(canvases, parts, places, layers, strict=True)
        ]


def split(prediction: Prediction, lengths: Sequence[int]) -> list[Prediction]:
    """The prediction of N positions as those of canvases that lie one behind the other."""
    if len(lengths) == 1:
        return [prediction]
    values = {field.name: getattr(prediction, field.name) for field in fields(Prediction)}
    parts = []
    for start, stop in pairwise(accumulate(lengths, initial=0)):
        part: dict[str, Any] = {
            name: None if value is None else value[start:stop] for name, value in values.items()
        }
        parts.append(Prediction(**part))
    return parts


def _row(canvas: Canvas, length: int) -> Row:
    """What is asked of the vocabulary for a canvas, of which `length` positions are computed. No
    step follows the last one, so it needs no soft embeddings."""
    layout, settings = canvas.layout, canvas.settings
    return Row(
        length=length,
        temperature=canvas.temperature,
        key=canvas.noise.draw_key(canvas.index, canvas.step),
        fixed=None if layout is None else layout.fixed,
        allowed=None if layout is None else layout.words(canvas.vocab),
        need_soft=not canvas.is_last_step,
        soft_cutoff=settings.soft_cutoff,
        likely=canvas.few_suffice,
    )


def _computed(view: CanvasView) -> mx.array:
    return view.tokens if view.places is None else view.tokens[mx.array(view.places)]

"""What the loop asks of the model at a step: not logits, but what follows from them.

Letters: R rows, C canvas, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_diffgemma.diffusion.constraints import CanvasConstraint
from mlx_diffgemma.diffusion.noise import draw_categorical
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.vocabulary import Row
from mlx_diffgemma.model.cache import PrefixCache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

_TILE_FROM = 8192  # vocabulary from which the logits are not held


@dataclass(frozen=True)
class Prediction:
    """The model's view of a canvas at a temperature.

    Attributes:
        argmax: [R, C] int32, the most likely tokens: the draft.
        draw: [R, C] int32, one sample a position.
        entropy: [R, C] float32, in nats.
        soft_embeddings: [R, C, D], the expected embeddings, for the next step; None after the last.
        confidence: [R, C] float32, the probability of `draw`.
    """

    argmax: mx.array
    draw: mx.array
    entropy: mx.array
    soft_embeddings: mx.array | None
    confidence: mx.array


class Predictor(Protocol):
    """One forward pass over a canvas [R, C] that continues the prefix in `cache`, at a
    temperature, under a constraint, drawing row r with `keys[r]` [2]. No step follows the `last`
    one, so it needs no soft embeddings."""

    def __call__(
        self,
        canvas: mx.array,
        cache: PrefixCache,
        soft_embeddings: mx.array | None,
        temperature: float,
        keys: mx.array,
        constraint: CanvasConstraint | None = None,
        last: bool = False,
    ) -> Prediction: ...


class MaterializedPredictor:
    """A prediction from the whole [R, C, V] logits in float32. Where `soft_cutoff` is given, only
    tokens above e^-soft_cutoff of the likeliest enter the soft embeddings."""

    def __init__(self, model: DiffusionGemma, soft_cutoff: float | None = None) -> None:
        self.model, self.soft_cutoff = model, soft_cutoff

    def __call__(
        self,
        canvas: mx.array,
        cache: PrefixCache,
        soft_embeddings: mx.array | None,
        temperature: float,
        keys: mx.array,
        constraint: CanvasConstraint | None = None,
        last: bool = False,
        places: mx.array | None = None,
    ) -> Prediction:
        hidden = self.model.decode(canvas, cache, soft_embeddings, places)
        processed = self.model.logits(hidden) / temperature
        if constraint is not None:
            processed = constraint.restrict(processed)
        draw = draw_categorical(processed, keys)
        drawn = mx.take_along_axis(processed, draw[..., None], axis=-1)[..., 0]
        return Prediction(
            argmax=mx.argmax(processed, axis=-1).astype(mx.int32),
            draw=draw,
            entropy=entropy(processed),
            soft_embeddings=None if last else self.model.soft_embeddings(self._cut(processed)),
            confidence=mx.exp(drawn - mx.logsumexp(processed, axis=-1)),
        )

    def _cut(self, processed: mx.array) -> mx.array:
        if self.soft_cutoff is None:
            return processed
        least = processed.max(axis=-1, keepdims=True) - self.soft_cutoff
        return mx.where(processed >= least, processed, -mx.inf)


class TiledPredictor:
    """The same prediction without the logits: a pass over the vocabulary in tiles."""

    def __init__(self, model: DiffusionGemma, soft_cutoff: float | None = None) -> None:
        self.model, self.soft_cutoff = model, soft_cutoff

    def __call__(
        self,
        canvas: mx.array,
        cache: PrefixCache,
        soft_embeddings: mx.array | None,
        temperature: float,
        keys: mx.array,
        constraint: CanvasConstraint | None = None,
        last: bool = False,
        places: mx.array | None = None,
    ) -> Prediction:
        hidden = self.model.decode(canvas, cache, soft_embeddings, places)
        count, length, width = hidden.shape
        allowed = None if constraint is None else constraint.allowed
        rows = [
            Row(
                length,
                temperature,
                keys[row],
                None if constraint is None else constraint.fixed[row],
                None if allowed is None else allowed[row],
                not last,
                self.soft_cutoff,
            )
            for row in range(count)
        ]
        seen = self.model.vocabulary_pass(
            hidden.reshape(-1, width),
            EmbeddingTable.of(self.model.model.decoder.embed_tokens, self.model.dtype),
            rows,
            softcap=self.model.config.text.final_logit_softcapping,
            standing=None if places is not None else canvas.flatten(),
        )
        assert seen.draw is not None and seen.draw_log_probability is not None
        soft = seen.soft_embeddings
        return Prediction(
            argmax=seen.argmax.reshape(count, length),
            draw=seen.draw.reshape(count, length),
            entropy=seen.entropy.reshape(count, length),
            soft_embeddings=None if soft is None else soft.reshape(hidden.shape),
            confidence=mx.exp(seen.draw_log_probability).reshape(count, length),
        )


def make_predictor(
    model: DiffusionGemma, soft_cutoff: float | None = None
) -> MaterializedPredictor | TiledPredictor:
    """Tiles where the vocabulary is large, whole logits where they are small."""
    if model.config.text.vocab_size > _TILE_FROM:
        return TiledPredictor(model, soft_cutoff)
    return MaterializedPredictor(model, soft_cutoff)


def entropy(logits: mx.array) -> mx.array:
    """Entropy in nats of the distributions that `logits` [..., V] describe; -inf is no chance."""
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return -mx.where(logits == -mx.inf, 0.0, mx.exp(log_p) * log_p).sum(axis=-1)

"""How a model does on held-out examples: its loss at fixed noise levels, and what it generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.events import Finished
from mlx_diffgemma.diffusion.generate import generate_canvases
from mlx_diffgemma.diffusion.noise import seeded
from mlx_diffgemma.errors import NumericalError, not_finite
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.pictured import PicturedIds
from mlx_diffgemma.train.batches import Drawn, Sizes, check, clean_canvases, draw_canvas, lay_out
from mlx_diffgemma.train.config import EVALUATED_NOISE, TrainConfig
from mlx_diffgemma.train.cross_entropy import cross_entropy
from mlx_diffgemma.train.examples import Example
from mlx_diffgemma.train.forward import decode, encode
from mlx_diffgemma.train.noising import corrupt_at
from mlx_diffgemma.train.objective import encoder_loss

_SEED = 20_240  # the same canvases and noise at each evaluation, whatever the run's seed


@dataclass(frozen=True)
class HeldOut:
    """Losses on held-out examples, in nats a token.

    Attributes:
        by_noise: canvas loss by the share of corrupted tokens.
        encoder: next-token cross-entropy of the encoder; 0 where it has no weight.
    """

    by_noise: dict[float, float]
    encoder: float

    @property
    def mean(self) -> float:
        return sum(self.by_noise.values()) / len(self.by_noise)


def held_out_loss(
    model: DiffusionGemma, examples: Sequence[Example], config: TrainConfig, sizes: Sizes
) -> HeldOut:
    """Loss on `config.val_batches` batches of `examples`, without self-conditioning. Each token is
    replaced on its own, never a span. Canvases and noise are the same at every call.

    Raises:
        UsageError: an example is too long, or has ids outside the vocabulary.
        NumericalError: the loss is not finite.
    """
    limit = len(examples) if config.val_batches == -1 else config.val_batches * config.batch_size
    rng = np.random.default_rng(_SEED)
    drawn = [draw_canvas(check(one, config, sizes), rng, sizes.canvas) for one in examples[:limit]]
    drawn.sort(key=lambda one: len(one.example.tokens))
    sums = np.zeros(len(EVALUATED_NOISE) + 1)
    for at in range(0, len(drawn), config.batch_size):
        part = drawn[at : at + config.batch_size]
        sums += len(part) * _losses(model, part, config, sizes, rng)
    means = (sums / len(drawn)).tolist()
    if not np.isfinite(means).all():
        float16 = model.dtype == mx.float16
        raise NumericalError(
            not_finite("the loss on held-out examples", float16=float16, adapter=model.adapted)
        )
    return HeldOut(dict(zip(EVALUATED_NOISE, means, strict=False)), means[-1])


def _losses(
    model: DiffusionGemma,
    drawn: Sequence[Drawn],
    config: TrainConfig,
    sizes: Sizes,
    rng: np.random.Generator,
) -> np.ndarray:
    """The canvas loss at each level of `EVALUATED_NOISE` and, last, the encoder's loss, in nats a
    token."""
    clean = clean_canvases(drawn, sizes)
    batch = lay_out(drawn, config, sizes, clean, np.zeros(len(drawn)), 0)
    hidden, kept = encode(model, batch)
    losses = []
    for level in EVALUATED_NOISE:
        noise, spans = np.full(len(drawn), level), np.zeros(len(drawn), bool)
        canvas = mx.array(corrupt_at(clean, sizes.vocabulary, rng, noise, spans), mx.int32)
        seen = decode(model, canvas, kept, batch.prefix)
        losses.append(cross_entropy(model, seen, batch.canvas).mean())
        mx.eval(losses)
    losses.append(encoder_loss(model, hidden, batch))
    return np.array([one.item() for one in losses])


def exact_rate(
    model: DiffusionGemma,
    examples: Sequence[Example],
    config: DiffusionConfig,
    *,
    batch_size: int = 8,
    seed: int = 0,
) -> float:
    """The share of `examples` whose response, up to its first eos, generation gives token for
    token.

    Args:
        batch_size: examples that are generated together.
        seed: what every random draw follows from.
    """
    right = 0
    for at in range(0, len(examples), batch_size):
        part = examples[at : at + batch_size]
        prompts = [PicturedIds(one.tokens[: one.prompt], one.pictures) for one in part]
        for event in generate_canvases(model, prompts, config, seeded(seed + at)):
            if isinstance(event, Finished):
                right += sum(
                    tokens == _spoken(one, config)
                    for tokens, one in zip(event.tokens, part, strict=True)
                )
    return right / len(examples)


def _spoken(example: Example, config: DiffusionConfig) -> tuple[int, ...]:
    """The response up to its first eos."""
    response = example.response
    ends = [place for place, token in enumerate(response) if token in config.eos_token_ids]
    return response[: ends[0]] if ends else response

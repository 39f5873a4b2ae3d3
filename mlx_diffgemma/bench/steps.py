"""How long a denoising step takes, as the loop runs it, and where the time goes.

Everything is measured through `generate_canvases`, so that what is measured is what a user gets:
whole steps with the model; the pass over the vocabulary with a model whose `decode` costs nothing;
the rest (noise, sampler, stop rule, what goes to the host) with predictions that cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from statistics import median
from typing import Any, cast

import mlx.core as mx

from mlx_diffgemma.bench.counting import Cost, Weights, layers_cost, vocabulary_cost
from mlx_diffgemma.bench.device import Device
from mlx_diffgemma.bench.random_model import weight_bytes
from mlx_diffgemma.bench.timing import alternate, peak_bytes
from mlx_diffgemma.diffusion import predict
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import CanvasConstraint
from mlx_diffgemma.diffusion.denoise import generate_canvases
from mlx_diffgemma.diffusion.events import DenoisingStep
from mlx_diffgemma.diffusion.noise import SeededNoise
from mlx_diffgemma.diffusion.predict import Prediction, Predictor
from mlx_diffgemma.diffusion.prefill import prefill
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.model.cache import PrefixCache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

_SUFFIX = "Predictor"
_NEVER = 1 << 20  # more steps than any measurement takes


@dataclass(frozen=True)
class Part:
    """One part of a step.

    Attributes:
        seconds: measured.
        operations, bytes: that it needs at least; 0 where nothing is counted.
        floor_seconds: what they take at the device's peaks.
    """

    name: str
    seconds: float
    operations: float = 0.0
    bytes: float = 0.0
    floor_seconds: float = 0.0


@dataclass(frozen=True)
class StepReport:
    """One denoising step.

    Attributes:
        batch, canvas, prefix: sequences, tokens drafted by each, and tokens before them.
        seconds: of a whole step, measured in one piece; the parts, each measured by itself, need
            not add up to it.
        parts: layers, vocabulary pass, rest.
        peak_memory: most bytes held during steps, weights included.
        beyond_weights: the same without the weights.
    """

    batch: int
    canvas: int
    prefix: int
    seconds: float
    parts: tuple[Part, ...]
    peak_memory: int
    beyond_weights: int


def predictor_named(name: str) -> type[Any]:
    """A predictor of the diffusion room by the first word of its class: "materialized".

    Raises:
        UsageError: there is none of that name.
    """
    known = {
        kind.removesuffix(_SUFFIX).lower(): found
        for kind, found in vars(predict).items()
        if kind.endswith(_SUFFIX) and kind != _SUFFIX
    }
    if name not in known:
        raise UsageError(f"--predictor '{name}' is unknown; known are {', '.join(sorted(known))}.")
    return cast("type[Any]", known[name])


class Stepper:
    """Runs denoising steps that never end, one a call: of the canvas that follows a random prefix,
    as `generate_canvases` does it, at the temperature of the first step."""

    def __init__(
        self,
        model: DiffusionGemma,
        config: DiffusionConfig,
        *,
        prefix: int,
        batch: int = 1,
        seed: int = 0,
        predictor: Predictor | None = None,
    ) -> None:
        endless = replace(
            config,
            max_denoising_steps=_NEVER,
            stability_threshold=_NEVER,
            confident_after=None,
        )
        prompts = random_prompts(model, prefix, batch, seed)
        self._events = generate_canvases(
            model, prompts, endless, SeededNoise(seed), predictor=predictor
        )

    def __call__(self) -> DenoisingStep:
        """The next step; the first call also encodes the prefix."""
        return next(event for event in self._events if isinstance(event, DenoisingStep))


def measure_step(
    model: DiffusionGemma,
    config: DiffusionConfig,
    weights: Weights,
    device: Device,
    *,
    prefix: int,
    batch: int = 1,
    repeats: int = 5,
    seed: int = 0,
    predictor: type[Any] | None = None,
) -> StepReport:
    """Time whole steps and their parts; `predictor` replaces the one that the loop would take."""
    canvas = config.canvas_length or model.config.canvas_length
    config = replace(config, canvas_length=canvas, max_tokens=max(config.max_tokens, canvas))

    def stepper(of: DiffusionGemma, length: int, by: Predictor | None = None) -> Stepper:
        chosen = by or (_made(predictor, of, config) if predictor else None)
        return Stepper(of, config, prefix=length, batch=batch, seed=seed, predictor=chosen)

    whole = stepper(model, prefix)
    whole()
    peak = peak_bytes(lambda: (whole(), whole()))
    decode, hidden = _decoding(model, canvas, prefix, batch, seed)
    tokens = mx.argmax(hidden[..., :2], axis=-1).astype(mx.int32)
    times = alternate(
        {
            "whole": whole,
            "layers": decode,
            "without layers": stepper(cast(DiffusionGemma, _Decoded(model, hidden)), 1),
            "rest": stepper(model, 1, _Predicted(tokens, hidden)),
        },
        repeats,
    )
    taken = {name: median(seconds) for name, seconds in times.items()}
    vocabulary = max(0.0, taken["without layers"] - taken["rest"])
    parts = (
        _part("layers", taken["layers"], layers_cost(weights, canvas, prefix, batch), device),
        _part("vocabulary pass", vocabulary, vocabulary_cost(weights, canvas, batch), device),
        _part("rest", taken["rest"], Cost(), device),
    )
    return StepReport(
        batch, canvas, prefix, taken["whole"], parts, peak, peak - weight_bytes(model)
    )


def _made(predictor: type[Any], model: DiffusionGemma, config: DiffusionConfig) -> Predictor:
    """A predictor for `model`, with those settings that this kind of predictor has."""
    taken = signature(predictor).parameters
    settings = {name: value for name, value in vars(config).items() if name in taken}
    return cast(Predictor, predictor(model, **settings))


def _part(name: str, seconds: float, cost: Cost, device: Device) -> Part:
    return Part(name, seconds, cost.operations, cost.bytes, device.floor(cost))


def _decoding(
    model: DiffusionGemma, canvas: int, prefix: int, batch: int, seed: int
) -> tuple[Callable[[], None], mx.array]:
    """What runs all layers on a canvas behind a prefix, and the hidden states that come out."""
    cache = encoded(model, prefix, batch, seed)
    ids = mx.array(random_prompts(model, canvas, batch, seed + 1), mx.int32)
    soft = model.model.decoder.embed_tokens(ids)
    hidden = model.decode(ids, cache, soft)
    mx.eval(soft, hidden)
    return lambda: mx.eval(model.decode(ids, cache, soft)), hidden


def random_prompts(model: DiffusionGemma, length: int, batch: int, seed: int) -> list[list[int]]:
    """`batch` rows of `length` random token ids, the special ones at the beginning left out."""
    vocab = model.config.text.vocab_size
    drawn = mx.random.randint(min(8, vocab - 1), vocab, (batch, length), key=mx.random.key(seed))
    rows: list[list[int]] = drawn.tolist()  # type: ignore[assignment]
    return rows


def encoded(model: DiffusionGemma, length: int, batch: int, seed: int) -> PrefixCache:
    """A cache that holds a random prefix."""
    cache = model.make_cache()
    ids = mx.array(random_prompts(model, length, batch, seed), mx.int32)
    for _ in prefill(model, ids, cache):
        pass
    return cache


class _Decoded:
    """A model that has already decoded: its hidden states cost nothing."""

    def __init__(self, model: DiffusionGemma, hidden: mx.array) -> None:
        self._model, self._hidden = model, hidden

    def decode(self, *_: object, **__: object) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _Predicted:
    """A `Predictor` that has already predicted, with little certainty."""

    def __init__(self, ids: mx.array, soft_embeddings: mx.array) -> None:
        self._prediction = Prediction(
            argmax=ids,
            draw=ids,
            entropy=mx.ones(ids.shape),
            soft_embeddings=soft_embeddings,
            confidence=mx.full(ids.shape, 0.5),
        )

    def __call__(
        self,
        canvas: mx.array,
        cache: PrefixCache,
        soft_embeddings: mx.array | None,
        temperature: float,
        keys: mx.array,
        constraint: CanvasConstraint | None = None,
        last: bool = False,
    ) -> Prediction:
        return self._prediction

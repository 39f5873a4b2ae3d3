"""How long a denoising step takes, as the loop runs it, and where the time goes.

Whole steps run through `generate_canvases`, so that what is measured is what a user gets. The
layers are timed by `decode` alone. The pass over the vocabulary is a step with a model whose layers
cost nothing, less the rest: noise, sampler, stop rule, and what goes to the host. The rest is a
step whose predictions cost nothing.

Letters: C canvas, N positions of all canvases, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, cast

import mlx.core as mx

from mlx_diffgemma.bench.counted import counted
from mlx_diffgemma.bench.counting import Cost, Weights, layers_cost, vocabulary_cost
from mlx_diffgemma.bench.device import Device
from mlx_diffgemma.bench.random_model import weight_bytes
from mlx_diffgemma.bench.timing import alternate, peak_bytes
from mlx_diffgemma.cpu.vocabulary import tiled_pass
from mlx_diffgemma.diffusion.canvas import Canvas, Passed, Prediction
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.diffusion.encode import encode
from mlx_diffgemma.diffusion.events import DenoisingStep
from mlx_diffgemma.diffusion.generate import Constrain, generate_canvases
from mlx_diffgemma.diffusion.noise import seeded
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.kernels.materialized import whole_pass
from mlx_diffgemma.kernels.vocabulary import VocabularyPass, vocabulary_pass
from mlx_diffgemma.model.cache import KeysValues, Prefix
from mlx_diffgemma.model.diffusion_gemma import CanvasView, DiffusionGemma

VOCABULARY_PASSES: Mapping[str, VocabularyPass] = {
    "chunked": vocabulary_pass,
    "tiled": tiled_pass,
    "whole": whole_pass,
}
"""Forms of the pass over the vocabulary that can be measured in place of the model's own."""

_COUNTED = 4  # steps whose waits are counted
_NEVER = 1 << 20  # more steps than any measurement takes


@dataclass(frozen=True)
class Part:
    """One part of a step.

    Attributes:
        name: "layers", "vocabulary pass" or "rest".
        seconds: median, as it was measured.
        operations, bytes: least work that the part needs; 0 where nothing is counted.
        floor_seconds: seconds that this work takes at the device's peaks.
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
        seconds: median of a whole step, measured in one piece; the parts, each measured by itself,
            need not add up to it.
        parts: layers, vocabulary pass, rest.
        waits: how often the host waits for the device or reads from it in a step, on average.
        peak_memory: most bytes held during steps, weights included.
        beyond_weights: most bytes held during steps, weights left out.
    """

    batch: int
    canvas: int
    prefix: int
    seconds: float
    parts: tuple[Part, ...]
    waits: float
    peak_memory: int
    beyond_weights: int


def vocabulary_pass_named(name: str) -> VocabularyPass:
    """A form of the pass over the vocabulary by its name: "chunked" (for a GPU), "tiled" (for a
    CPU) or "whole" (slow).

    Raises:
        UsageError: there is none of that name.
    """
    if name not in VOCABULARY_PASSES:
        known = ", ".join(sorted(VOCABULARY_PASSES))
        raise UsageError(f"--vocabulary-pass '{name}' is unknown; known are {known}.")
    return VOCABULARY_PASSES[name]


@contextmanager
def using_pass(model: DiffusionGemma, chosen: VocabularyPass | None) -> Iterator[None]:
    """Inside, `model` passes over the vocabulary as `chosen` does, or as it did where that is
    None."""
    own = model.vocabulary_pass
    model.vocabulary_pass = chosen or own
    try:
        yield
    finally:
        model.vocabulary_pass = own


class Stepper:
    """Runs denoising steps that never end, one a call: of the canvases that follow random prefixes,
    as `generate_canvases` does it, at the temperature of the first step. As there, the step that
    follows is queued before one is handed out."""

    def __init__(
        self,
        model: DiffusionGemma,
        config: DiffusionConfig,
        *,
        prefix: int,
        batch: int = 1,
        seed: int = 0,
        denoiser: Denoiser | None = None,
        constrain: Constrain | None = None,
    ) -> None:
        endless = replace(
            config,
            max_denoising_steps=_NEVER,
            stability_threshold=_NEVER,
            confident_after=None,
            certain_below=None,
            stable_after=None,
            restart_after=None,
        )
        prompts = random_prompts(model, prefix, batch, seed)
        self._batch = batch
        self._events = generate_canvases(
            model, prompts, endless, seeded(seed), denoiser=denoiser, constrain=constrain
        )

    def __call__(self) -> list[Canvas]:
        """The canvases after the next step; the first call also encodes the prefixes."""
        steps = (event.canvas for event in self._events if isinstance(event, DenoisingStep))
        return [next(steps) for _ in range(self._batch)]


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
) -> StepReport:
    """Time whole steps and their parts, and count the waits of a whole one."""
    canvas = config.canvas_length or model.config.canvas_length
    config = replace(config, canvas_length=canvas, max_tokens=max(config.max_tokens, canvas))

    def stepper(length: int, denoiser: Denoiser | None = None) -> Stepper:
        return Stepper(model, config, prefix=length, batch=batch, seed=seed, denoiser=denoiser)

    whole = stepper(prefix)
    whole()
    peak = peak_bytes(lambda: (whole(), whole()))
    waits = waits_a_step(whole)
    decode, hidden = _decoding(model, canvas, prefix, batch, seed)
    decoded = Denoiser(cast(DiffusionGemma, _Decoded(model, hidden)))
    times = alternate(
        {
            "whole": whole,
            "layers": decode,
            "without layers": stepper(1, decoded),
            "rest": stepper(1, Denoiser(model, _Predicted(hidden[:canvas]))),
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
        batch, canvas, prefix, taken["whole"], parts, waits, peak, peak - weight_bytes(model)
    )


def waits_a_step(step: Callable[[], object], steps: int = _COUNTED) -> float:
    """How often the host waits for the device or reads from it in a step, the mean of several."""
    with counted() as counts:
        for _ in range(steps):
            step()
    return counts.waits / steps


def _part(name: str, seconds: float, cost: Cost, device: Device) -> Part:
    return Part(name, seconds, cost.operations, cost.bytes, device.floor(cost))


def _decoding(
    model: DiffusionGemma, canvas: int, prefix: int, batch: int, seed: int
) -> tuple[Callable[[], None], mx.array]:
    """A function that runs all layers on random canvases behind prefixes, and the hidden states
    [N, D] that they give."""
    views = canvas_views(model, canvas, prefix, batch, seed)
    hidden = model.decode(views)
    mx.eval(hidden)
    return lambda: mx.eval(model.decode(views)), hidden


def canvas_views(
    model: DiffusionGemma, canvas: int, prefix: int, batch: int, seed: int
) -> list[CanvasView]:
    """`batch` random canvases of `canvas` tokens with soft embeddings, as after a first pass, each
    behind a random prefix of `prefix` tokens."""
    prefixes = encoded(model, prefix, batch, seed)
    views = []
    for ids, before in zip(random_prompts(model, canvas, batch, seed + 1), prefixes, strict=True):
        tokens = mx.array(ids, mx.int32)
        soft = model.model.decoder.embed_tokens(tokens)
        mx.eval(soft)
        views.append(CanvasView(tokens, before, soft))
    return views


def random_prompts(model: DiffusionGemma, length: int, batch: int, seed: int) -> list[list[int]]:
    """`batch` rows of `length` random token ids, the special ones at the beginning left out."""
    vocab = model.config.text.vocab_size
    drawn = mx.random.randint(min(8, vocab - 1), vocab, (batch, length), key=mx.random.key(seed))
    rows: list[list[int]] = drawn.tolist()  # type: ignore[assignment]
    return rows


def encoded(model: DiffusionGemma, length: int, batch: int, seed: int) -> list[Prefix]:
    """`batch` random prefixes of `length` tokens."""
    prefixes = []
    for ids in random_prompts(model, length, batch, seed):
        cache = model.make_cache()
        for _ in encode(model, cache, ids):
            pass
        prefixes.append(cache.prefix)
    return prefixes


class _Decoded:
    """A model that has already decoded: its hidden states [N, D] cost nothing."""

    def __init__(self, model: DiffusionGemma, hidden: mx.array) -> None:
        self._model, self._hidden = model, hidden

    def decode_keeping(
        self, canvases: Sequence[CanvasView]
    ) -> tuple[mx.array, tuple[tuple[KeysValues, ...], ...]]:
        computed = sum(
            len(each.tokens if each.places is None else each.places) for each in canvases
        )
        return self._hidden[:computed], ((),) * len(canvases)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _Predicted:
    """A `Predict` that has already predicted, with little certainty; `soft_embeddings` [C, D]."""

    def __init__(self, soft_embeddings: mx.array) -> None:
        tokens = mx.argmax(soft_embeddings[..., :2], axis=-1).astype(mx.int32)
        prediction = Prediction(
            argmax=tokens,
            probability=mx.full(tokens.shape, 0.5),
            draw=tokens,
            entropy=mx.ones(tokens.shape),
            confidence=mx.full(tokens.shape, 0.5),
            soft_embeddings=soft_embeddings,
            dropped_mass=mx.zeros(tokens.shape),
        )
        mx.eval(tokens, prediction.entropy, prediction.confidence, prediction.dropped_mass)
        self._passed = Passed(prediction)

    def __call__(self, canvases: Sequence[Canvas], prefixes: Sequence[Prefix]) -> list[Passed]:
        return [self._passed] * len(canvases)

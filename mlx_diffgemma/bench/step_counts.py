"""What a denoising step asks of a GPU, or of this machine, counted without either being timed.

The weights are zeros that take no memory, so the release's own shapes can be counted anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_diffgemma import cpu
from mlx_diffgemma.bench.counted import as_on_a_gpu, counted, nodes, replaced
from mlx_diffgemma.bench.random_model import blank_model
from mlx_diffgemma.bench.steps import Stepper, encoded, random_prompts
from mlx_diffgemma.bench.timing import peak_bytes
from mlx_diffgemma.checkpoint.quantization import Recipe
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.diffusion.closing import Closer
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import FREE, Layout, token_mask
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.diffusion.encode import encode
from mlx_diffgemma.diffusion.events import DenoisingStep
from mlx_diffgemma.diffusion.matching import MatchingSettings, generate_matching
from mlx_diffgemma.diffusion.noise import SeededNoise
from mlx_diffgemma.kernels.allowed_tokens import every_token
from mlx_diffgemma.kernels.vocabulary import Row, VocabularyResult
from mlx_diffgemma.model.cache import KeysValues
from mlx_diffgemma.model.diffusion_gemma import CanvasView, DiffusionGemma

Form = Literal["gpu", "cpu"]
CONSTRAINTS = ("none", "fixed", "text", "grammar")
"""Names of what a canvas is held to: nothing; every second position is fixed; every position has a
set of allowed tokens; a grammar is read on from each step to the next."""

_STEPS = 6  # enough that some positions settle on the way
_CONTROL = 8  # ids at the beginning that no text holds, but for 1, which stands for text here
_LETTERS = 20  # tokens that the grammar lets follow


@dataclass(frozen=True)
class StepCount:
    """What a denoising step asks for: the most of several steps, unless an attribute is an average.

    Nodes, kernels and products are a GPU's alone, and None where a CPU's forms were counted.

    Attributes:
        waits: how often the host waits for the device or reads from it, on average.
        async_evals: graphs handed to the device, on average.
        layers: nodes of the graph of self-conditioning and all layers.
        vocabulary: nodes of the graph of the pass over the vocabulary.
        rest: nodes of what a step queues beside layers and vocabulary.
        kernels: launches of kernels of this program.
        products: products of matrices.
        beside: most bytes held beside weights and prefixes. MLX on this machine queues few
            operations ahead; a device that is behind with many holds more.
    """

    waits: float
    async_evals: float
    layers: int | None
    vocabulary: int | None
    rest: int | None
    kernels: int | None
    products: int | None
    beside: int


def count_step(
    config: ModelConfig,
    recipe: Recipe,
    settings: DiffusionConfig,
    *,
    form: Form = "gpu",
    dtype: mx.Dtype | None = None,
    prefix: int = 512,
    batch: int = 1,
    constraint: str = "none",
    steps: int = _STEPS,
) -> StepCount:
    """Count steps of `batch` canvases, each behind `prefix` tokens; averages leave the first step
    out.

    Args:
        form: whose forms the layers take. Those of "cpu" are computed on this machine, so large
            shapes take their time; those of "gpu" are only counted.
        dtype: type of the activations; None takes bfloat16 for "gpu" and float32 for "cpu".
        constraint: one of `CONSTRAINTS`; a grammar holds a single canvas whatever `batch` is.
        steps: steps to count.
    """
    dtype = dtype or (mx.bfloat16 if form == "gpu" else mx.float32)
    length = settings.canvas_length or config.canvas_length
    settings = replace(settings, max_tokens=max(settings.max_tokens, length))

    def stepper(model: DiffusionGemma, denoiser: Denoiser | None = None) -> Callable[[], object]:
        if constraint == "grammar":
            return _under_a_grammar(model, settings, denoiser, prefix)
        layout = _layout(constraint, length, config.text.vocab_size)
        return Stepper(
            model, settings, prefix=prefix, batch=batch, denoiser=denoiser,
            constrain=None if layout is None else lambda row, index: layout,
        )  # fmt: skip

    made = (
        partial(_blank, config, recipe, dtype)
        if form == "gpu"
        else partial(blank_model, config, recipe, dtype)
    )
    with as_on_a_gpu() if form == "gpu" else nullcontext():
        model = _compiled(made()) if form == "gpu" else _for_a_cpu(made())
        held = sum(each.nbytes for each in encoded(model, prefix, batch, 0))
        before = mx.get_active_memory()
        step = stepper(model)
        step()
        beside = peak_bytes(lambda: [step() for _ in range(steps)]) - before - held
        with counted() as counts:
            for _ in range(steps):
                step()
    waits, async_evals = counts.waits / steps, counts.async_evals / steps
    if form == "cpu":
        return StepCount(waits, async_evals, None, None, None, None, None, beside)
    with as_on_a_gpu() as work:
        # Launches inside compiled functions are not noted, so this model is not compiled.
        step, kernels, products = stepper(made()), [0], [0]
        step()
        for _ in range(steps):
            launched, multiplied = work.kernels.total(), work.products
            step()
            kernels.append(work.kernels.total() - launched)
            products.append(work.products - multiplied)
    with as_on_a_gpu(fresh=False):
        watched = _Watched(model=_compiled(made()))
        step = stepper(watched.model, Denoiser(cast(DiffusionGemma, watched)))
        step()
        with watched.looking():
            for _ in range(steps):
                step()
    return StepCount(
        waits,
        async_evals,
        max(watched.layers),
        max(watched.vocabulary),
        max(watched.rest),
        max(kernels),
        max(products),
        beside,
    )


def _blank(config: ModelConfig, recipe: Recipe, dtype: mx.Dtype) -> DiffusionGemma:
    """A model whose gates are a product: GELU is one operation too, but a CPU takes long for it in
    16 bits."""
    model = blank_model(config, recipe, dtype)
    for module in model.modules():
        if hasattr(module, "activation"):
            module.activation = mx.multiply
    return model


def _compiled(model: DiffusionGemma) -> DiffusionGemma:
    """The model as it is loaded for a GPU."""
    model.compile()
    return model


def _for_a_cpu(model: DiffusionGemma) -> DiffusionGemma:
    cpu.use(model)
    return model


@dataclass
class _Watched:
    """A model whose graphs are counted where it hands them out."""

    model: DiffusionGemma
    layers: list[int] = field(default_factory=list)
    vocabulary: list[int] = field(default_factory=list)
    rest: list[int] = field(default_factory=list)

    def decode_keeping(
        self, canvases: Sequence[CanvasView]
    ) -> tuple[mx.array, tuple[tuple[KeysValues, ...], ...]]:
        hidden, kept = self.model.decode_keeping(canvases)
        self.layers.append(nodes(hidden).total())
        # An evaluated graph does not count again in the graph that follows.
        mx.eval(hidden, kept)
        return hidden, kept

    def predict(
        self, hidden: mx.array, rows: Sequence[Row], standing: mx.array | None = None
    ) -> VocabularyResult:
        # Chunks that are handed over on the way would be left out of what is counted.
        with replaced(mx, "async_eval", lambda *_: None):
            seen = self.model.predict(hidden, rows, standing)
        values = [getattr(seen, each.name) for each in fields(seen)]
        arrays = [value for value in values if value is not None]
        self.vocabulary.append(nodes(*arrays).total())
        mx.eval(arrays)
        return seen

    def looking(self) -> Any:
        """A context in which the graphs that go to `mx.async_eval` are counted as `rest`."""
        queue = mx.async_eval

        def noted(*args: Any) -> None:
            arrays = [each for _, each in tree_flatten(args) if isinstance(each, mx.array)]
            self.rest.append(nodes(*arrays).total())
            queue(*args)

        return replaced(mx, "async_eval", noted)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def _layout(constraint: str, length: int, vocab: int) -> Layout | None:
    if constraint == "fixed":
        return Layout(tuple(_CONTROL if place % 2 else FREE for place in range(length)))
    if constraint == "text":
        return Layout((FREE,) * length, dict.fromkeys(range(length), _text(vocab)))
    return None


def _text(vocab: int) -> np.ndarray:
    return token_mask([1, *range(_CONTROL, vocab)], vocab)


def _under_a_grammar(
    model: DiffusionGemma, settings: DiffusionConfig, denoiser: Denoiser | None, prefix: int
) -> Callable[[], object]:
    vocab, end = model.config.text.vocab_size, 2
    settings = replace(settings, max_tokens=1 << 20)

    def events() -> Iterator[DenoisingStep]:
        cache = model.make_cache()
        for _ in encode(model, cache, random_prompts(model, prefix, 1, 0)[0]):
            pass
        every = generate_matching(
            model, denoiser or Denoiser(model), cache, settings, SeededNoise(0), _Letters(vocab),
            Closer(), MatchingSettings((end,), end, _text(vocab)),
        )  # fmt: skip
        yield from (event for event in every if isinstance(event, DenoisingStep))

    run = events()
    return lambda: next(run)


class _Letters:
    """A grammar of a few letters, repeated: it takes one token of any draft, and may always end."""

    may_end, must_end = True, False

    def __init__(self, vocab: int) -> None:
        few = [1, 2, *range(_CONTROL, _CONTROL + _LETTERS)]
        self._allowed = token_mask(few, vocab) & every_token(vocab)

    def matching(self, tokens: Sequence[int]) -> int:
        return min(1, len(tokens))

    def advance(self, tokens: Sequence[int]) -> None:
        pass

    def allowed(self) -> np.ndarray:
        return self._allowed

    def forced(self) -> list[int]:
        return []

    def way_out(self, most: int, thorough: bool = False) -> list[int]:
        return []

    def signature(self) -> Hashable:
        return 0

    def copy(self) -> _Letters:
        return self

"""mlx-vlm's DiffusionGemma beside ours, on the same weights in the same process.

mlx-vlm is no dependency: it is imported by name, where it is asked for. What is timed are its own
functions, called in the order in which its generation loop calls them (read from 0.7.10).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_diffgemma.bench.random_model import formats_of, weight_bytes
from mlx_diffgemma.bench.steps import Stepper, random_prompts
from mlx_diffgemma.bench.timing import alternate, peak_bytes
from mlx_diffgemma.config import both_spellings
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

NAME = "mlx-vlm"
KNOWN = "0.7.10"
DEFAULT_SAMPLER = "confidence-threshold"  # what mlx-vlm takes by default, at temperature 0
OUR_SAMPLER = "entropy-bound"  # mlx-vlm's form of the checkpoint's sampler, at temperature 1

_MAX_STEPS = 48
_CONFIDENT = 0.9


@dataclass(frozen=True)
class RivalReport:
    """One denoising step of two programs on equal weights, run in turns.

    Attributes:
        name: name of the other program, with its version and sampler.
        ours_seconds, theirs_seconds: median seconds of a step.
        ratio: ours / theirs.
        ours_beyond_weights, theirs_beyond_weights: most bytes held beside the weights, each
            measured alone.
    """

    name: str
    ours_seconds: float
    theirs_seconds: float
    ratio: float
    ours_beyond_weights: int
    theirs_beyond_weights: int


def rival_version() -> str:
    """The version of mlx-vlm that is installed.

    Raises:
        CheckpointError: mlx-vlm is not installed.
    """
    try:
        return version(NAME)
    except PackageNotFoundError:
        raise CheckpointError(
            f'--against {NAME}: it is not installed; pip install "{NAME}=={KNOWN}".'
        ) from None


def rival_model(model: DiffusionGemma) -> Any:
    """mlx-vlm's model on the arrays of `model`, of which nothing is copied.

    Raises:
        CheckpointError: mlx-vlm is not installed.
    """
    rival_version()
    theirs = import_module("mlx_vlm.models.diffusion_gemma")
    raw = both_spellings(model.config.raw)
    config = {k: v for k, v in raw.items() if k not in ("vision_config", "quantization")}
    twin = theirs.Model(theirs.ModelConfig.from_dict(config))
    formats = formats_of(model)
    nn.quantize(
        twin,
        class_predicate=lambda path, _: formats[path].parameters if path in formats else False,
    )
    twin.load_weights(list(tree_flatten(model.parameters())))
    twin.eval()
    return twin


class RivalStepper:
    """Runs mlx-vlm's denoising steps, one a call, on a random canvas behind the prefix `ids`."""

    def __init__(
        self, rival: Any, ids: list[int], sampler: str = DEFAULT_SAMPLER, seed: int = 0
    ) -> None:
        self._loop = import_module("mlx_vlm.generate.diffusion")
        self._rival, self._sampler = rival, sampler
        self._temperature = 0.0 if sampler == DEFAULT_SAMPLER else 1.0
        self._table = rival.diffusion_prepare_self_conditioning()
        mx.random.seed(seed)
        self._cache = rival.diffusion_prefill_cache(
            mx.array([ids]), cache=rival.make_cache(), attention_mask=None
        )
        mx.eval([layer.state for layer in self._cache])
        self._begin()

    def _begin(self) -> None:
        self._left = _MAX_STEPS
        self._canvas = self._noise()
        self._draft, self._kept = self._canvas, mx.zeros(self._canvas.shape, mx.bool_)
        self._soft: mx.array | None = None
        self._history: list[mx.array] = []
        self._masks = self._rival.diffusion_decoder_masks(self._canvas, self._cache, None)

    def _noise(self) -> mx.array:
        config = self._rival.config
        return self._loop._diffusion_initialize_canvas(
            1, config.canvas_length, config.text_config.vocab_size, mx.int32
        )

    def __call__(self) -> None:
        """Run the next step. As in mlx-vlm, the step that uses self-conditioning evaluates it."""
        if self._left == 1:
            self._begin()
        loop, rival = self._loop, self._rival
        logits = rival.diffusion_decoder_logits(
            self._canvas,
            cache=self._cache,
            self_conditioning=self._soft,
            decoder_attention_mask=self._masks,
        ) / loop._diffusion_linear_temperature(self._left, _MAX_STEPS, {})
        argmax = mx.argmax(logits, axis=-1).astype(mx.int32)
        drawn = argmax
        if self._temperature > 0:
            drawn = loop._diffusion_sample_canvas(logits, mx.int32, self._temperature)
        if self._sampler == OUR_SAMPLER:
            entropy = loop._diffusion_token_entropy(logits)
            self._soft = rival.diffusion_self_conditioning(logits, self._table)
            accepted = loop._diffusion_entropy_transfer_mask(entropy, 0.1)
            self._canvas = mx.where(accepted, drawn, self._noise())
            mx.eval(self._canvas)
        else:
            probability = loop._diffusion_token_probability(logits, drawn)
            accepted = loop._diffusion_confidence_transfer_mask(
                probability, ~self._kept, _CONFIDENT, force_all=False
            )
            self._draft = mx.where(accepted, drawn, self._draft)
            self._kept = self._kept | accepted
            self._canvas = mx.where(self._kept, self._draft, self._noise())
            if bool(mx.all(self._kept).item()):
                self._left = 1
                return
        stops = {"stability_threshold": 1, "confidence_threshold": 0.005}
        if loop._diffusion_stable_and_confident(argmax, logits, self._history, stops):
            self._left = 1
            return
        if self._sampler != OUR_SAMPLER:
            self._soft = rival.diffusion_self_conditioning(logits, self._table)
        self._left -= 1


def compare_steps(
    model: DiffusionGemma,
    config: DiffusionConfig,
    *,
    prefix: int,
    repeats: int = 5,
    seed: int = 0,
    samplers: tuple[str, ...] = (DEFAULT_SAMPLER,),
) -> tuple[RivalReport, ...]:
    """Time our step under `config` and mlx-vlm's with each of `samplers`, in turns.

    Raises:
        CheckpointError: mlx-vlm is not installed, or its version works otherwise than `KNOWN`.
    """
    installed = rival_version()
    try:
        rival = rival_model(model)
        ids = random_prompts(model, prefix, 1, seed)[0]

        def ours() -> Stepper:
            return Stepper(model, config, prefix=prefix, seed=seed)

        def theirs(sampler: str) -> RivalStepper:
            return RivalStepper(rival, ids, sampler, seed)

        # Each is measured alone, as it keeps arrays from step to step.
        ours_beyond = _beyond_weights(model, ours())
        beyond = {name: _beyond_weights(model, theirs(name)) for name in samplers}
        times = alternate({"": ours(), **{name: theirs(name) for name in samplers}}, repeats)
    except (AttributeError, ImportError, TypeError) as error:
        if installed == KNOWN:
            raise
        raise CheckpointError(
            f"--against {NAME}: version {installed} works otherwise than {KNOWN} ({error}); "
            f'pip install "{NAME}=={KNOWN}".'
        ) from error
    mine = median(times[""])
    return tuple(
        RivalReport(
            f"{NAME} {installed}, {name}", mine, median(times[name]), mine / median(times[name]),
            ours_beyond, beyond[name],
        )
        for name in samplers
    )  # fmt: skip


def _beyond_weights(model: DiffusionGemma, step: Callable[[], object]) -> int:
    """Most bytes held during two steps after the first, the weights left out."""
    step()
    return peak_bytes(lambda: (step(), step())) - weight_bytes(model)

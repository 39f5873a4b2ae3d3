"""Variants of a denoising step and of its parts, to time on one random model.

Letters: C canvas, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

import mlx.core as mx

from mlx_diffgemma.bench.counting import Cost, Weights, layers_cost, prefill_cost, vocabulary_cost
from mlx_diffgemma.bench.random_model import (
    blank_model,
    formats_of,
    random_model,
    twin_of,
    weight_bytes,
)
from mlx_diffgemma.bench.rival import (
    DEFAULT_SAMPLER,
    KNOWN,
    NAME,
    OUR_SAMPLER,
    RivalStepper,
    rival_model,
    rival_version,
)
from mlx_diffgemma.bench.steps import Stepper, canvas_views, random_prompts
from mlx_diffgemma.bench.variants import Variant
from mlx_diffgemma.checkpoint.quantization import Recipe
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.cpu.vocabulary import tiled_pass
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.encode import encode
from mlx_diffgemma.diffusion.profiles import DEFAULT, PROFILES, profile_settings
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.kernels.dispatch import launcher_for
from mlx_diffgemma.kernels.draw import BLOCK
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.vocabulary import CHUNK, Row, VocabularyPass, vocabulary_pass
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

_COPIES = 12  # arrays of float32 that the plain twin of the vocabulary kernel holds of a chunk
_SAMPLERS = (DEFAULT_SAMPLER, OUR_SAMPLER)

SOFT: Mapping[str, Mapping[str, Any]] = {
    "likely tokens": {"soft_cutoff": 10.0, "likely": True},
    "all tokens": {},
    "no soft embeddings": {"need_soft": False},
}
"""What the pass over the vocabulary is asked for beside statistics and draws, as fields of a `Row`:
soft embeddings from the likeliest tokens, from the product with the whole table, or none."""


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        canvas, prefix: tokens drafted at a time, and tokens before them.
        batches: canvases in a step; the first is what the others are compared with.
        prompt: tokens to encode.
        prompt_chunks: tokens of it at a time; the others are compared with the last, which is what
            the model takes on a GPU.
        vocabulary_chunks: tokens of the vocabulary in a product; the others are compared with the
            first, which is what the model takes on a GPU.
        positions: how many the experts compute; the first is a whole canvas.
    """

    canvas: int = 256
    prefix: int = 512
    batches: tuple[int, ...] = (1, 2, 4, 8)
    prompt: int = 4096
    prompt_chunks: tuple[int, ...] = (512, 1024, 2048)
    vocabulary_chunks: tuple[int, ...] = (CHUNK, 16384, 32768, 65536)
    positions: tuple[int, ...] = (256, 64, 32)


SMALL_SIZES = Sizes(
    canvas=16,
    prefix=8,
    prompt=64,
    prompt_chunks=(16, 32, 64),
    vocabulary_chunks=(1024, 2048, 4096),
    positions=(16, 8, 4),
)


class Workbench:
    """The model that everything is measured on. What it asks of memory and time is known before
    its weights are made.

    Args:
        config, recipe, dtype: shapes, formats and type of a model with random weights.
        sizes: what is measured.
        burst: steps that are timed together.
        profiles: names of the profiles that are measured; the others are compared with the first.
        loaded: a model to measure in place of one with random weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        dtype: mx.Dtype,
        sizes: Sizes,
        burst: int = 3,
        profiles: Sequence[str] = tuple(PROFILES),
        loaded: DiffusionGemma | None = None,
    ) -> None:
        self.config = replace(config, canvas_length=sizes.canvas)
        self.recipe, self.dtype, self.sizes = recipe, dtype, sizes
        self.burst, self.profiles, self._loaded = burst, profiles, loaded
        blank = loaded or blank_model(self.config, recipe, dtype)
        self.weights = Weights(self.config, formats_of(blank), dtype.size)
        self.weight_bytes = weight_bytes(blank)

    @cached_property
    def model(self) -> DiffusionGemma:
        """The model that is loaded, or one with random weights, compiled as it is for a GPU."""
        if self._loaded is not None:
            return self._loaded
        model = random_model(self.config, self.recipe, self.dtype)
        model.compile()
        return model

    def make(self) -> None:
        """Make the weights now, so that they count for no variant."""
        _ = self.model

    @cached_property
    def eager(self) -> DiffusionGemma:
        """The same weights in a model that is not compiled."""
        return twin_of(self.model)

    @cached_property
    def rival(self) -> Any:
        return rival_model(self.model)

    @cached_property
    def hidden(self) -> mx.array:
        """Hidden states [C, D] as the layers hand them out: no layer has to run for them."""
        shape = (self.sizes.canvas, self.config.text.hidden_size)
        drawn = mx.random.normal(shape, key=mx.random.key(0)).astype(self.dtype)
        hidden = self.model.model.decoder.norm(drawn)
        mx.eval(hidden)
        return hidden

    def step_cost(self, batch: int = 1) -> Cost:
        canvas, prefix = self.sizes.canvas, self.sizes.prefix
        whole = layers_cost(self.weights, canvas, prefix, batch)
        return whole + vocabulary_cost(self.weights, canvas, batch)

    def logit_bytes(self, batch: int = 1) -> int:
        """Most bytes of logits that a pass over the vocabulary queues before the device computes
        any."""
        positions = batch * self.sizes.canvas
        return 2 * positions * self.config.text.vocab_size * self.dtype.size

    def parts(self) -> dict[str, Callable[[], list[Variant]]]:
        """Functions that make the variants of each part, by the name of the part."""
        return {
            "step": self.steps,
            "vocabulary": self.vocabulary,
            "layers": self.layers,
            "prefill": self.prefill,
            "experts": self.experts,
            NAME: self.rivals,
        }

    def steps(self) -> list[Variant]:
        """Whole steps under every profile, each with several numbers of canvases at a time."""
        first = self.sizes.batches[0]
        variants = []
        for profile in self.profiles:
            for batch in self.sizes.batches:
                if batch != first:
                    baselines: tuple[str, ...] = (_of_batch(profile, first),)
                elif profile != self.profiles[0]:
                    baselines = (_of_batch(self.profiles[0], first),)
                else:
                    baselines = ()
                dense = PROFILES[profile].get("soft_cutoff") is None
                variants.append(
                    Variant(
                        _of_batch(profile, batch),
                        partial(self._burst, partial(self._stepper, profile, batch)),
                        baselines,
                        share=batch * self.burst,
                        cost=_times(self.step_cost(batch), self.burst),
                        setup=_times(self._prefix_cost(), batch),
                        needs=self.logit_bytes(batch) * (2 if dense else 1),
                    )
                )
        return variants

    def vocabulary(self) -> list[Variant]:
        """The pass over the vocabulary alone, in chunks of several sizes and in a CPU's tiles."""
        vocab, canvas = self.config.text.vocab_size, self.sizes.canvas
        whole = -(-vocab // BLOCK) * BLOCK
        chunks = [chunk for chunk in self.sizes.vocabulary_chunks if chunk < whole]
        forms: dict[str, tuple[VocabularyPass, int]] = {}
        for chunk in chunks:
            forms[f"chunks of {chunk}"] = partial(vocabulary_pass, chunk=chunk), chunk
        forms["one product"] = partial(vocabulary_pass, chunk=whole), whole
        forms["a CPU's tiles"] = tiled_pass, 0
        shipped, very_first = next(iter(forms)), next(iter(SOFT))
        twins = launcher_for("auto") is None
        variants = []
        for soft, asked in SOFT.items():
            for form, (run, chunk) in forms.items():
                if form != shipped:
                    baselines: tuple[str, ...] = (f"{soft}, {shipped}",)
                elif soft != very_first:
                    baselines = (f"{very_first}, {shipped}",)
                else:
                    baselines = ()
                both = vocabulary_cost(self.weights, canvas)
                cost = both if not asked else replace(both, operations=both.operations / 2)
                copies = _COPIES * 4 if twins else 2 * self.dtype.size
                variants.append(
                    Variant(
                        f"{soft}, {form}",
                        partial(self._vocabulary, run, asked),
                        baselines,
                        cost=cost,
                        needs=self.logit_bytes() + canvas * chunk * copies,
                    )
                )
        return variants

    def layers(self) -> list[Variant]:
        """All layers over one canvas, without the vocabulary."""
        cost = layers_cost(self.weights, self.sizes.canvas, self.sizes.prefix)

        def make(compiled: bool) -> Callable[[], object]:
            model = self.model if compiled else self.eager
            views = canvas_views(model, self.sizes.canvas, self.sizes.prefix, 1, seed=0)
            return lambda: mx.eval(model.decode(views))

        return [
            Variant("eager", partial(make, False), cost=cost, setup=self._prefix_cost()),
            Variant(
                "compiled", partial(make, True), ("eager",), cost=cost, setup=self._prefix_cost()
            ),
        ]

    def prefill(self) -> list[Variant]:
        """The encoding of a prompt, in chunks of several sizes."""
        prompt, chunks = self.sizes.prompt, self.sizes.prompt_chunks
        names = [f"{prompt} tokens by {chunk}" for chunk in chunks]

        def make(chunk: int) -> Callable[[], object]:
            (ids,) = random_prompts(self.model, prompt, 1, seed=0)

            def run() -> None:
                cache = self.model.make_cache()
                for _ in encode(self.model, cache, ids, step_size=chunk, room=self.sizes.canvas):
                    pass

            return run

        return [
            Variant(
                name,
                partial(make, chunk),
                () if chunk == chunks[-1] else (names[-1],),
                cost=prefill_cost(self.weights, prompt, chunk),
            )
            for name, chunk in zip(names, chunks, strict=True)
        ]

    def experts(self) -> list[Variant]:
        """The experts of all layers, seconds a layer, on as many positions as a pass computes."""
        text, most = self.config.text, self.sizes.positions[0]
        per_token = text.top_k_experts * 3 * text.hidden_size * text.moe_intermediate_size
        read = self.weights.bytes_by_class()["experts"]

        def make(count: int) -> Callable[[], object]:
            shape = (count, text.hidden_size)
            x = mx.random.normal(shape, key=mx.random.key(0)).astype(self.dtype)
            routed = [(layer.experts, *layer.router(x)) for layer in self.model.layers]
            mx.eval(x, [each[1:] for each in routed])
            return lambda: mx.eval([experts(x, *chosen) for experts, *chosen in routed])

        layers, names = text.num_hidden_layers, [f"{most} positions"]
        names += [f"{count} positions ({count / most:g})" for count in self.sizes.positions[1:]]
        return [
            Variant(
                name,
                partial(make, count),
                () if count == most else (names[0],),
                share=layers,
                cost=Cost(2.0 * count * layers * per_token, read),
            )
            for name, count in zip(names, self.sizes.positions, strict=True)
        ]

    def rivals(self) -> list[Variant]:
        """Steps of mlx-vlm with each of its samplers, and ours beside them.

        Raises:
            CheckpointError: mlx-vlm is not installed.
        """
        installed = rival_version()
        names = [f"{NAME} {installed}, {sampler}" for sampler in _SAMPLERS]

        def steps(
            name: str,
            make: Callable[[], Callable[[], object]],
            baselines: tuple[str, ...],
            size: int,
        ) -> Variant:
            return Variant(
                name,
                partial(self._burst, make),
                baselines,
                share=self.burst,
                cost=_times(self.step_cost(), self.burst),
                setup=self._prefix_cost(),
                needs=size,
            )

        # At most 5.03 float32 copies were measured of mlx-vlm 0.7.10's entropy-bound step: logits,
        # log-probabilities, probabilities, their product, and noise.
        copies = 5 * 4 * self.sizes.canvas * self.config.text.vocab_size
        theirs = [
            steps(name, partial(self._rival_stepper, sampler), (), copies)
            for sampler, name in zip(_SAMPLERS, names, strict=True)
        ]
        ours = [
            steps(
                f"ours, {profile}",
                partial(self._stepper, profile, 1),
                tuple(names),
                2 * self.logit_bytes(),
            )
            for profile in dict.fromkeys((DEFAULT, self.profiles[0]))
        ]
        return [*theirs, *ours]

    def _prefix_cost(self) -> Cost:
        return prefill_cost(self.weights, self.sizes.prefix, self.sizes.prefix)

    def _stepper(self, profile: str, batch: int) -> Callable[[], object]:
        settings = DiffusionConfig(canvas_length=self.sizes.canvas, max_tokens=self.sizes.canvas)
        settings = settings.override(**profile_settings(profile))
        return Stepper(self.model, settings, prefix=self.sizes.prefix, batch=batch)

    def _rival_stepper(self, sampler: str) -> Callable[[], object]:
        (ids,) = random_prompts(self.model, self.sizes.prefix, 1, seed=0)
        try:
            step = RivalStepper(self.rival, ids, sampler)
            step()
        except (AttributeError, ImportError, TypeError) as error:
            raise CheckpointError(
                f"version {rival_version()} does not run here ({error}); known is {KNOWN}."
            ) from error
        return step

    def _burst(self, make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
        """Several steps in a row, so that the next one is queued before the last is read."""
        step = make()

        def run() -> None:
            for _ in range(self.burst):
                step()

        return run

    def _vocabulary(self, run: VocabularyPass, asked: Mapping[str, Any]) -> Callable[[], object]:
        model, hidden = self.model, self.hidden
        table = EmbeddingTable.of(model.model.decoder.embed_tokens, model.dtype)
        rows = [Row(hidden.shape[0], 0.8, mx.random.key(0), **asked)]
        (ids,) = random_prompts(model, hidden.shape[0], 1, seed=0)
        standing = mx.array(ids, mx.int32)
        mx.eval(standing, rows[0].key)
        cap = self.config.text.final_logit_softcapping

        def whole() -> None:
            result = run(hidden, table, rows, softcap=cap, standing=standing)
            arrays = (getattr(result, field.name) for field in fields(result))
            mx.eval([array for array in arrays if array is not None])

        return whole


def _of_batch(profile: str, batch: int) -> str:
    return f"{profile}, batch {batch}"


def _times(cost: Cost, count: int) -> Cost:
    return Cost(cost.operations * count, cost.bytes * count)

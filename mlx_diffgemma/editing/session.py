"""A model made ready for work on one canvas after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import CanvasConstraint, Layout
from mlx_diffgemma.diffusion.denoise import denoise_canvas
from mlx_diffgemma.diffusion.events import DenoisingStep
from mlx_diffgemma.diffusion.noise import SeededNoise, fresh_seed
from mlx_diffgemma.diffusion.predict import entropy, make_predictor
from mlx_diffgemma.diffusion.prefill import DEFAULT_STEP_SIZE, prefill
from mlx_diffgemma.diffusion.profiles import DEFAULT as DEFAULT_PROFILE
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.generation import diffusion_config, fit_to_context, reuse_prefix
from mlx_diffgemma.model.cache import PrefixCache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.text.prompt import Prompt, encode_prompt

OnStep = Callable[[DenoisingStep], None]

_LOGITS_AT_ONCE = 1 << 28  # most logits of a batch of candidates


@dataclass(frozen=True)
class Denoised:
    """A canvas after its last step: token ids [C], entropies [C] in nats, steps run."""

    tokens: list[int]
    entropy: list[float]
    steps: int


class Session:
    """One request's use of a model; counts its forward passes.

    Args:
        settings: fields of `DiffusionConfig`.

    Attributes:
        passes: forward passes over a canvas so far, whatever the number of rows.
        seed: what every random draw follows from.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        tokenizer: Any,
        prompt: Prompt,
        *,
        seed: int | None = None,
        system_prompt: str | None = None,
        raw: bool = False,
        thinking: bool | None = None,
        prefill_step_size: int | None = None,
        on_step: OnStep | None = None,
        profile: str = DEFAULT_PROFILE,
        **settings: Any,
    ) -> None:
        self.model = model
        # How long a canvas is follows from what must be in it.
        self.config = replace(diffusion_config(model, profile, **settings), shrink_canvas=False)
        self.seed = fresh_seed() if seed is None else seed
        if self.seed < 0:
            raise UsageError(f"seed must not be negative, and is {self.seed}.")
        self.vocabulary = Vocabulary(
            tokenizer, model.config.text.vocab_size, self.config.eos_token_ids
        )
        self.prompt = encode_prompt(
            tokenizer, prompt, raw=raw, system_prompt=system_prompt, thinking=thinking
        )
        self._prefill_step_size = prefill_step_size or DEFAULT_STEP_SIZE
        self.length = self.config.canvas_length or model.config.canvas_length
        self.noise = SeededNoise(self.seed)
        self.predictor = make_predictor(model, self.config.soft_cutoff)
        self.passes = 0
        self.canvases = 0
        self._cache = model.make_cache()
        self._on_step = on_step or (lambda step: None)

    @property
    def shape(self) -> tuple[int, int]:
        """Canvas length and vocabulary size."""
        return self.length, self.vocabulary.size

    def fitted(self) -> DiffusionConfig:
        """The settings, with an answer that ends where the context ends."""
        return fit_to_context(self.model, self.prompt, self.config)

    def stepped(self, step: DenoisingStep) -> None:
        """Count a denoising step and report it."""
        self.passes += 1
        self._on_step(step)

    def prefix(self, text_tokens: Sequence[int] = ()) -> PrefixCache:
        """The cache of the prompt, followed by these tokens of the answer."""
        ids = [*self.prompt, *text_tokens]
        fit_to_context(self.model, ids, self.config)
        reuse_prefix(self._cache, ids)
        rest = ids[len(self._cache.tokens[0]) :]
        if rest:
            ids_left = mx.array([rest], mx.int32)
            for _ in prefill(self.model, ids_left, self._cache, step_size=self._prefill_step_size):
                pass
            self._cache.tokens[0].extend(rest)
        return self._cache

    def denoise(
        self,
        cache: PrefixCache,
        layout: Layout,
        *,
        initial: Sequence[int] | None = None,
        watched: range | None = None,
        first_step: int = 1,
        config: DiffusionConfig | None = None,
    ) -> Denoised:
        """Denoise one canvas that must be as `layout` says; `initial` is what it starts from
        instead of noise, and the `watched` positions decide when it is done (all if None)."""
        counted = None
        if watched is not None:
            counted = np.isin(np.arange(self.length), list(watched))[None]
        steps = denoise_canvas(
            self.predictor,
            cache,
            config or self.config,
            self.noise,
            rows=[0],
            canvas_index=self.canvases,
            canvas_length=self.length,
            vocab_size=self.vocabulary.size,
            initial_canvas=None if initial is None else mx.array([list(initial)], mx.int32),
            constraint=CanvasConstraint.of([layout], self.vocabulary.size),
            counted=counted,
            first_step=first_step,
        )
        last = None
        for last in steps:
            self.stepped(last)
        assert last is not None, "a canvas takes at least one step"
        self.canvases += 1
        return Denoised(last.draft[0].tolist(), last.entropy[0].tolist(), last.step)

    def first_look(self, cache: PrefixCache, layouts: Sequence[Layout]) -> np.ndarray:
        """What the model believes at first sight of each layout, all filled up with the same noise,
        at temperature 1: [R, C] in nats, the log-probability of the token where one is fixed,
        elsewhere the negative entropy of what may stand there."""
        noise = self.noise.initial_canvas([0], self.canvases, *self.shape)
        at_once = max(1, _LOGITS_AT_ONCE // (self.length * self.vocabulary.size))
        found = []
        for start in range(0, len(layouts), at_once):
            some = layouts[start : start + at_once]
            constraint = CanvasConstraint.of(some, self.vocabulary.size)
            canvas = constraint.pin(mx.repeat(noise, len(some), axis=0))
            hidden = self.model.decode(canvas, repeated(cache, [0] * len(some)))
            logits = self.model.logits(hidden)
            standing = mx.take_along_axis(logits, canvas[..., None], axis=-1)[..., 0]
            fixed = standing - mx.logsumexp(logits, axis=-1)
            free = -entropy(constraint.restrict(logits))
            found.append(np.array(mx.where(constraint.is_open, free, fixed)))
            self.passes += 1
        return np.concatenate(found)


def repeated(cache: PrefixCache, rows: Sequence[int]) -> PrefixCache:
    """A copy of the cache with these of its sequences, each as often as it is named."""
    copy = cache.snapshot()
    copy.keep_rows(rows)
    return copy

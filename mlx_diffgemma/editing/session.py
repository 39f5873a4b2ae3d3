"""A model made ready for work on one canvas after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mlx_diffgemma.checks import check_callable, check_integer
from mlx_diffgemma.diffusion.canvas import Canvas
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import Layout, without
from mlx_diffgemma.diffusion.denoiser import Denoiser, InFlight, Look, denoise, until_done
from mlx_diffgemma.diffusion.encode import encode
from mlx_diffgemma.diffusion.events import DenoisingStep
from mlx_diffgemma.diffusion.noise import SeededNoise, checked_seed
from mlx_diffgemma.diffusion.profiles import DEFAULT as DEFAULT_PROFILE
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.fitting import (
    cache_of,
    canvas_length,
    configured,
    denoiser_of,
    fit_to_context,
)
from mlx_diffgemma.model.cache import Prefix, PrefixCache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.pictured import followed_by
from mlx_diffgemma.text.prompt import Prompt, encode_prompt
from mlx_diffgemma.text.prompt_settings import PromptSettings, parted

OnStep = Callable[[DenoisingStep], None]


@dataclass(frozen=True)
class Denoised:
    """A canvas after its last step: token ids [C], entropies [C] in nats, steps run, and whether
    it was done before they were used up."""

    tokens: list[int]
    entropy: list[float]
    steps: int
    converged: bool


class Session:
    """One request's use of a model, which counts its forward passes.

    Args:
        seed, prefix_cache, prefill_step_size, denoiser, profile, config, prompt_settings, settings:
            as for `stream_generate`.
        on_step: called with the `DenoisingStep` after each step.

    Raises:
        UsageError: a setting is unknown, out of range, or means nothing for a canvas of which a
            part is given.
        PromptError: the prompt cannot be encoded.

    Attributes:
        passes: forward passes over a canvas so far, whatever the number of rows.
        seed: what every random draw follows from.
        prompt_settings: how prompts are encoded.
        encode: gives the token ids of another prompt, by the same settings.
        prompt: token ids of the prompt.
        length: tokens of a canvas, C.
        canvases: canvases that `denoise` has finished; their number picks the noise of the next.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        tokenizer: Any,
        prompt: Prompt,
        *,
        seed: int | None = None,
        prefix_cache: PrefixCache | None = None,
        prefill_step_size: int | None = None,
        denoiser: Denoiser | None = None,
        on_step: OnStep | None = None,
        profile: str = DEFAULT_PROFILE,
        config: DiffusionConfig | None = None,
        prompt_settings: PromptSettings | None = None,
        **settings: Any,
    ) -> None:
        self.prompt_settings, settings = parted(prompt_settings, settings)
        for name, given in (
            ("stop", settings.pop("stop", None)),
            ("prefill_response", self.prompt_settings.prefill_response),
        ):
            if given:
                raise UsageError(
                    f"{name} goes with free answers only: here the text around the answer, or its "
                    "form, is given; leave it out."
                )
        self.model = model
        # How long a canvas is follows from what must be in it.
        self.config = replace(
            configured(model, tokenizer, profile, config, **settings), shrink_canvas=False
        )
        if prefill_step_size is not None:
            check_integer("prefill_step_size", prefill_step_size, 1)
        check_callable("on_step", on_step)
        self.seed = checked_seed(seed)
        self.vocabulary = Vocabulary(
            tokenizer, model.config.text.vocab_size, self.config.eos_token_ids
        )
        self.encode: Callable[[Prompt], list[int]] = partial(
            encode_prompt, tokenizer, how=self.prompt_settings, config=model.config
        )
        self.prompt = self.encode(prompt)
        self._prefill_step_size = prefill_step_size
        self.length = canvas_length(model, self.config)
        self.noise = SeededNoise(self.seed)
        self.denoiser = denoiser_of(model, denoiser)
        self.passes = 0
        self.canvases = 0
        self.cache = cache_of(model, prefix_cache)
        self._on_step = on_step or (lambda step: None)

    def fitted(self) -> DiffusionConfig:
        """The settings, with an answer that ends where the context ends."""
        return fit_to_context(self.model, [self.prompt], self.config)[0]

    def stepped(self, step: DenoisingStep) -> None:
        """Count a denoising step and report it."""
        self.passes += 1
        self._on_step(step)

    def prefix(self, text_tokens: Sequence[int] = ()) -> Prefix:
        """The prefix of the prompt and these tokens of the answer behind it, encoded.

        Raises:
            PromptError: they are longer than the context.
        """
        ids = followed_by(self.prompt, text_tokens)
        fit_to_context(self.model, [ids], self.config)
        return self.encoded(ids)

    def encoded(self, ids: Sequence[int]) -> Prefix:
        """The prefix of these token ids. What they have in common with those that the cache holds
        is not encoded again."""
        for _ in encode(self.model, self.cache, ids, step_size=self._prefill_step_size):
            pass
        return self.cache.prefix

    def canvas(self, layout: Layout, **start: Any) -> Canvas:
        """The next canvas of this session; `start` as for `Canvas.start`."""
        return Canvas.start(
            self.config,
            self.noise,
            self.canvases,
            self.length,
            self.vocabulary.size,
            layout=without(self.model.never_drawn, self.length, self.vocabulary.size, layout),
            **start,
        )

    def denoise(
        self,
        prefix: Prefix,
        layout: Layout,
        *,
        initial: Sequence[int] | None = None,
        watched: range | None = None,
        first_step: int = 1,
    ) -> Denoised:
        """Denoise one canvas that must be as `layout` says; `initial` is what it starts from
        instead of noise [C], and the `watched` positions decide when it is done (all if None)."""
        counted = None
        if watched is not None:
            counted = np.isin(np.arange(self.length), list(watched))
        canvas = self.canvas(layout, initial=initial, first_step=first_step, counted=counted)
        for stepped in denoise(self.denoiser, {0: InFlight(canvas, prefix)}, until_done(prefix)):
            canvas = stepped[0]
            self.stepped(DenoisingStep(0, canvas))
        self.canvases += 1
        return Denoised(
            canvas.draft.tolist(), canvas.entropy.tolist(), canvas.passes, canvas.converged
        )

    def first_look(self, prefix: Prefix, layouts: Sequence[Layout]) -> list[Look]:
        """What the model believes at first sight of each layout, all filled up with the same
        noise."""
        self.passes += 1
        canvases = [self.canvas(layout) for layout in layouts]
        return self.denoiser.look(canvases, [prefix] * len(canvases))

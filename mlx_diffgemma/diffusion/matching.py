"""Denoising under a grammar: whatever the model drafts, what is committed matches.

What the grammar forces is pinned, its next position restricted to what may follow, and what is
known of those behind it is known to the model too (`lookahead.py`). The rest is denoised freely.
After each step the draft is read from left to right, as far as it matches, and as much of it as
stays the same and is certain is pinned. Where nothing is, the canvas may wait a few steps for the
draft to get surer; when it has waited enough, what the model is surest to begin with is pinned, one
token at least. So the passes over a canvas never exceed the tokens that the model has to choose by
more than those few. Letters: C canvas, W words of a bit mask.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diffusion.closing import Closer
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import FREE, CanvasConstraint, Layout, token_mask
from mlx_diffgemma.diffusion.denoise import denoising_step
from mlx_diffgemma.diffusion.events import CanvasCommitted, DenoisingStep
from mlx_diffgemma.diffusion.lookahead import few_tokens_in, look_ahead
from mlx_diffgemma.diffusion.noise import Noise, StepNoise
from mlx_diffgemma.diffusion.predict import Predictor
from mlx_diffgemma.diffusion.sampler import make_sampler
from mlx_diffgemma.diffusion.schedule import LinearTemperature
from mlx_diffgemma.errors import DiffGemmaError, NumericalError
from mlx_diffgemma.model.cache import PrefixCache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

_STEPS_A_WAIT = 16  # of a schedule, for every step that a canvas may wait


class BrokenOffError(DiffGemmaError):
    """What went wrong on the way; `tokens` were written by then."""

    def __init__(self, message: str, tokens: list[int]) -> None:
        super().__init__(message)
        self.tokens = tokens


class Matcher(Protocol):
    """Where a grammar stands after some tokens."""

    def matching(self, tokens: Sequence[int]) -> int:
        """How many of the `tokens` (no eos among them) may follow."""

    def advance(self, tokens: Sequence[int]) -> None:
        """Take in tokens that may follow."""

    def allowed(self) -> np.ndarray:
        """Mask [W] of the tokens that may follow, every eos among them where it may end."""

    def forced(self) -> list[int]:
        """The tokens that must follow, as far as there is no choice."""

    def signature(self) -> Hashable:
        """What may follow next and what must: mostly the same where the grammar stands alike."""

    def way_out(self, most: int, *, thorough: bool = False) -> list[int] | None:
        """At most `most` tokens that complete what was taken in; None where none are found, not
        even with more work where `thorough`."""

    @property
    def may_end(self) -> bool:
        """Whether what was taken in is complete."""

    @property
    def must_end(self) -> bool:
        """Whether nothing but an eos may follow."""

    def copy(self) -> Matcher:
        """An independent matcher in the same state."""


@dataclass(frozen=True)
class MatchingSettings:
    """Attributes:
    eos: ids that end a sequence, and `end`, the one that fills a canvas behind it.
    text: mask [W] of the tokens that may stand anywhere at all.
    """

    eos: tuple[int, ...]
    end: int
    text: np.ndarray


class _Canvas:
    """One canvas while it is being denoised, a row of its own.

    Attributes:
        draft: [C] token ids after the last step, and `entropy` [C] in nats.
        unchanged: [C] for how many steps each of them has stayed the same.
    """

    def __init__(self, predictor: Predictor, cache: PrefixCache, config: DiffusionConfig,
                 noise: Noise, index: int, length: int, vocab: int) -> None:  # fmt: skip
        self.predictor, self.cache, self.config = predictor, cache, config
        self.noise, self.index, self.shape = noise, index, (length, vocab)
        self.schedule = LinearTemperature(config.t_min, config.t_max, config.max_denoising_steps)
        self.tokens = noise.initial_canvas([0], index, length, vocab)
        self.soft: mx.array | None = None
        self.draft = np.full(length, FREE, np.int32)
        self.entropy = np.zeros(length, np.float32)
        self.unchanged = np.zeros(length, int)
        self.sampler = make_sampler(config, vocab)
        self.steps = 0
        self.waits = config.max_denoising_steps // _STEPS_A_WAIT
        self.unsure = np.inf

    def step(self, layout: Layout) -> DenoisingStep:
        """One pass under `layout`."""
        constraint = CanvasConstraint.of([layout], self.shape[1])
        last = self.config.max_denoising_steps
        self.tokens = constraint.pin(self.tokens)
        # The last step may be repeated, so the draws go by the steps of the canvas.
        step = min(self.steps + 1, last)
        noise = _Shifted(self.noise, self.steps + 1 - step)
        prediction, proposal = denoising_step(
            self.predictor,
            self.sampler,
            self.tokens,
            self.cache,
            self.soft,
            temperature=self.schedule.at(step),
            noise=StepNoise(noise, [0], self.index, step, *self.shape),
            constraint=constraint,
        )
        self.steps += 1
        self.tokens, self.soft = proposal.canvas, prediction.soft_embeddings
        mx.eval(proposal.draft, prediction.entropy, proposal.accepted)
        mx.async_eval(self.tokens, self.soft)  # while the draft is read here
        entropy, draft = np.array(prediction.entropy), np.array(proposal.draft)
        if not np.isfinite(entropy).all():
            raise NumericalError(
                f"canvas {self.index + 1}, step {self.steps}: the model returned NaN or "
                "infinity; its weights are damaged (check them with --check)."
            )
        self.unchanged = np.where(draft[0] == self.draft, self.unchanged + 1, 0)
        self.draft, self.entropy = draft[0], entropy[0]
        return DenoisingStep(
            canvas_index=self.index,
            step=self.steps,
            max_steps=last,
            temperature=self.schedule.at(step),
            rows=(0,),
            draft=draft,
            canvas=np.array(self.tokens),
            entropy=entropy,
            accepted=np.array(proposal.accepted),
            done=np.zeros(1, bool),
        )

    def ready(self, start: int, count: int) -> int:
        """How many of the `count` tokens drafted from `start` on are to be pinned now."""
        entropy = self.entropy[start : start + count]
        unchanged = self.unchanged[start : start + count] >= self._stability()
        settled = np.logical_and.accumulate(unchanged)
        mean = np.cumsum(entropy) / np.arange(1, count + 1)
        before, self.unsure = self.unsure, float(mean[-1])
        certain = np.flatnonzero(settled & (mean < self.config.confidence_threshold))
        if len(certain):
            return int(certain[-1]) + 1
        if self.waits and self.unsure < before:
            self.waits -= 1
            return 0
        # As the entropy bound accepts: what is nearly independent of each other.
        accepted = settled & (np.cumsum(entropy) - entropy <= self.config.entropy_bound)
        return max(1, int(accepted.sum()))

    def _stability(self) -> int:
        """Steps for which a token must have stayed the same."""
        floor = self.config.confident_after
        if floor is not None and self.steps >= floor:
            return 0
        return self.config.stability_threshold


def generate_matching(
    model: DiffusionGemma,
    predictor: Predictor,
    cache: PrefixCache,
    config: DiffusionConfig,
    noise: Noise,
    matcher: Matcher,
    closer: Closer,
    settings: MatchingSettings,
) -> Generator[DenoisingStep | CanvasCommitted, None, list[int]]:
    """Continue the prefix in `cache` with tokens that `matcher` takes to a complete end, at most
    `config.max_tokens` of them; returns the tokens.

    `closer` knows how to end from any state, so that the end always stays within reach.

    Raises:
        ClosingError: no output that short is known to match.
        BrokenOffError: the model or the matcher failed on the way.
    """
    length = config.canvas_length or model.config.canvas_length
    vocab = model.config.text.vocab_size
    tokens: list[int] = []
    closer.require(matcher, config.max_tokens)
    index = 0
    while True:
        room = config.max_tokens - len(tokens)
        if config.shrink_canvas:
            length = min(length, room)
        canvas = _Canvas(predictor, cache, config, noise, index, length, vocab)
        pinned: list[int] = []
        try:
            ended = yield from _match_canvas(canvas, matcher, closer, settings, room, pinned)
        except DiffGemmaError as error:
            raise BrokenOffError(str(error), tokens + pinned) from error
        tokens += pinned
        yield CanvasCommitted(
            canvas_index=index,
            rows=(0,),
            tokens=(tuple(pinned),),
            steps=(canvas.steps,),
            finish_reasons=("stop" if ended else None,),
        )
        if ended:
            return tokens
        model.encode(mx.array([pinned], mx.int32), cache)
        mx.eval(cache.arrays())
        mx.clear_cache()
        cache.tokens[0].extend(pinned)
        index += 1


def _match_canvas(
    canvas: _Canvas,
    matcher: Matcher,
    closer: Closer,
    settings: MatchingSettings,
    room: int,
    pinned: list[int],
) -> Generator[DenoisingStep, None, bool]:
    """Put the tokens of one canvas into `pinned`; returns whether they end the sequence."""
    length = canvas.shape[0]
    while True:
        _pin(matcher, pinned, matcher.forced(), min(length, room))
        if matcher.must_end or len(pinned) == room:
            return True
        if len(pinned) == length:
            return False
        layout = _layout(matcher, pinned, settings, length, room)
        ready = 0
        while not ready:
            yield canvas.step(layout)
            ahead = canvas.draft[len(pinned) :].tolist()
            text = _up_to_eos(ahead, settings)
            valid = matcher.matching(text)
            # An eos behind what matches is a choice like any other.
            eos = valid == len(text) < len(ahead)
            ready = canvas.ready(len(pinned), max(1, valid + eos))
        kept = closer.affordable(matcher, text[: min(ready, valid)], room - len(pinned))
        ends = eos and ready > valid
        if not kept and not ends:
            # No room is left but for the end: the next token may take it out of reach.
            _pin(matcher, pinned, closer.ending(matcher, room - len(pinned)), length)
            return len(pinned) < length or matcher.may_end
        _pin(matcher, pinned, kept, length)
        if ends and len(kept) == valid and matcher.may_end:
            return True
        canvas.sampler = make_sampler(canvas.config, canvas.shape[1])


def _up_to_eos(tokens: list[int], settings: MatchingSettings) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in settings.eos), None)]


def _pin(matcher: Matcher, pinned: list[int], tokens: Sequence[int], most: int) -> None:
    taken = list(tokens[: most - len(pinned)])
    if taken:
        matcher.advance(taken)
        pinned += taken


def _layout(
    matcher: Matcher, pinned: Sequence[int], settings: MatchingSettings, length: int, room: int
) -> Layout:
    """What is pinned, what may come next and what is known of the places behind, anything, and the
    end where there is no more room."""
    free = max(0, min(length, room) - len(pinned))
    row = [*pinned, *[FREE] * free, *[settings.end] * (length - len(pinned) - free)]
    ends = token_mask(settings.eos, 32 * len(settings.text))
    allowed = dict.fromkeys(range(len(pinned), len(pinned) + free), settings.text | ends)
    for place, mask in enumerate(look_ahead(matcher, free, ends), len(pinned)):
        allowed[place] = mask
        tokens = few_tokens_in(mask, max(1, len(settings.eos)))
        if tokens is not None and (len(tokens) == 1 or set(tokens) <= set(settings.eos)):
            row[place] = tokens[0] if len(tokens) == 1 else settings.end
            del allowed[place]
    return Layout(tuple(row), allowed)


@dataclass(frozen=True)
class _Shifted:
    """Noise whose steps are counted from elsewhere."""

    noise: Noise
    shift: int

    def initial_canvas(self, rows: Sequence[int], canvas: int, length: int, vocab: int) -> mx.array:
        return self.noise.initial_canvas(rows, canvas, length, vocab)

    def draw_keys(self, rows: Sequence[int], canvas: int, step: int) -> mx.array:
        return self.noise.draw_keys(rows, canvas, step + self.shift)

    def renoise(
        self, rows: Sequence[int], canvas: int, step: int, length: int, vocab: int
    ) -> mx.array:
        return self.noise.renoise(rows, canvas, step + self.shift, length, vocab)

    def uniform(self, rows: Sequence[int], canvas: int, step: int, length: int) -> mx.array:
        return self.noise.uniform(rows, canvas, step + self.shift, length)

"""Denoising under a grammar: whatever the model drafts, what is committed matches.

A canvas is denoised freely but for its next position, which must continue what is pinned. The draft
is read from left to right: once as much of it as matches is stable and confident, it is pinned, the
first token that does not match is restricted to what may stand there, and the canvas is denoised
on. When the steps of the schedule are used up, every further step pins what it finds. So a token at
least is pinned a round, and it ends. Letters: C canvas, W words of a bit mask.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diffusion.closing import Closer
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import FREE, CanvasConstraint, Layout
from mlx_diffgemma.diffusion.denoise import denoising_step
from mlx_diffgemma.diffusion.events import CanvasCommitted, DenoisingStep
from mlx_diffgemma.diffusion.noise import Noise, StepNoise
from mlx_diffgemma.diffusion.predict import Predictor
from mlx_diffgemma.diffusion.sampler import make_sampler
from mlx_diffgemma.diffusion.schedule import LinearTemperature
from mlx_diffgemma.diffusion.stopping import make_stop_rule
from mlx_diffgemma.errors import NumericalError
from mlx_diffgemma.model.cache import PrefixCache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

_SETTLED = 3  # steps after which a draft that stays the same is taken, however unsure the model is


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
    """One canvas while it is being denoised, a row of its own."""

    def __init__(self, predictor: Predictor, cache: PrefixCache, config: DiffusionConfig,
                 noise: Noise, index: int, length: int, vocab: int) -> None:  # fmt: skip
        self.predictor, self.cache, self.config = predictor, cache, config
        self.noise, self.index, self.shape = noise, index, (length, vocab)
        self.schedule = LinearTemperature(config.t_min, config.t_max, config.max_denoising_steps)
        self.tokens = noise.initial_canvas([0], index, length, vocab)
        self.soft: mx.array | None = None
        self.draft = np.zeros(length, np.int32)
        self.steps = 0
        self.stop = make_stop_rule(config)
        self.seen: list[int] = []
        self.unchanged = 0

    def round(
        self, layout: Layout, reach: Callable[[list[int]], int]
    ) -> Generator[DenoisingStep, None, None]:
        """Steps under `layout` until the first `reach(draft)` positions are done, or do not change
        any more, or the schedule is used up; at least one. Leaves `draft`."""
        constraint = CanvasConstraint.of([layout], self.shape[1])
        sampler = make_sampler(self.config, self.shape[1])
        last = self.config.max_denoising_steps
        self.tokens = constraint.pin(self.tokens)
        for step in range(min(self.steps + 1, last), last + 1):
            # The last step may be repeated, so the draws go by the steps of the canvas.
            noise = StepNoise(
                _Shifted(self.noise, self.steps + 1 - step), [0], self.index, step, *self.shape
            )
            prediction, proposal = denoising_step(
                self.predictor,
                sampler,
                self.tokens,
                self.cache,
                self.soft,
                temperature=self.schedule.at(step),
                noise=noise,
                constraint=constraint,
            )
            self.steps += 1
            self.tokens, self.soft = proposal.canvas, prediction.soft_embeddings
            mx.eval(proposal.draft, prediction.entropy, proposal.accepted)
            mx.async_eval(self.tokens, self.soft)  # while the draft is read here
            entropy = np.array(prediction.entropy)
            if not np.isfinite(entropy).all():
                raise NumericalError(
                    f"canvas {self.index + 1}, step {self.steps}: the model returned NaN or "
                    "infinity; its weights are damaged (check them with --check)."
                )
            draft = np.array(proposal.draft)
            self.draft = draft[0]
            ahead = reach(self.draft.tolist())
            before, self.seen = self.seen, self.draft[:ahead].tolist()
            self.unchanged = self.unchanged + 1 if self.seen == before else 0
            looked_at = np.arange(self.shape[0]) < ahead
            done = self.stop.update(draft, entropy, constraint.open & looked_at)
            yield DenoisingStep(
                canvas_index=self.index,
                step=self.steps,
                max_steps=last,
                temperature=self.schedule.at(step),
                rows=(0,),
                draft=draft,
                canvas=np.array(self.tokens),
                entropy=entropy,
                accepted=np.array(proposal.accepted),
                done=done,
            )
            if done.all() or self.unchanged >= _SETTLED:
                return


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
        pinned, ended = yield from _match_canvas(canvas, matcher, closer, settings, room)
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
    canvas: _Canvas, matcher: Matcher, closer: Closer, settings: MatchingSettings, room: int
) -> Generator[DenoisingStep, None, tuple[list[int], bool]]:
    """Pin the tokens of one canvas; returns them, and whether they end the sequence."""
    length, pinned = canvas.shape[0], list[int]()

    def reach(draft: list[int]) -> int:
        rest = _up_to_eos(draft[len(pinned) :], settings)
        return len(pinned) + matcher.matching(rest) + 1

    while True:
        _pin(matcher, pinned, matcher.forced(), min(length, room))
        if matcher.must_end or len(pinned) == room:
            return pinned, True
        if len(pinned) == length:
            return pinned, False
        yield from canvas.round(_layout(matcher, pinned, settings, length, room), reach)
        ahead = canvas.draft[len(pinned) :].tolist()
        draft = _up_to_eos(ahead, settings)
        end = len(draft) if len(draft) < len(ahead) else None
        kept = closer.affordable(matcher, draft[: matcher.matching(draft)], room - len(pinned))
        if not kept and end != 0:
            # No room is left but for the end: the next token may take it out of reach.
            _pin(matcher, pinned, closer.ending(matcher, room - len(pinned)), length)
            if len(pinned) == length and not matcher.may_end:
                return pinned, False
            return pinned, True
        _pin(matcher, pinned, kept, length)
        if end == len(kept) and matcher.may_end:
            return pinned, True


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
    """What is pinned, what may come next, anything, and the end where there is no more room."""
    free = max(0, min(length, room) - len(pinned))
    tail = length - len(pinned) - free
    anything = settings.text.copy()
    for token in settings.eos:
        anything[token // 32] |= np.uint32(1 << token % 32)
    allowed = dict.fromkeys(range(len(pinned) + 1, len(pinned) + free), anything)
    if free:
        allowed[len(pinned)] = matcher.allowed()
    return Layout((*pinned, *[FREE] * free, *[settings.end] * tail), allowed)


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

"""Denoising under a grammar: whatever the model drafts, what is committed matches.

What the grammar forces is pinned, the position behind it is restricted to what may follow, and so
are those behind that as far as the grammar can tell (`lookahead.py`). The rest is denoised freely.
After each step the draft is read from left to right, as far as it matches, and as much of it is
pinned as stays the same and is certain. Where nothing is certain, the canvas may wait a few steps
while the draft gets surer. When it has waited enough, or gets no surer, the beginning that the
entropy bound accepts is pinned: one token at least, and so many that what matches takes no more
steps than a canvas without a grammar. So the passes over a canvas exceed the tokens that the model
has to choose by no more than the steps that the canvas may wait. Letters: C canvas, W words of a
bit mask.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from mlx_diffgemma.diffusion.canvas import Canvas
from mlx_diffgemma.diffusion.closing import Closer
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import FREE, Layout, token_mask
from mlx_diffgemma.diffusion.denoiser import Denoiser, InFlight, denoise
from mlx_diffgemma.diffusion.events import CanvasCommitted, DenoisingStep
from mlx_diffgemma.diffusion.generate import extend, next_length
from mlx_diffgemma.diffusion.lookahead import few_tokens_in, look_ahead
from mlx_diffgemma.diffusion.noise import Noise
from mlx_diffgemma.errors import DiffGemmaError
from mlx_diffgemma.model.cache import PrefixCache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

_STEPS_A_WAIT = 16  # of a schedule, for every step that a canvas may wait


class BrokenOffError(DiffGemmaError):
    """Writing under a grammar failed on the way; `tokens` had been written by then."""

    def __init__(self, message: str, tokens: list[int]) -> None:
        super().__init__(message)
        self.tokens = tokens


class Matcher(Protocol):
    """Where a grammar stands after some tokens."""

    def matching(self, tokens: Sequence[int]) -> int:
        """How many of the `tokens` (no eos among them), from the first on, may follow."""

    def advance(self, tokens: Sequence[int]) -> None:
        """Take in tokens that may follow."""

    def allowed(self) -> np.ndarray:
        """Mask [W] of the tokens that may follow, every eos among them where it may end."""

    def forced(self) -> list[int]:
        """The tokens that must follow, as far as there is no choice."""

    def signature(self) -> Hashable:
        """What may follow next and what must, as a value that is mostly equal where the grammar
        stands alike."""

    def way_out(self, most: int, *, thorough: bool = False) -> list[int] | None:
        """At most `most` tokens that complete what was taken in, or None where no such tokens are
        found. With `thorough` more work goes into the search."""

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
    """The tokens that end and make up the sequences that a grammar holds.

    Attributes:
        eos: ids that end a sequence.
        end: the eos that fills a canvas behind the end of its sequence.
        text: mask [W] of the tokens that may stand anywhere at all.
    """

    eos: tuple[int, ...]
    end: int
    text: np.ndarray


class _Match:
    """A sequence while it is written under a grammar.

    Attributes:
        tokens: the tokens of the canvases that were committed.
        pinned: the tokens of the present canvas that are decided.
        committed: what is to be reported of canvases that ended.
        waits: for how many more steps the present canvas may wait.
        unsure: mean entropy in nats of what matched of the last draft.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        cache: PrefixCache,
        config: DiffusionConfig,
        noise: Noise,
        matcher: Matcher,
        closer: Closer,
        settings: MatchingSettings,
    ) -> None:
        self.model, self.cache, self.config, self.noise = model, cache, config, noise
        self.matcher, self.closer, self.settings = matcher, closer, settings
        self.tokens: list[int] = []
        self.pinned: list[int] = []
        self.committed: list[CanvasCommitted] = []
        self.waits, self.unsure = 0, np.inf
        self.hurried = False  # whether the present canvas was decided for want of steps

    def next_canvas(self, index: int) -> InFlight | None:
        """The canvas of number `index`, or one behind it where the grammar leaves no choice in that
        canvas; None at the end of the sequence."""
        self.waits, self.unsure = self.config.max_denoising_steps // _STEPS_A_WAIT, np.inf
        self.hurried = False
        length = next_length(self.model, self.config, self._room())
        vocab = self.model.config.text.vocab_size
        canvas = Canvas.start(self.config, self.noise, index, length, vocab, endless=True)
        return self._held(canvas)

    def following(self, _: object, canvas: Canvas) -> InFlight | None:
        """What goes on after a pass: the same canvas with as much of its draft pinned as is ready,
        the next one, or None at the end."""
        matcher, pinned, room = self.matcher, self.pinned, self._room()
        ahead = canvas.draft[len(pinned) :].tolist()
        text = _up_to_eos(ahead, self.settings)
        valid = matcher.matching(text)
        # An eos behind what matches is a choice like any other.
        eos = valid == len(text) < len(ahead)
        ready = self._ready(canvas, max(1, valid + eos))
        if not ready:
            return InFlight(canvas, self.cache.prefix)
        kept = self.closer.affordable(matcher, text[: min(ready, valid)], room)
        ends = eos and ready > valid
        if not kept and not (ends and valid == 0 and matcher.may_end):
            # No room is left but for the end: the next token may take it out of reach.
            _pin(matcher, pinned, self.closer.ending(matcher, room), len(canvas))
            return self._close(canvas, ended=len(pinned) < len(canvas) or matcher.may_end)
        _pin(matcher, pinned, kept, len(canvas))
        if ends and len(kept) == valid and matcher.may_end:
            return self._close(canvas, ended=True)
        return self._held(replace(canvas, accepted=np.zeros(len(canvas), bool)))

    def _held(self, canvas: Canvas) -> InFlight | None:
        """The canvas held to what the grammar forces by now, or what comes after it."""
        matcher, pinned = self.matcher, self.pinned
        room = self._room() + len(pinned)
        _pin(matcher, pinned, matcher.forced(), min(len(canvas), room))
        if matcher.must_end or len(pinned) == room:
            return self._close(canvas, ended=True)
        if len(pinned) == len(canvas):
            return self._close(canvas, ended=False)
        layout = _layout(matcher, pinned, self.settings, len(canvas), room)
        return InFlight(canvas.under(layout), self.cache.prefix)

    def _close(self, canvas: Canvas, *, ended: bool) -> InFlight | None:
        self.committed.append(
            CanvasCommitted(
                0,
                canvas.index,
                tuple(self.pinned),
                canvas.passes,
                converged=not self.hurried,
                finish_reason="stop" if ended else None,
            )
        )
        committed, self.pinned = self.pinned, []
        self.tokens += committed
        if ended:
            return None
        extend(self.model, self.cache, committed)
        return self.next_canvas(canvas.index + 1)

    def _room(self) -> int:
        return self.config.max_tokens - len(self.tokens) - len(self.pinned)

    def _ready(self, canvas: Canvas, count: int) -> int:
        """How many of the `count` tokens drafted behind what is pinned are to be pinned now."""
        start = len(self.pinned)
        entropy = canvas.entropy[start : start + count]
        floor, stability = self.config.confident_after, self.config.stability_threshold
        if floor is not None and canvas.passes >= floor:
            stability = 0
        settled = np.logical_and.accumulate(canvas.unchanged[start : start + count] >= stability)
        mean = np.cumsum(entropy) / np.arange(1, count + 1)
        before, self.unsure = self.unsure, float(mean[-1])
        certain = np.flatnonzero(settled & (mean < self.config.confidence_threshold))
        if len(certain):
            return int(certain[-1]) + 1
        if self.waits and self.unsure < before:
            self.waits -= 1
            return 0
        # The sampler's entropy bound accepts by the same rule tokens that are nearly independent.
        accepted = settled & (np.cumsum(entropy) - entropy <= self.config.entropy_bound)
        # What matches is to be written in the steps that a canvas without a grammar may take.
        due = -(-count // max(1, self.config.max_denoising_steps - canvas.passes))
        most = max(1, int(accepted.sum()))
        self.hurried |= due > most
        return max(due, most)


def generate_matching(
    model: DiffusionGemma,
    denoiser: Denoiser,
    cache: PrefixCache,
    config: DiffusionConfig,
    noise: Noise,
    matcher: Matcher,
    closer: Closer,
    settings: MatchingSettings,
    first_index: int = 0,
) -> Generator[DenoisingStep | CanvasCommitted, None, list[int]]:
    """Continue the prefix in `cache` with tokens that `matcher` takes to a complete end, at most
    `config.max_tokens` of them; returns the tokens.

    `closer` knows how to end from any state, so that the end always stays within reach. The
    canvases are numbered from `first_index` on.

    Raises:
        ClosingError: no output that short is known to match.
        BrokenOffError: the model or the matcher failed on the way.
    """
    closer.require(matcher, config.max_tokens)
    match = _Match(model, cache, config, noise, matcher, closer, settings)
    try:
        first = match.next_canvas(first_index)
        steps = denoise(denoiser, {} if first is None else {0: first}, match.following)
        del first  # a prefix that is to grow is copied where it is still held
        while match.committed:
            yield match.committed.pop(0)
        for stepped in steps:
            yield DenoisingStep(0, stepped[0])
            while match.committed:
                yield match.committed.pop(0)
    except DiffGemmaError as error:
        raise BrokenOffError(str(error), match.tokens + match.pinned) from error
    return match.tokens


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
    """The layout [C] of a canvas: first what is pinned, then what may come next and at the places
    behind that as far as it is known, then places for any text, then the end where there is no more
    room."""
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

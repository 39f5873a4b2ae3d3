"""The denoising step, and the loop over it by which canvases become text.

Letters: C canvas, N positions of all canvases of a step, S positions of a canvas that have
candidates, P positions of all canvases that have candidates, K candidate tokens of one position, U
different candidate tokens of all P positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TypeVar

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diffusion.active_set import settle
from mlx_diffgemma.diffusion.canvas import Canvas, restarted
from mlx_diffgemma.diffusion.predict import Passed, Predict, Predictor
from mlx_diffgemma.diffusion.sampler import probability, propose
from mlx_diffgemma.diffusion.stopping import (
    as_shown,
    brought_on,
    descended,
    has_converged,
    starts_again,
    steps_on,
)
from mlx_diffgemma.errors import NumericalError, not_finite
from mlx_diffgemma.kernels.few_tokens import gathered
from mlx_diffgemma.kernels.vocabulary import Row
from mlx_diffgemma.model.cache import Prefix
from mlx_diffgemma.model.diffusion_gemma import CanvasView, DiffusionGemma

_FEW_LEAVE = 0.01  # probability that the likeliest few tokens may leave out to stand for all
_LOOK_BYTES = 75_000_000  # most bytes of what one look holds in a layer or of the vocabulary
_WORDS = 4096  # words of the vocabulary that a look is taken to hold at a time
_COPIES = 6  # copies of them, of 4 bytes a word

Name = TypeVar("Name")


@dataclass(frozen=True)
class InFlight:
    """A canvas that is being denoised, and the prefix that it continues."""

    canvas: Canvas
    prefix: Prefix


class Denoiser:
    """Runs passes over canvases of any age, each with settings, randomness, layout and prefix of
    its own.

    Args:
        model: the network.
        predict: how a pass is computed; None takes the model's own.
    """

    def __init__(self, model: DiffusionGemma, predict: Predict | None = None) -> None:
        self.model = model
        self._predict: Predict = Predictor(model) if predict is None else predict

    def step(self, canvases: Sequence[Canvas], prefixes: Sequence[Prefix]) -> list[Canvas]:
        """The canvases after one pass over each, in one batch for which the host waits once. A
        canvas becomes the same alone and in any company, to rounding of the products.

        Raises:
            NumericalError: the model returned values that are not finite.
        """
        return self.queue(canvases, prefixes).read()

    def queue(self, canvases: Sequence[Canvas], prefixes: Sequence[Prefix]) -> Queued:
        """Hand a step (see `step`) to the device, without waiting for it."""
        passed = self._predict(canvases, prefixes)
        stepped, read = [], []
        for canvas, found in zip(canvases, passed, strict=True):
            prediction, proposal = found.prediction, propose(found.prediction, canvas)
            stepped.append(
                replace(canvas, tokens=proposal.tokens, soft_embeddings=prediction.soft_embeddings)
            )
            read.append(
                mx.stack([
                    proposal.draft.astype(mx.int32),
                    proposal.accepted.astype(mx.int32),
                    prediction.argmax.astype(mx.int32),
                    prediction.entropy.astype(mx.float32).view(mx.int32),
                    prediction.dropped_mass.astype(mx.float32).view(mx.int32),
                    probability(prediction, proposal).astype(mx.float32).view(mx.int32),
                ])
            )  # fmt: skip
        # One array of all that the host wants to know, so that it reads once.
        wanted = read[0] if len(read) == 1 else mx.concatenate(read, axis=1)
        kept = [[c.tokens, c.soft_embeddings] for c in stepped]
        mx.async_eval(wanted, kept, [each for found in passed for each in found.layers])
        return QueuedStep(tuple(stepped), tuple(passed), wanted, self._not_finite)

    def look(self, canvases: Sequence[Canvas], prefixes: Sequence[Prefix]) -> list[Look]:
        """What the model believes at the sight of canvases as they stand, at temperature 1.

        Raises:
            NumericalError: the model returned values that are not finite.
        """
        looks: list[Look] = []
        for start, stop in self.few_at_a_time(canvases):
            some = canvases[start:stop]
            views = _views(some, prefixes[start:stop])
            rows = [len(canvas) for canvas in some]
            allowed = [{} if c.layout is None else c.layout.masks(c.vocab) for c in some]
            hidden = self.model.decode(views)
            standing = mx.concatenate([view.tokens for view in views])
            asked = [
                Row(length=length, temperature=1.0, allowed=masks, need_soft=False)
                for length, masks in zip(rows, allowed, strict=True)
            ]
            seen = self.model.predict(hidden, asked, standing)
            assert seen.standing_log_probability is not None
            both = np.array(mx.stack([seen.standing_log_probability, seen.entropy]))
            # A token that is not allowed to stand where it stands has no probability at all.
            self._require_finite(np.where(both == -np.inf, 0.0, both), "a look at the canvas")
            looks += [Look(*both[:, start:stop]) for start, stop in _spans(rows)]
        return looks

    def score(
        self,
        canvases: Sequence[Canvas],
        prefixes: Sequence[Prefix],
        places: Sequence[int],
        candidates: Sequence[Sequence[int]],
    ) -> list[np.ndarray]:
        """The log-probability at temperature 1 of each of a canvas's `candidates` at one of its
        positions, [K] in nats for each canvas.

        Raises:
            NumericalError: the model returned values that are not finite.
        """
        found: list[np.ndarray] = []
        for first, last in self.few_at_a_time(canvases):
            some = range(first, last)
            views = _views(canvases[first:last], prefixes[first:last])
            spans = _spans([len(canvases[n]) for n in some])
            at = [start + places[n] for n, (start, _) in zip(some, spans, strict=True)]
            hidden = self.model.decode(views)[mx.array(at)]
            asked = [Row(length=1, temperature=1.0, need_soft=False)] * len(views)
            log_sum = self.model.predict(hidden, asked).log_sum
            ids, _ = gathered([candidates[n] for n in some])
            values = np.array(self.model.logits_of(hidden, mx.array(ids)) - log_sum[:, None])
            self._require_finite(values, "a look at answers")
            found += _columns(values, ids, [candidates[n] for n in some])
        return found

    def weigh(
        self, canvases: Sequence[Canvas], prefixes: Sequence[Prefix]
    ) -> list[list[np.ndarray]]:
        """How the candidates at each free position of canvases compare after one more pass, in one
        batch: for each canvas and each of its S positions the logits [K] of its candidates, at
        temperature 1. No other word of the vocabulary is looked at.

        Raises:
            NumericalError: the model returned values that are not finite.
        """
        few = [None if canvas.layout is None else canvas.layout.few for canvas in canvases]
        candidates = [each for of_canvas in few for each in of_canvas or ()]
        ids, _ = gathered(candidates)
        is_open = np.concatenate([c.layout.open for c in canvases if c.layout is not None])
        hidden = self.model.decode(_views(canvases, prefixes))[mx.array(np.flatnonzero(is_open))]
        values = np.array(self.model.logits_of(hidden, mx.array(ids)))
        self._require_finite(values, "a look at answers")
        rows = iter(_columns(values, ids, candidates))
        return [[next(rows) for _ in of_canvas or ()] for of_canvas in few]

    def _require_finite(self, values: np.ndarray, where: str) -> None:
        if not np.isfinite(values).all():
            raise self._not_finite(where)

    def _not_finite(self, where: str) -> NumericalError:
        float16 = self.model.dtype == mx.float16
        return NumericalError(not_finite(where, float16=float16, adapter=self.model.adapted))

    def few_at_a_time(self, canvases: Sequence[Canvas]) -> Iterator[tuple[int, int]]:
        """Parts of `canvases`, each as (first, last + 1): as many in a row as fit in a fixed budget
        of memory, and one at least."""
        text = self.model.config.text
        widest = text.top_k_experts * (3 * text.moe_intermediate_size + 2 * text.hidden_size)
        layer = widest * self.model.dtype.size
        vocabulary = _COPIES * 4 * min(_WORDS, text.vocab_size)
        most = max(1, _LOOK_BYTES // max(layer, vocabulary))
        start = 0
        while start < len(canvases):
            stop, positions = start + 1, len(canvases[start])
            while stop < len(canvases) and positions + len(canvases[stop]) <= most:
                positions += len(canvases[stop])
                stop += 1
            yield start, stop
            start = stop


@dataclass(frozen=True)
class Look:
    """What the model believes of a canvas as it stands, [C] each, in nats.

    Attributes:
        standing: log-probability of the token that stands at each position; -inf where it may not
            stand there.
        entropy: entropy of the distribution over what may stand at each position.
    """

    standing: np.ndarray
    entropy: np.ndarray


class Queued(ABC):
    """A step that the device is computing, or will."""

    @abstractmethod
    def each(self) -> list[Canvas | NumericalError]:
        """Wait once for the step, and return each canvas after it, or the error of one for which
        the model returned values that are not finite. Such a canvas spoils no other."""

    def read(self) -> list[Canvas]:
        """Wait once for the step, and return the canvases after it.

        Raises:
            NumericalError: the model returned values that are not finite for one of them.
        """
        canvases = []
        for after in self.each():
            if isinstance(after, NumericalError):
                raise after
            canvases.append(after)
        return canvases


@dataclass(frozen=True)
class QueuedStep(Queued):
    """A step that the device is computing.

    Attributes:
        stepped: the canvases, with what the device computes for their next pass.
        passed: what the forward pass brought for each of them.
        wanted: [6, N] int32, what the host reads, as `Denoiser.queue` packs it.
        not_finite: makes the error of a canvas with values that are not finite, which it names.
    """

    stepped: tuple[Canvas, ...]
    passed: tuple[Passed, ...]
    wanted: mx.array
    not_finite: Callable[[str], NumericalError]

    def each(self) -> list[Canvas | NumericalError]:
        wanted = np.array(self.wanted)
        spans = _spans([len(canvas) for canvas in self.stepped])
        found: list[Canvas | NumericalError] = []
        for canvas, passed, (start, stop) in zip(self.stepped, self.passed, spans, strict=True):
            after = _after(canvas, passed, wanted[:, start:stop])
            if np.isfinite(after.entropy).all():
                found.append(after)
            else:
                where = f"canvas {canvas.index + 1}, step {canvas.passes + 1}"
                found.append(self.not_finite(where))
        return found


def denoise(
    denoiser: Denoiser,
    flight: Mapping[Name, InFlight],
    following: Callable[[Name, Canvas], InFlight | None],
    title: Callable[[Name], str] | None = None,
    failed: Callable[[Name, NumericalError], None] | None = None,
) -> Iterator[dict[Name, Canvas]]:
    """Step canvases together until none is in flight; yields the canvases after each step, by name.

    After each step `following` says what is denoised in the place of a canvas, or None. The next
    step is handed to the device before the last one is yielded, so whoever takes time to show it
    costs the device none. A run that is broken off wastes that one step. `title` says what an error
    calls a sequence; None leaves it out. `failed` is told of a canvas for which the model returned
    values that are not finite, and the others go on without it.

    Raises:
        NumericalError: the model returned such values, and there is no `failed` to be told.
    """
    stepped: dict[Name, Canvas] | None = None
    while flight:
        queued = denoiser.queue(
            [each.canvas for each in flight.values()], [each.prefix for each in flight.values()]
        )
        names = list(flight)
        if stepped is not None:
            yield stepped
        # A prefix that is to grow is copied where it is still held, so it is let go of here.
        flight = {}
        stepped = {}
        for name, outcome in zip(names, queued.each(), strict=True):
            if not isinstance(outcome, NumericalError):
                stepped[name] = outcome
                continue
            error = outcome if title is None else type(outcome)(f"{title(name)}, {outcome}")
            if failed is None:
                raise error
            failed(name, error)
        for name, canvas in stepped.items():
            next_one = following(name, canvas)
            if next_one is not None:
                flight[name] = next_one
        next_one = None
    if stepped is not None:
        yield stepped


def until_done(prefix: Prefix) -> Callable[[object, Canvas], InFlight | None]:
    """The `following` of `denoise` for canvases behind one prefix that are denoised until they are
    done."""
    return lambda name, canvas: None if canvas.done else InFlight(canvas, prefix)


def _after(canvas: Canvas, passed: Passed, wanted: np.ndarray) -> Canvas:
    """A canvas after a pass, with what was read of it, [6, C] as `Denoiser.queue` packs it."""
    draft, accepted, argmax = wanted[0], wanted[1].astype(bool), wanted[2]
    entropy, dropped = wanted[3].view(np.float32), wanted[4].view(np.float32)
    likelihood = wanted[5].view(np.float32)
    shown, _ = as_shown(canvas.settings, draft, entropy)
    unchanged = np.where(shown == canvas.shown, canvas.unchanged + 1, 0)
    settled = None
    if canvas.settings.settled_after is not None:
        settled = settle(canvas, passed, argmax, entropy)
    after = replace(
        canvas,
        passes=canvas.passes + 1,
        few_suffice=dropped <= _FEW_LEAVE,
        draft=draft,
        entropy=entropy,
        probability=np.where(np.isnan(likelihood), canvas.probability, likelihood),
        accepted=accepted,
        shown=shown,
        unchanged=unchanged,
        settled=settled,
    )
    after = replace(after, descent=descended(after), moved=brought_on(canvas, after))
    converged = passed.whole and has_converged(after)
    if not converged and starts_again(after):
        return restarted(after)
    after = replace(after, first_step=canvas.first_step + steps_on(canvas, after) - 1)
    done = not canvas.endless and (converged or after.steps_left <= 0)
    return replace(after, converged=converged, done=done)


def _views(canvases: Sequence[Canvas], prefixes: Sequence[Prefix]) -> list[CanvasView]:
    return [
        CanvasView(canvas.tokens, prefix, canvas.soft_embeddings)
        for canvas, prefix in zip(canvases, prefixes, strict=True)
    ]


def _columns(
    values: np.ndarray, ids: np.ndarray, candidates: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """The values [K] of each row's candidates, from values [P, U] for the ascending tokens `ids`
    [U]."""
    return [
        row[np.searchsorted(ids, np.array(each))]
        for row, each in zip(values, candidates, strict=True)
    ]


def _spans(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise(accumulate(lengths, initial=0)))

"""A canvas in flight: a value that can be kept, forked, shown, edited and continued.

Letters: C canvas, D hidden, V vocabulary, H heads of keys and values, Dh dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import FREE, Layout
from mlx_diffgemma.diffusion.noise import Noise
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.model.cache import KeysValues
from mlx_diffgemma.reading import shown


@dataclass(frozen=True)
class Prediction:
    """The model's view of a canvas at a temperature.

    Attributes:
        argmax: [C] int32, the most likely tokens.
        probability: [C] float32, the probability of `argmax`.
        draw: [C] int32, one sample a position.
        entropy: [C] float32, the entropy in nats.
        confidence: [C] float32, the probability of `draw`.
        soft_embeddings: [C, D], the expected embeddings, for the next step; None after the last.
        dropped_mass: [C] float32, the probability that the likeliest few tokens leave out.
    """

    argmax: mx.array
    probability: mx.array
    draw: mx.array
    entropy: mx.array
    confidence: mx.array
    soft_embeddings: mx.array | None
    dropped_mass: mx.array

    def map(self, function: Callable[[mx.array], mx.array]) -> Prediction:
        """The prediction with a function of positions applied to each of its arrays."""
        soft = self.soft_embeddings
        return Prediction(
            function(self.argmax),
            function(self.probability),
            function(self.draw),
            function(self.entropy),
            function(self.confidence),
            None if soft is None else function(soft),
            function(self.dropped_mass),
        )

    def followed_by(self, other: Prediction) -> Prediction:
        """The positions of this prediction, then those of another."""
        mine, theirs = self.soft_embeddings, other.soft_embeddings
        return Prediction(
            mx.concatenate([self.argmax, other.argmax]),
            mx.concatenate([self.probability, other.probability]),
            mx.concatenate([self.draw, other.draw]),
            mx.concatenate([self.entropy, other.entropy]),
            mx.concatenate([self.confidence, other.confidence]),
            None if mine is None or theirs is None else mx.concatenate([mine, theirs]),
            mx.concatenate([self.dropped_mass, other.dropped_mass]),
        )


@dataclass(frozen=True)
class Passed:
    """What one forward pass brought for a canvas.

    Attributes:
        prediction: the prediction of every position; one that the pass did not compute keeps what
            was predicted of it before.
        whole: whether all positions were computed.
        layers: keys and values of the canvas in every layer, [1, H, C, Dh] twice, where
            `settled_after` needs them; empty elsewhere.
    """

    prediction: Prediction
    whole: bool = True
    layers: tuple[KeysValues, ...] = ()


@dataclass(frozen=True)
class Settled:
    """What an experiment remembers of a canvas whose settled positions are computed rarely.

    Attributes:
        passed: the last pass.
        argmax: [C] the tokens that were likeliest in the last pass.
        streak: [C] for how many steps each position has stayed the same and certain.
        since_full: passes since all positions were computed.
    """

    passed: Passed
    argmax: np.ndarray
    streak: np.ndarray
    since_full: int = 0


@dataclass(frozen=True)
class Descent:
    """How far the entropy of a canvas has come down since it was nothing but noise.

    Attributes:
        begun: passes run before that; 0 unless the canvas was put back to noise.
        lowest: nats of entropy after the last pass that brought it on.
        idle: passes since then.
    """

    begun: int = 0
    lowest: float = np.inf
    idle: int = 0


@dataclass(frozen=True)
class Canvas:
    """One sequence's canvas after `passes` forward passes over it.

    Attributes:
        settings: how it is denoised.
        noise: the randomness of its sequence.
        index: which canvas of the sequence it is, from 0.
        vocab: the number V of tokens in the vocabulary.
        tokens: [C] int32, what the next pass starts from: accepted draws and fresh noise.
        first_step: the step of the schedule that its first pass took or will take, from 1, and
            how many steps it leapt over since then, less those that it took before it was put back
            to noise.
        endless: whether the last step of the schedule is repeated until somebody else ends it.
        passes: forward passes run.
        layout: what it must hold; None for anything.
        counted: [C] the positions that decide when it is done, of those that are not fixed; None
            for all.
        soft_embeddings: [C, D], what the last pass expected; None before the first one.
        draft: [C] what would be committed now; `FREE` before the first pass.
        entropy: [C] nats, after the temperature; infinite before the first pass.
        probability: [C] the probability of the draft, after the temperature, in the last pass that
            predicted or drew it; NaN before the first pass.
        accepted: [C] which positions of `tokens` hold a draw of the model.
        few_suffice: [C] where the likeliest few tokens held nearly all of the probability in the
            last pass.
        shown: [C] the draft as the stop rule sees it (see `stopping.py`).
        unchanged: [C] for how many passes each position of `shown` has stayed the same.
        done: whether it needs no further pass.
        converged: whether it is done for another reason than that its steps are used up.
        moved: whether the last pass brought it on; True where no setting asks for it.
        descent: how it came to be as sure as it is; None where it is never put back to noise: it
            did not begin as noise, or has no `restart_after`.
        settled: what is remembered for `settled_after`; None without it.
        checked: [C] the draft that the encoder refused last; None where it refused none.
    """

    settings: DiffusionConfig
    noise: Noise
    index: int
    vocab: int
    tokens: mx.array
    draft: np.ndarray
    entropy: np.ndarray
    probability: np.ndarray
    accepted: np.ndarray
    few_suffice: np.ndarray
    shown: np.ndarray
    unchanged: np.ndarray
    first_step: int = 1
    endless: bool = False
    passes: int = 0
    layout: Layout | None = None
    counted: np.ndarray | None = None
    soft_embeddings: mx.array | None = None
    done: bool = False
    converged: bool = False
    moved: bool = True
    descent: Descent | None = None
    settled: Settled | None = None
    checked: np.ndarray | None = None

    @classmethod
    def start(
        cls,
        settings: DiffusionConfig,
        noise: Noise,
        index: int,
        length: int,
        vocab: int,
        *,
        layout: Layout | None = None,
        initial: Sequence[int] | None = None,
        first_step: int = 1,
        endless: bool = False,
        counted: np.ndarray | None = None,
    ) -> Canvas:
        """A canvas of `length` tokens of noise, or of the `initial` ones. A `first_step` above 1
        enters the schedule late, for a canvas that is partly right already.

        Raises:
            UsageError: the layout or the initial tokens do not fit.
        """
        if initial is None:
            tokens = noise.initial(index, length, vocab)
        else:
            tokens = mx.array(_checked(initial, length, vocab), mx.int32)
        from_noise = initial is None and first_step == 1
        restarts = settings.restart_after is not None and from_noise and not endless
        nothing, no = np.full(length, FREE, np.int32), np.zeros(length, bool)
        canvas = cls(
            settings,
            noise,
            index,
            vocab,
            tokens,
            draft=nothing,
            entropy=np.full(length, np.inf, np.float32),
            probability=np.full(length, np.nan, np.float32),
            accepted=no,
            few_suffice=no,
            shown=nothing,
            unchanged=np.zeros(length, int),
            first_step=first_step,
            endless=endless,
            counted=counted,
            descent=Descent() if restarts else None,
        )
        return canvas if layout is None else canvas.under(layout)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def step(self) -> int:
        """The step of the schedule that the next pass takes, from 1."""
        return self.first_step + self.passes

    @property
    def temperature(self) -> float:
        """The temperature of the next pass."""
        return self.settings.temperature(self.step)

    @property
    def draws(self) -> bool:
        """Whether the next pass draws at random, and does not take the likeliest tokens."""
        settings = self.settings
        late = settings.likeliest_from is not None and self.step >= settings.likeliest_from
        return not settings.draw_likeliest and not late

    @property
    def begun(self) -> int:
        """Passes run before the canvas was put back to noise."""
        return 0 if self.descent is None else self.descent.begun

    @property
    def turn(self) -> int:
        """What the next pass asks the noise for: the number of the step, and others for the steps
        that are taken once more."""
        return self.step + (self.settings.max_denoising_steps if self.begun else 0)

    @property
    def steps_left(self) -> int:
        """Steps of the schedule that are left, and no more than passes are."""
        most = self.settings.max_denoising_steps
        left = most - self.step + 1
        return min(left, most - self.passes) if self.begun else left

    @property
    def is_last_step(self) -> bool:
        """Whether the schedule ends with the next pass."""
        return not self.endless and self.steps_left <= 1

    def under(self, layout: Layout) -> Canvas:
        """A copy of the canvas that is held to another layout from now on.

        Raises:
            UsageError: the layout does not fit the canvas, or allows nothing at a position.
        """
        layout.check(len(self), self.vocab)
        return replace(self, layout=layout, tokens=layout.pin(self.tokens))

    def counts(self) -> np.ndarray:
        """[C] the positions that decide when the canvas is done."""
        counted = np.ones(len(self), bool) if self.counted is None else self.counted
        return counted if self.layout is None else counted & self.layout.open


def warmed(canvas: Canvas, noise: float) -> Canvas:
    """A canvas before its first pass with the share `noise` of its tokens, at random places, put
    back to noise; it enters the schedule at the step that matches."""
    length, source = len(canvas), canvas.noise
    order = mx.argsort(source.uniform(canvas.index, 0, length))
    some = mx.argsort(order) < round(noise * length)
    tokens = mx.where(some, source.initial(canvas.index, length, canvas.vocab), canvas.tokens)
    return replace(
        canvas,
        tokens=tokens if canvas.layout is None else canvas.layout.pin(tokens),
        first_step=canvas.settings.step_at(noise),
    )


def renoised(canvas: Canvas, place: int) -> Canvas:
    """The canvas with the draft in front of position `place`, and from there on fresh noise with
    soft embeddings of zero."""
    known = mx.arange(len(canvas)) < place
    fresh = canvas.noise.renoise(canvas.index, canvas.turn - 1, len(canvas), canvas.vocab)
    tokens = mx.where(known, mx.array(canvas.draft), fresh)
    soft = canvas.soft_embeddings
    return replace(
        canvas,
        tokens=tokens if canvas.layout is None else canvas.layout.pin(tokens),
        soft_embeddings=None if soft is None else mx.where(known[:, None], soft, 0.0),
        settled=None,
    )


def restarted(canvas: Canvas) -> Canvas:
    """The canvas put back to noise, at the first step of the schedule."""
    again = replace(canvas, descent=Descent(begun=canvas.passes), first_step=1 - canvas.passes)
    return replace(renoised(again, 0), unchanged=np.zeros(len(canvas), int))


def _checked(initial: Sequence[int], length: int, vocab: int) -> list[int]:
    if len(initial) != length:
        raise UsageError(
            f"initial_canvas has {len(initial)} tokens, and the canvas has {length}; give as many."
        )
    for place, token in enumerate(initial):
        whole = isinstance(token, (int, np.integer)) and not isinstance(token, bool)
        if not whole or not 0 <= token < vocab:
            raise UsageError(
                f"initial_canvas: token {place} is {shown(token)}; ids go from 0 to {vocab - 1}."
            )
    return list(initial)

"""Canvases that people reach into while they form: pins change between steps, spans are renoised,
every step is kept to go back to, and each place says what else might stand there.

A canvas is a value, so keeping all steps is keeping a list. A run over it is one request of the
engine; changes reach a run that goes on through a list that it looks at between two steps.

Letters: C canvas, W words of a bit mask over the vocabulary.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diffusion.canvas import Canvas
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import FREE, Layout
from mlx_diffgemma.diffusion.encode import encode
from mlx_diffgemma.diffusion.noise import SeededNoise
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.errors import NumericalError, not_finite
from mlx_diffgemma.model.cache import Prefix
from mlx_diffgemma.model.diffusion_gemma import CanvasView
from mlx_diffgemma.server.jobs import Seat
from mlx_diffgemma.server.orders import Order

MOST_KEPT = 32
"""Live canvases that a server keeps; the one that was used least recently goes first."""
MOST_BYTES = 1 << 29
"""Most bytes that the live canvases of a server hold; the newest is kept whatever it holds."""
MOST_STEPS = 256
"""Most steps of one live canvas, all of which are kept."""
ALTERNATIVES = 8
_LOOKS = 2  # canvases of noise that alternatives are averaged over
_AHEAD = 4  # values that a client has not read, from which steps are told later
_SHORTEST = 0.25  # share of the schedule that is run again at least after a change


@dataclass
class Live:
    """One live canvas and all its steps.

    Args:
        config: how the canvas is denoised.
        ids: token ids of the prompt.
        length: positions of the canvas, C.
        seed: what every random draw follows from.
        allowed: by position, the mask [W] of the tokens that it may hold.
        pins: the token that is held at each pinned position.
        initial: token ids [C] to start from instead of noise.
        first_step: the step of the schedule to begin at, for a canvas that is partly right.

    Attributes:
        canvases: the canvas before any step, then after each step or change.
        pinned: the pins of each of `canvases`.
    """

    config: DiffusionConfig
    vocabulary: Vocabulary
    ids: Sequence[int]
    length: int
    seed: int
    allowed: Mapping[int, np.ndarray] = field(default_factory=dict)
    pins: dict[int, int] = field(default_factory=dict)
    initial: Sequence[int] | None = None
    first_step: int = 1
    name: str = field(default_factory=lambda: secrets.token_urlsafe(9))
    canvases: list[Canvas] = field(default_factory=list)
    pinned: list[dict[int, int]] = field(default_factory=list)
    _forks: int = 0
    _run: int = 0
    _running: bool = False
    _orders: list[Order] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.Lock)
    _prefix: Prefix | None = None

    # What handlers call.

    def offer(self, order: Order) -> int | None:
        """Hand in an order. Returns None where a run goes on that will see it, else the number of
        the run that the caller is to begin."""
        with self._lock:
            self._orders.append(order)
            if self._running:
                return None
            self._running = True
            self._run += 1
            return self._run

    def end(self, run: int) -> None:
        """Note that a run is over, however it ended."""
        with self._lock:
            if run == self._run:
                self._running = False
                self._orders.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that its steps and its prefix hold."""
        soft = [canvas.soft_embeddings for canvas in list(self.canvases)]
        steps = sum(each.nbytes for each in soft if each is not None)
        return steps + (0 if self._prefix is None else self._prefix.nbytes)

    # What runs on the engine's thread.

    def run(self, seat: Seat, run: int, known: set[int]) -> Iterator[dict[str, Any]]:
        """Step the canvas until it is done and no order is left; yields what the page is told (see
        `told`). `known` holds the tokens whose spelling the page has, and takes in new ones."""
        started = time.perf_counter()
        if self._prefix is None:
            for progress in encode(seat.model, seat.cache, self.ids):
                yield {"prefill": progress.done, "of": progress.total}
            self._prefix = seat.cache.prefix
        if not self.canvases:
            self._start()
            yield self.told(0, known)
        left: int | None = None
        late: list[int] = []
        while True:
            for order in self._taken(run):
                left = order.steps
                at = self._obey(order)
                if order.step is not None:
                    yield {"back": at}
                if order.changes:
                    yield self.told(len(self.canvases) - 1, known)
            canvas = self.canvases[-1]
            if canvas.done or left == 0 or len(self.canvases) > MOST_STEPS:
                if self._over(run):
                    break
                continue
            queued = seat.denoiser.queue([canvas], [self._prefix])
            (canvas,) = queued.read()
            self._keep(canvas)
            left = None if left is None else left - 1
            at = len(self.canvases) - 1
            if seat.backlog > _AHEAD and not canvas.done:
                late.append(at)
            else:
                yield self.told(at, known)
        yield from (self.told(at, known) | {"late": True} for at in late)
        yield {
            "end": len(self.canvases) - 1,
            "done": canvas.done,
            "converged": canvas.converged,
            "full": len(self.canvases) > MOST_STEPS,
            "seconds": round(time.perf_counter() - started, 3),
        }

    def told(self, at: int, known: set[int]) -> dict[str, Any]:
        """A step as the page gets it: `ids` [C] what stands there, `nats` [C] its uncertainty in
        hundredths (-1 where there is none yet), `pins` the positions that are held, `step` of
        `total` of the schedule, and `words`, the spelling of tokens that are new to the page."""
        canvas = self.canvases[at]
        ids = _shown(canvas)
        nats = np.where(np.isfinite(canvas.entropy), canvas.entropy * 100, -1.0)
        fresh = sorted(set(ids.tolist()) - known)
        known.update(fresh)
        return {
            "at": at,
            "ids": ids.tolist(),
            "nats": np.rint(nats).astype(int).tolist(),
            "pins": sorted(self.pinned[at]),
            "step": canvas.step - 1,
            "total": canvas.settings.max_denoising_steps,
            "done": canvas.done,
            "words": {str(token): self.word(token) for token in fresh},
        }

    def word(self, token: int) -> str | list[str]:
        """How a token is spelt; in a list where it is no text."""
        piece = self.vocabulary.pieces[token]
        if not piece:
            return ["end" if token in self.vocabulary.eos else f"token {token}"]
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return ["".join(f"{byte:02X}" for byte in piece)]

    def alternatives(self, seat: Seat, at: int, place: int) -> list[dict[str, Any]]:
        """The likeliest tokens at a place, given all else as it stands at step `at`. The
        temperature is 1, the place itself holds noise, and the probabilities are averaged over
        several draws.

        Raises:
            NumericalError: the model gives values that are not finite.
        """
        if self._prefix is None:
            return []
        # A run may have gone back behind it since it was asked for.
        canvas = self.canvases[min(at, len(self.canvases) - 1)]
        rng = np.random.default_rng([self.seed, at, place])
        views = []
        soft = canvas.soft_embeddings
        if soft is not None:
            soft = soft * mx.array(np.arange(self.length) != place)[:, None].astype(soft.dtype)
        for _ in range(_LOOKS):
            tokens = _shown(canvas)
            tokens[place] = rng.integers(self.vocabulary.size)
            views.append(CanvasView(mx.array(tokens), self._prefix, soft))
        hidden = seat.model.decode(views)
        rows = mx.array([place + self.length * number for number in range(_LOOKS)])
        logits = np.array(seat.model.logits(hidden[rows]).astype(mx.float32), np.float64)
        if not np.isfinite(logits).all():
            raise NumericalError(not_finite("a look at alternatives", float16=False, adapter=False))
        mask = self.allowed.get(place)
        if mask is not None:
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: logits.shape[-1]]
            logits = np.where(bits.astype(bool), logits, -np.inf)
        chances = np.exp(logits - logits.max(-1, keepdims=True))
        chances = (chances / chances.sum(-1, keepdims=True)).mean(0)
        best = np.argsort(-chances, kind="stable")[:ALTERNATIVES].tolist()
        return [
            {
                "token": token,
                "word": self.word(token),
                "probability": round(float(chances[token]), 6),
            }
            for token in best
            if chances[token] > 0
        ]

    def _start(self) -> None:
        canvas = Canvas.start(
            self.config,
            SeededNoise(self.seed),
            0,
            self.length,
            self.vocabulary.size,
            layout=self._layout(),
            initial=self.initial,
            first_step=self.first_step,
        )
        self._keep(canvas)

    def _keep(self, canvas: Canvas) -> None:
        self.canvases.append(canvas)
        self.pinned.append(dict(self.pins))

    def _taken(self, run: int) -> list[Order]:
        """The orders that wait for a run; those that wait for a later run are left to it."""
        with self._lock:
            if run != self._run:
                return []
            taken, self._orders = self._orders, []
        return taken

    def _over(self, run: int) -> bool:
        """Whether no order waits for a run; if so, it is marked as over."""
        with self._lock:
            if run != self._run:
                return True
            if self._orders:
                return False
            self._running = False
            return True

    def _obey(self, order: Order) -> int:
        """Go back to an order's step and make its changes. Returns the number of that step."""
        at = len(self.canvases) - 1
        if order.step is not None:
            at = min(order.step, at)
            if at < len(self.canvases) - 1:
                self._forks += 1  # else the same noise would lead to the same end
            del self.canvases[at + 1 :], self.pinned[at + 1 :]
            self.pins = dict(self.pinned[at])
            noise = SeededNoise(self.seed, self._forks)
            self.canvases[at] = replace(self.canvases[at], noise=noise)
        if order.changes:
            self._keep(self._changed(self.canvases[at], order))
        return at

    def _changed(self, canvas: Canvas, order: Order) -> Canvas:
        """The canvas with an order's changes, at an earlier step of its schedule."""
        self._forks += 1
        rng = np.random.default_rng([self.seed, self._forks])
        noised = np.zeros(self.length, bool)
        strengths = [_SHORTEST]
        for change in order.changes:
            places = list(change.places)
            if change.kind == "pin":
                self.pins.update(zip(places, change.tokens, strict=True))
            elif change.kind == "free":
                for place in places:
                    self.pins.pop(place, None)
                noised[places] = True
            else:
                noised[places] |= rng.random(len(places)) < change.strength
                strengths.append(change.strength)
        if canvas.done and order.strength and any(c.kind != "renoise" for c in order.changes):
            noised |= rng.random(self.length) < order.strength
            strengths.append(order.strength)
        layout = self._layout()
        noised &= layout.open
        fresh = rng.integers(self.vocabulary.size, size=self.length)
        # A finished canvas goes on from its draft, another one from the tokens of its next pass.
        standing = _shown(canvas) if canvas.done else np.array(canvas.tokens)
        soft = canvas.soft_embeddings
        if soft is not None:
            soft = soft * mx.array(~noised)[:, None].astype(soft.dtype)
        total = canvas.settings.max_denoising_steps
        first = total - math.ceil(max(strengths) * total) + 1
        tokens = mx.array(np.where(noised, fresh, standing).astype(np.int32))
        nothing = np.full(self.length, FREE, np.int32)
        return replace(
            canvas,
            noise=SeededNoise(self.seed, self._forks),
            layout=layout,
            tokens=layout.pin(tokens),
            soft_embeddings=soft,
            draft=np.where(layout.open, np.where(noised, FREE, canvas.draft), layout.fixed),
            entropy=np.where(
                layout.open, np.where(noised, np.inf, canvas.entropy), 0.0
            ).astype(np.float32),
            shown=nothing,
            unchanged=np.zeros(self.length, int),
            first_step=min(canvas.step, first),
            passes=0,
            done=False,
            converged=False,
            descent=None,
            settled=None,
        )  # fmt: skip

    def _layout(self) -> Layout:
        tokens = [self.pins.get(place, FREE) for place in range(self.length)]
        return Layout(tuple(tokens), {p: m for p, m in self.allowed.items() if tokens[p] == FREE})


class LiveCanvases:
    """The live canvases of a server by their names, used from its event loop alone."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Live] = OrderedDict()

    def keep(self, live: Live) -> None:
        """Keep one more, in the place of the least recently used where there are too many."""
        self._kept[live.name] = live
        self._trim()

    def _trim(self) -> None:
        total = sum(each.nbytes for each in self._kept.values())
        while len(self._kept) > 1 and (len(self._kept) > MOST_KEPT or total > MOST_BYTES):
            _, oldest = self._kept.popitem(last=False)
            total -= oldest.nbytes

    def get(self, name: str) -> Live | None:
        """The canvas of this name, if it is still kept."""
        live = self._kept.get(name)
        if live is not None:
            self._kept.move_to_end(name)
            self._trim()  # canvases grow while they are kept
        return live


def _shown(canvas: Canvas) -> np.ndarray:
    """[C] what stands at each position: the draft, or the noise where there is none yet."""
    if (canvas.draft != FREE).all():
        return np.array(canvas.draft)
    return np.where(canvas.draft == FREE, np.array(canvas.tokens), canvas.draft)

"""Rank 0's model: the drivers use it as any model, and it has the followers compute with it.

Each method that computes first sends an order, and then computes rank 0's own share; the followers
run the same method on theirs. All decisions are taken on rank 0, so nothing else of the program is
on several Macs.
"""

from __future__ import annotations

import signal
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_diffgemma.distributed import forms
from mlx_diffgemma.distributed.exchange import Exchange
from mlx_diffgemma.distributed.line import LOST, RanksError
from mlx_diffgemma.distributed.orders import Order, told_masks, told_pictures, told_prefix, told_row
from mlx_diffgemma.distributed.shares import Share
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.kernels.rows import Row, VocabularyResult
from mlx_diffgemma.model.cache import KeysValues, Origin, Prefix
from mlx_diffgemma.model.diffusion_gemma import CanvasView, DiffusionGemma, require_encodable
from mlx_diffgemma.pictured import PictureSpan


class Sends(Protocol):
    """What carries orders to all followers."""

    def send(self, order: Mapping[str, Any]) -> None: ...


class OutOfStepError(RanksError):
    """A pass over several Macs broke off in the middle, so that they are no longer in step."""


def lead(model: DiffusionGemma, share: Share, exchange: Exchange, leader: Sends) -> DiffusionGemma:
    """Make the model of rank 0's share one that leads those of the other ranks, which `follow`.
    It is changed and returned."""
    forms.use(model, share, exchange)
    form = LeadingWords if share.cuts_words else LeadingModel
    forms.put(model, form, leading=Leading(exchange, leader))
    return model


class Kept(tuple[KeysValues, ...]):
    """The keys and values of a canvas in every layer, and what the followers call theirs."""

    origin: Origin


class Leading:
    """How rank 0 tells the followers what to do, and which of what they hold is needed no more.

    Attributes:
        exchange: the collectives of the ranks.
        is_broken: whether an order was broken off by an error, so that the ranks are out of step.
    """

    def __init__(self, exchange: Exchange, leader: Sends) -> None:
        self.exchange, self._leader = exchange, leader
        self._numbers = count()
        self._dead: deque[int] = deque()
        self._last: mx.array | None = None
        self.is_broken = False

    @contextmanager
    def ordered(self, order: Order) -> Iterator[None]:
        """Send an order, and inside compute rank 0's share of it, which Ctrl-C does not break off:
        the followers would wait for ever.

        Raises:
            OutOfStepError: an earlier order was broken off by an error.
        """
        if self.is_broken:
            raise OutOfStepError(
                "a pass over several Macs was broken off; start all of them anew.", LOST
            )
        dead = [self._dead.popleft() for _ in range(len(self._dead))]
        with _interrupted_afterwards():
            self.is_broken = True
            self._leader.send({**order, "dead": dead} if dead else order)
            yield
            mx.async_eval(self.exchange.pending())
            self.is_broken = False

    def origin(self) -> Origin:
        """The name of something that the followers keep until rank 0 has no more use for it."""
        origin = Origin(next(self._numbers))
        weakref.finalize(origin, self._dead.append, origin.number).atexit = False
        return origin

    def remember(self, hidden: mx.array) -> mx.array:
        """Hidden states that all ranks have, which need not be given to the followers again."""
        self._last = hidden
        return hidden

    def told_hidden(self, hidden: mx.array) -> list[int] | None:
        """The shape of hidden states that are to be given; None for those that all have."""
        return None if hidden is self._last else list(hidden.shape)

    def given(self, x: mx.array, shape: list[int] | None) -> mx.array:
        """Hidden states, which the followers have after this."""
        return x if shape is None else self.exchange.from_leader(x)


class LeadingModel(DiffusionGemma):
    """A model of rank 0's share that has the followers run their own."""

    leading: Leading

    def encode(
        self,
        ids: Sequence[Sequence[int]],
        prefixes: Sequence[Prefix],
        pictures: Sequence[Mapping[PictureSpan, mx.array]] = (),
    ) -> tuple[mx.array, tuple[Prefix, ...]]:
        require_encodable(ids, prefixes, pictures)
        _require_shared(prefixes)
        origins = [self.leading.origin() for _ in ids]
        order: Order = {
            "do": "encode",
            "ids": [list(map(int, row)) for row in ids],
            "prefixes": [told_prefix(prefix) for prefix in prefixes],
            "pictures": told_pictures(pictures),
            "keep": [origin.number for origin in origins],
        }
        with self.leading.ordered(order):
            seen = [array.astype(self.dtype) for row in pictures for array in row.values()]
            if seen:
                given = self.leading.exchange.from_leader(mx.concatenate(seen))
                pictures = dealt_out([list(row) for row in pictures], given)
            hidden, longer = super().encode(ids, prefixes, pictures)
        named = (replace(one, origin=own) for one, own in zip(longer, origins, strict=True))
        return self.leading.remember(hidden), tuple(named)

    def decode_keeping(
        self, canvases: Sequence[CanvasView]
    ) -> tuple[mx.array, tuple[tuple[KeysValues, ...], ...]]:
        _require_shared([canvas.prefix for canvas in canvases])
        origins = [self.leading.origin() for _ in canvases]
        order: Order = {
            "do": "decode",
            "canvases": [_told_canvas(canvas) for canvas in canvases],
            "keep": [origin.number for origin in origins],
        }
        with self.leading.ordered(order):
            exchange = self.leading.exchange
            exchange.from_leader(
                mx.concatenate([_at_places(c, c.tokens).astype(mx.int32) for c in canvases])
            )
            soft = [
                _at_places(canvas, canvas.soft_embeddings).astype(self.dtype)
                for canvas in canvases
                if canvas.soft_embeddings is not None
            ]
            if soft:
                exchange.from_leader(mx.concatenate(soft))
            hidden, layers = super().decode_keeping(canvases)
        kept = []
        for own, origin in zip(layers, origins, strict=True):
            named = Kept(own)
            named.origin = origin
            kept.append(named)
        return self.leading.remember(hidden), tuple(kept)


class LeadingWords(LeadingModel):
    """A leading model whose words are dealt out too."""

    def predict(
        self, hidden: mx.array, rows: Sequence[Row], standing: mx.array | None = None
    ) -> VocabularyResult:
        shape = self.leading.told_hidden(hidden)
        which, masks = told_masks(rows)
        order: Order = {
            "do": "predict",
            "hidden": shape,
            "rows": [told_row(row) for row in rows],
            "masks": which,
            "sets": len(masks),
            "standing": standing is not None,
        }
        numbers = [row.key.view(mx.int32) for row in rows if row.key is not None]
        if standing is not None:
            numbers.append(standing.astype(mx.int32))
        numbers += [mx.array(mask.astype(np.uint32).view(np.int32)) for mask in masks]
        with self.leading.ordered(order):
            hidden = self.leading.given(hidden, shape)
            if numbers:
                self.leading.exchange.from_leader(mx.concatenate(numbers))
            return super().predict(hidden, rows, standing)

    def logits_of(self, hidden: mx.array, ids: mx.array) -> mx.array:
        shape = self.leading.told_hidden(hidden)
        order: Order = {"do": "logits_of", "hidden": shape, "ids": ids.shape[0]}
        with self.leading.ordered(order):
            hidden = self.leading.given(hidden, shape)
            ids = self.leading.exchange.from_leader(ids.astype(mx.int32))
            return super().logits_of(hidden, ids)

    def logits(self, hidden: mx.array) -> mx.array:
        shape = self.leading.told_hidden(hidden)
        with self.leading.ordered({"do": "logits", "hidden": shape}):
            return super().logits(self.leading.given(hidden, shape))


def dealt_out(
    spans: Sequence[Sequence[PictureSpan]], embeddings: mx.array
) -> list[dict[PictureSpan, mx.array]]:
    """The embeddings of all pictures, one behind the other, as each sequence's own."""
    done, rows = 0, []
    for row in spans:
        own = {}
        for span in row:
            own[span] = embeddings[done : done + len(span)]
            done += len(span)
        rows.append(own)
    return rows


def _told_canvas(canvas: CanvasView) -> Order:
    layers = canvas.layers
    return {
        "prefix": told_prefix(canvas.prefix),
        "length": canvas.tokens.shape[0],
        "soft": canvas.soft_embeddings is not None,
        "places": None if canvas.places is None else canvas.places.tolist(),
        "layers": layers.origin.number if isinstance(layers, Kept) else None,
    }


def _at_places(canvas: CanvasView, values: mx.array) -> mx.array:
    """Of values [C, ...], those at the positions that are computed."""
    return values if canvas.places is None else values[mx.array(canvas.places)]


def _require_shared(prefixes: Sequence[Prefix]) -> None:
    """Raise UsageError where a prefix that is not empty is one of this process alone."""
    if any(len(prefix) and prefix.origin is None for prefix in prefixes):
        raise UsageError(
            "this prefix was not encoded by all the Macs that hold the model; encode it again."
        )


@contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """Inside, Ctrl-C is held back; it takes effect behind it."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield  # Python interrupts the main thread alone
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)

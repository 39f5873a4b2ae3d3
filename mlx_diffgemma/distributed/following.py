"""A follower: it runs on its share of the model what rank 0 orders, and keeps its part of every
prefix that rank 0 may come back to.

What a pass returns is not looked at here: rank 0 has the same, and decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.distributed import forms
from mlx_diffgemma.distributed.exchange import Exchange
from mlx_diffgemma.distributed.leading import dealt_out
from mlx_diffgemma.distributed.orders import Order, found_prefix, found_row
from mlx_diffgemma.distributed.shares import Share
from mlx_diffgemma.kernels.allowed_tokens import WORD
from mlx_diffgemma.model.cache import KeysValues, LayerPrefix, Prefix
from mlx_diffgemma.model.diffusion_gemma import CanvasView, DiffusionGemma
from mlx_diffgemma.pictured import PictureSpan


def follow(
    model: DiffusionGemma, share: Share, exchange: Exchange, orders: Iterable[Mapping[str, Any]]
) -> None:
    """Run the orders of rank 0 on the model of a follower's share until they end. The model is
    changed."""
    follower = Following(model, share, exchange)
    for order in orders:
        follower.run(order)


class Following:
    """What a follower holds from one order to the next.

    Args:
        model: the model of its share, which is changed.
        share: what it holds of the whole.
        exchange: the collectives of the ranks.

    Attributes:
        prefixes: its parts of prefixes, by their origins.
        layers: the keys and values of canvases in every layer, by theirs.
    """

    def __init__(self, model: DiffusionGemma, share: Share, exchange: Exchange) -> None:
        forms.use(model, share, exchange)
        self.model, self.exchange = model, exchange
        self.prefixes: dict[int, Prefix] = {}
        self.layers: dict[int, tuple[KeysValues, ...]] = {}
        self._hidden: mx.array | None = None
        self._does = {
            "encode": self._encode,
            "decode": self._decode,
            "predict": self._predict,
            "logits_of": self._logits_of,
            "logits": self._logits,
        }

    def run(self, order: Mapping[str, Any]) -> None:
        """Do what rank 0 orders, and forget what it needs no more."""
        for number in order.get("dead", ()):
            self.prefixes.pop(number, None)
            self.layers.pop(number, None)
        self._does[order["do"]](dict(order))

    def _encode(self, order: Order) -> None:
        spans = [[PictureSpan(*span) for span in row] for row in order["pictures"]]
        count = sum(len(span) for row in spans for span in row)
        pictures = dealt_out(spans, self._given(count, self._width)) if count else ()
        told, keep = order["prefixes"], order["keep"]
        self._hidden, longer = self.model.encode(
            order["ids"], [self._prefix(each) for each in told], pictures
        )
        for before, number, after in zip(told, keep, longer, strict=True):
            self.prefixes[number] = after
            self._share_buffers(before, after)
        arrays = [array for prefix in longer for array in prefix.arrays()]
        del longer, after
        mx.eval(self.exchange.pending(), arrays)
        mx.clear_cache()

    def _share_buffers(self, told: Order, longer: Prefix) -> None:
        """Let the prefix that has grown into `longer` look at the buffers of that one, as far as
        its own are the beginning of them. So they can be written where they are."""
        held = self.prefixes.get(told["origin"])
        if held is None or len(held) != told["length"]:
            return
        layers = tuple(
            LayerPrefix(None, own.length, new.keys, new.values) if own.window is None else own
            for own, new in zip(held.layers, longer.layers, strict=True)
        )
        self.prefixes[told["origin"]] = replace(held, layers=layers)

    def _decode(self, order: Order) -> None:
        canvases = order["canvases"]
        counts = [
            canvas["length"] if canvas["places"] is None else len(canvas["places"])
            for canvas in canvases
        ]
        tokens = self._given(sum(counts), dtype=mx.int32)
        with_soft = sum(n for n, canvas in zip(counts, canvases, strict=True) if canvas["soft"])
        soft = self._given(with_soft, self._width) if with_soft else None
        views, token, place = [], 0, 0
        for told, n in zip(canvases, counts, strict=True):
            own = None
            if told["soft"] and soft is not None:
                own, place = soft[place : place + n], place + n
            views.append(self._view(told, tokens[token : token + n], own))
            token += n
        self._hidden, layers = self.model.decode_keeping(views)
        self.layers.update(zip(order["keep"], layers, strict=True))
        kept = [array for canvas in layers for pair in canvas for array in pair]
        mx.async_eval(self.exchange.pending(), kept)

    def _view(self, told: Order, tokens: mx.array, soft: mx.array | None) -> CanvasView:
        places = told["places"]
        if places is not None:
            places = np.array(places)
            tokens = _spread(tokens, places, told["length"])
            soft = None if soft is None else _spread(soft, places, told["length"])
        layers = () if told["layers"] is None else self.layers[told["layers"]]
        return CanvasView(tokens, self._prefix(told["prefix"]), soft, places, layers)

    def _predict(self, order: Order) -> None:
        hidden = self._states(order)
        rows = [found_row(told) for told in order["rows"]]
        vocab = self.model.config.text.vocab_size
        drawing = [told["draws"] for told in order["rows"]]
        count = hidden.shape[0] if order["standing"] else 0
        words = -(-vocab // WORD)
        total = 2 * sum(drawing) + count + order["sets"] * words
        numbers = self._given(total, dtype=mx.int32) if total else mx.zeros((0,), mx.int32)
        keys = iter(numbers[: 2 * sum(drawing)].view(mx.uint32).reshape(-1, 2))
        rows = [
            replace(row, key=next(keys)) if draws else row
            for row, draws in zip(rows, drawing, strict=True)
        ]
        rest = numbers[2 * sum(drawing) :]
        standing = rest[:count] if order["standing"] else None
        if order["sets"]:
            masks = list(np.array(rest[count:]).view(np.uint32).reshape(-1, words))
            rows = [
                replace(row, allowed={place: masks[number] for place, number in which})
                for row, which in zip(rows, order["masks"], strict=True)
            ]
        self.model.predict(hidden, rows, standing)
        mx.eval(self.exchange.pending())

    def _logits_of(self, order: Order) -> None:
        hidden = self._states(order)
        self.model.logits_of(hidden, self._given(order["ids"], dtype=mx.int32))
        mx.eval(self.exchange.pending())

    def _logits(self, order: Order) -> None:
        self.model.logits(self._states(order))
        mx.eval(self.exchange.pending())

    @property
    def _width(self) -> int:
        return self.model.config.text.hidden_size

    def _prefix(self, told: Order) -> Prefix:
        return found_prefix(told, self.prefixes, self.model.empty_prefix())

    def _states(self, order: Order) -> mx.array:
        if order["hidden"] is not None:
            return self._given(*order["hidden"])
        assert self._hidden is not None, "rank 0 speaks of hidden states that it has computed"
        return self._hidden

    def _given(self, *shape: int, dtype: mx.Dtype | None = None) -> mx.array:
        """What rank 0 gives, of a shape and a type."""
        return self.exchange.from_leader(mx.zeros(shape, dtype or self.model.dtype))


def _spread(values: mx.array, places: np.ndarray, length: int) -> mx.array:
    """Values [A, ...] at `places` [A] of `length` positions, and zeros at the others."""
    spread = mx.zeros((length, *values.shape[1:]), values.dtype)
    return spread.at[mx.array(places)].add(values)

"""What somebody does to a live canvas, and how a request of the page spells it."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal

from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.server.fields import Fields


@dataclass(frozen=True)
class Change:
    """What somebody does to a canvas.

    Attributes:
        kind: "pin" sets `tokens` from the first of the `places` on and holds them, "free" lets
            places go and noises them, "renoise" replaces a share of places that are not pinned.
        places: positions, ascending.
        tokens: tokens to pin, one for each place; empty for other kinds.
        strength: share of the places that "renoise" replaces, from 0 to 1.
    """

    kind: Literal["pin", "free", "renoise"]
    places: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    strength: float = 1.0


@dataclass(frozen=True)
class Order:
    """What is to become of a live canvas.

    Attributes:
        changes: changes in the order in which they are made.
        step: number of the step to go back to first; None goes on from the last.
        strength: share of what is neither pinned nor changed that is noised where the canvas was
            done.
        steps: most steps to run; None runs until it is done.
    """

    changes: tuple[Change, ...] = ()
    step: int | None = None
    strength: float = 0.0
    steps: int | None = None


def read_order(fields: Fields, vocabulary: Vocabulary, length: int, tokenizing: Lock) -> Order:
    """The order that a request spells out for a canvas of `length` positions. `tokenizing` is held
    while its texts become tokens.

    Raises:
        RefusedError, UsageError: the request is malformed, or a change does not fit the canvas.
    """
    changes = []
    for each in fields.objects("changes"):
        kind: Any = each.choice("kind", ("pin", "free", "renoise"), required=True)
        first = each.integer("place", 0, required=True) or 0
        tokens: list[int] = []
        count = (each.integer("count", 1) or 1) if kind != "pin" else 0
        if kind == "pin":
            text, token = each.text("text"), each.integer("token", 0)
            if text:
                with tokenizing:
                    tokens = vocabulary.encode(text)
            elif token is not None:
                tokens = [token]
            if not tokens or tokens[-1] >= vocabulary.size:
                raise each.refused("text", "must be some text, or token one that there is.")
            if text and vocabulary.decode(tokens) != text:
                raise each.refused("text", "has characters that this model cannot write.")
            count = len(tokens)
        strength = each.number("strength", 0.0)
        places = tuple(range(first, min(first + count, length + 1)))
        change = Change(kind, places, tuple(tokens), 1.0 if strength is None else strength)
        changes.append(_checked(change, length))
    strength = fields.number("strength", 0.0)
    order = Order(
        tuple(changes),
        fields.integer("at", 0),
        min(1.0, strength or 0.0),
        fields.integer("run", 0),
    )
    fields.settle({})
    return order


def _checked(change: Change, length: int) -> Change:
    """The change, if it fits a canvas of `length` positions.

    Raises:
        UsageError: a place lies outside the canvas, or the strength is not from 0 to 1.
    """
    if not change.places or change.places[0] < 0 or change.places[-1] >= length:
        raise UsageError(f"the change lies outside the canvas, whose places go to {length - 1}.")
    if not 0 <= change.strength <= 1:
        raise UsageError(f"strength must be from 0 to 1, not {change.strength:g}.")
    return change

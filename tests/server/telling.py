"""Answers that say what they are told, in the place of those of a model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from mlx_diffgemma.server.asking import Asked, Call, Ended, Piece, Started, Text, Thought


class Told:
    """Takes the place of `asking.answer`: says what it is told, and keeps what it was asked.

    Attributes:
        pieces: what is said between the first and the last piece of an answer.
        end: fields of the last piece.
        error: what is raised in the place of the last piece.
        asked: every request.
        closed: answers that were closed, to their end or before.
    """

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.end: dict[str, Any] = {}
        self.error: Exception | None = None
        self.asked: list[Asked] = []
        self.closed = 0

    def say(self, *pieces: Piece, error: Exception | None = None, **end: Any) -> None:
        self.pieces, self.error, self.end = list(pieces), error, end

    async def answer(self, engine: Any, asked: Asked) -> AsyncIterator[Piece]:
        self.asked.append(asked)
        last = Ended(0, "stop", 12, 5, completion_tokens=9)
        try:
            if self.pieces or self.error is None:
                yield Started(0, 12, 5)
            for piece in self.pieces:
                yield piece
            if self.error is not None:
                raise self.error
            yield replace(last, **self.end)
        finally:
            self.closed += 1

    async def count_tokens(self, engine: Any, asked: Asked) -> int:
        self.asked.append(asked)
        return 12


def text(said: str) -> Text:
    return Text(0, said)


def thought(said: str) -> Thought:
    return Thought(0, said)


def call(name: str, number: int = 0, **arguments: Any) -> Call:
    return Call(0, number, f"call_{number}", name, arguments)

"""A server in a thread, for clients as they are; and answers that say what they are told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import uvicorn

from mlx_diffgemma.server.pieces import Asked, Call, Ended, Piece, Started, Text, Thought


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The URL under which `app` answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive()


def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait until something holds, and fail where it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.005)


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

    async def answer(self, engine: Any, *asked: Asked) -> AsyncIterator[Piece]:
        self.asked += asked
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

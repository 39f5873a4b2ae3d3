"""A server in a thread of the tests, and raw connections to it.

Run as a program, this is a server with the protocol `Echo`, for tests that send it signals.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.server import lifecycle
from mlx_diffgemma.server.app import Server, create_app
from mlx_diffgemma.server.config import ServerSettings
from mlx_diffgemma.server.jobs import Counters
from mlx_diffgemma.server.streams import json_lines, read_json, sse


class FakeEngine:
    """An engine without a model: what the server itself asks of one."""

    def __init__(self) -> None:
        self.name, self.context, self.alive = "fake", 128, True
        self.counters = Counters()
        self.stopped: list[float] = []

    def stop(self, seconds: float) -> None:
        self.stopped.append(seconds)


class Echo:
    """A protocol for tests: `POST /echo` says what it was asked, as its `as` says, after `wait`
    seconds.

    Attributes:
        begun, ended: how many answers were begun, and how many of these ended by themselves.
        closed: how many were closed, however they ended.
    """

    def __init__(self) -> None:
        self.begun = self.ended = self.closed = 0

    def routes(self, server: Server) -> list[Route]:
        return [Route("/echo", self.echo, methods=["POST"]), Route("/broken", self.broken)]

    @staticmethod
    def error(status: int, message: str, param: str | None = None) -> Response:
        return JSONResponse({"echo error": message, "param": param}, status)

    async def echo(self, request: Request) -> Response:
        asked = await read_json(request)
        if asked.get("as") in ("sse", "lines"):
            as_events = sse if asked["as"] == "sse" else json_lines
            return as_events(self._events(asked))
        self.begun += 1
        try:
            await asyncio.sleep(asked.get("wait", 0))
            self.ended += 1
        finally:
            self.closed += 1
        return JSONResponse(asked)

    async def broken(self, request: Request) -> Response:
        raise RuntimeError("a secret of the server")

    async def _events(self, asked: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        self.begun += 1
        try:
            for number in range(asked.get("events", 1)):
                if number == asked.get("fails at"):
                    raise UsageError("it was to fail.")
                yield {"number": number, "filler": "x" * asked.get("size", 0)}
                await asyncio.sleep(asked.get("wait", 0))
            self.ended += 1
        finally:
            self.closed += 1


@contextmanager
def serving(
    engine: Any = None, protocols: Any = None, **settings: Any
) -> Iterator[SimpleNamespace]:
    """A server that listens at a free port: `port`, `url`, `server`, `echo`."""
    echo = Echo()
    app = create_app(
        FakeEngine() if engine is None else engine,
        ServerSettings(port=0, **settings),
        protocols=[echo] if protocols is None else protocols,
    )
    sockets = lifecycle.listen(app.state.server.settings)
    over = threading.Event()
    thread = threading.Thread(
        target=lifecycle.run, args=(app, sockets), kwargs={"on_tick": over.is_set}
    )
    thread.start()
    try:
        port = sockets[0].getsockname()[1]
        yield SimpleNamespace(
            port=port, url=lifecycle.url(sockets), server=app.state.server, echo=echo
        )
    finally:
        over.set()
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"


def exchange(port: int, sent: bytes, *, seconds: float = 10.0) -> bytes:
    """What comes back for raw bytes until the server closes, or says nothing for a while."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        try:
            connection.sendall(sent)
            while piece := connection.recv(65536):
                received += piece
                if is_whole(received):
                    break
        except (ConnectionError, TimeoutError):
            pass
    return received


def is_whole(received: bytes) -> bool:
    """Whether this is a response to its end, by its own length."""
    head, separator, body = received.partition(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return bool(separator) and len(body) >= int(value)
    return received.endswith(b"0\r\n\r\n")


def status(received: bytes) -> int:
    """The status of a response; 0 where the connection was closed without one."""
    return int(received.split()[1]) if received.startswith(b"HTTP/1.1 ") else 0


def post(path: str, body: Any, *headers: str, host: str = "localhost") -> bytes:
    """A request as it goes over the wire."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(raw)}", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + raw


def main() -> None:
    """Serve until a signal comes; the first line of stdout is the port."""
    app = create_app(FakeEngine(), ServerSettings(port=0), protocols=[Echo()])
    sockets = lifecycle.listen(app.state.server.settings)
    print(sockets[0].getsockname()[1], flush=True)
    try:
        lifecycle.run(app, sockets)
    except KeyboardInterrupt:
        os._exit(130)  # as the command does


if __name__ == "__main__":
    main()

"""A server's life: it listens, answers, and ends within seconds when it is told to."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_diffgemma.errors import DiffGemmaError, UsageError
from mlx_diffgemma.reading import shown
from mlx_diffgemma.server.config import ServerSettings

GRACE_SECONDS = 2.0  # for answers that are under way, once the server is told to end
HEAD_SECONDS = 20.0  # that a client may take for the head of a request
_LATEST_SECONDS = 3  # after which what still runs is cancelled
_INTERRUPTED = 130
_BACKLOG = 512
_FILES = 4096  # open files wanted; macOS allows 256 where nobody asks for more
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 2\r\nconnection: close\r\n\r\n"


class ListenError(DiffGemmaError):
    """The server cannot listen at the address and port of its settings."""


def listen(settings: ServerSettings) -> list[socket.socket]:
    """Listening sockets, one for each address that the host of the settings stands for.

    Raises:
        UsageError: the address is unknown.
        ListenError: the port is in use, or this user may not listen at it.
    """
    host, port = settings.host.strip("[]"), settings.port
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_ADDRCONFIG
        )
    except (OSError, ValueError):  # ValueError: nothing that could be a name
        raise UsageError(
            f"--host {shown(host)} is unknown; name an address of this machine."
        ) from None
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sockets.append(socket.socket(family, kind, protocol))
            if family == socket.AF_INET6:
                sockets[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken = sockets[0].getsockname()[1] if len(sockets) > 1 else port
            sockets[-1].bind((address[0], taken, *address[2:]))
            sockets[-1].listen(_BACKLOG)
    except OSError as error:
        for each in sockets:
            each.close()
        if error.errno == errno.EADDRINUSE:
            raise ListenError(
                f"port {port} of {host} is in use; stop what listens there, or take another with "
                "--port."
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ListenError(f"port {port} is for administrators; take one above 1023.") from None
        raise ListenError(f"{host}:{port}: {error.strerror}; name another with --host.") from None
    return sockets


def url(sockets: list[socket.socket]) -> str:
    """Where a client on this machine finds the server."""
    host, port = sockets[0].getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    app: Starlette, sockets: list[socket.socket], *, on_tick: Callable[[], bool] | None = None
) -> None:
    """Answer until a signal comes or `on_tick` says that it is enough.

    The first Ctrl-C lets answers end for some seconds and cancels the rest; the second ends the
    process at once.

    Args:
        on_tick: called ten times a second; the server ends where it returns True.

    Raises:
        KeyboardInterrupt: Ctrl-C ended it, unless the process was started to ignore that.
    """
    _allow_files()
    settings: ServerSettings = app.state.server.settings
    config = uvicorn.Config(
        app,
        http=type("Doors", (Connection,), {"most": settings.max_connections}),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_LATEST_SECONDS,
    )
    _Running(config, app.state.server.stop, on_tick).run(sockets=sockets)


class Connection(H11Protocol):
    """A connection that is bounded: in number, and in the time that the head of a request takes. A
    response can cut it, by `scope["state"]["cut"]`."""

    most = 512
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Take a connection, or refuse it where there are too many."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "cut": transport.abort}
        if len(self.connections) > self.most:
            transport.write(_BUSY)
            transport.close()
            return
        self._late = self.loop.call_later(HEAD_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Read on; the head of a request must come in time."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        reads_head = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if not reads_head:
            self._in_time()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._in_time()
        super().connection_lost(exc)

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class _Running(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, stop: Callable[[float], Any], on_tick: Any) -> None:
        super().__init__(config)
        self._stop, self._on_tick = stop, on_tick

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or bool(self._on_tick and self._on_tick())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what is under way: answers that are not over in time get an error as their end."""

        async def cancel() -> None:
            await asyncio.sleep(GRACE_SECONDS)
            await self._stop(0.0)

        cancelling = asyncio.create_task(cancel())
        try:
            await super().shutdown(sockets)
        finally:
            cancelling.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end on the first signal, and end the process at once on the second."""
        if self.should_exit:
            sys.stderr.flush()
            os._exit(_INTERRUPTED if sig == signal.SIGINT else 128 + sig)
        super().handle_exit(sig, frame)


def _allow_files() -> None:
    """Allow this process as many connections as it is to have."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

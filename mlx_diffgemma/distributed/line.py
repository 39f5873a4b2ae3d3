"""A TCP connection between two processes of one model that carries JSON lines, and the words for
how they know each other and how they end."""

from __future__ import annotations

import hmac
import json
import select
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mlx_diffgemma.errors import DiffGemmaError

LOST = 75  # exit code of a process whose model is broken by another one: EX_TEMPFAIL, "try again"
LONGEST_LINE = 16 << 20  # bytes
LOOK_SECONDS = 0.25  # between two looks at a connection


class RanksError(DiffGemmaError):
    """The processes of one model do not fit together, or one of them is gone.

    Args:
        code: the exit code of this process.

    Attributes:
        retry_after: seconds after which a client of a server may try again.
    """

    retry_after = 10

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = code


@dataclass(frozen=True)
class Ending:
    """How all processes end.

    Attributes:
        code: their exit code.
        line: one line that says why, or None where rank 0 has said what there is to say.
    """

    code: int
    line: str | None = None


@dataclass(frozen=True)
class Invitation:
    """Where rank 0 listens, and the secret by which it and the followers know each other.

    Attributes:
        hosts: addresses of rank 0; the first that answers is taken.
        port: TCP port.
        secret: hexadecimal digits.
    """

    hosts: tuple[str, ...]
    port: int
    secret: str

    def as_bytes(self) -> bytes:
        return json.dumps([self.hosts, self.port, self.secret]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Invitation:
        hosts, port, secret = json.loads(data)
        return cls(tuple(hosts), port, secret)

    def proof(self, role: str, nonce: str) -> str:
        """What only a holder of the secret can answer to `nonce`."""
        return hmac.new(
            bytes.fromhex(self.secret), f"{role} {nonce}".encode(), "sha256"
        ).hexdigest()


class Line:
    """One end of a connection that carries JSON lines. Any thread may send; one thread reads.

    Attributes:
        heard: time (`time.monotonic`) at which bytes came last.
    """

    def __init__(self, connection: socket.socket) -> None:
        with suppress(OSError):  # macOS refuses it where the other side is gone already
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(True)
        self._connection = connection
        self._sending = threading.Lock()
        self._buffer = bytearray()
        self._pending: list[dict[str, Any]] = []  # read, and not asked for yet
        self.heard = time.monotonic()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; it blocks where the other side does not read.

        Raises:
            ValueError: the message is longer than a line may be.
            OSError: the connection is closed.
        """
        data = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        if len(data) > LONGEST_LINE:
            raise ValueError(f"a message of {len(data)} bytes is longer than {LONGEST_LINE}")
        with self._sending:
            self._connection.sendall(data)

    def send_last(self, message: Mapping[str, Any], seconds: float = 0.5) -> None:
        """Send a message if it can be done within `seconds`, and close this side for sending."""
        if self._sending.acquire(timeout=seconds):
            try:
                data = json.dumps(message).encode() + b"\n"
                with suppress(OSError):
                    self._connection.send(data, socket.MSG_DONTWAIT)
                    self._connection.shutdown(socket.SHUT_WR)
            finally:
                self._sending.release()

    def receive(self, seconds: float) -> list[dict[str, Any]] | None:
        """The messages that come within `seconds`, perhaps none; None once the other side is gone.

        Raises:
            RanksError: what came is no message.
        """
        if self._pending:
            messages, self._pending = self._pending, []
            return messages
        try:
            ready, _, _ = select.select([self._connection], [], [], seconds)
            if not ready:
                return []
            data = self._connection.recv(1 << 16)
        except (OSError, ValueError):  # ValueError: this side is closed
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        self._buffer += data
        if b"\n" not in data:
            if len(self._buffer) > LONGEST_LINE:
                raise RanksError(
                    f"a message of another process is longer than {LONGEST_LINE} bytes."
                )
            return []
        *lines, rest = bytes(self._buffer).split(b"\n")
        self._buffer[:] = rest
        return [_parsed(line) for line in lines]

    def wait_for(self, key: str, until: float) -> Any:
        """The value of the first message that has `key`, before the time `until`.

        Raises:
            RanksError: it does not come, or something else does.
        """
        while (left := until - time.monotonic()) > 0:
            messages = self.receive(min(left, LOOK_SECONDS))
            if messages is None:
                break
            if messages:
                first, *self._pending = messages
                if key not in first:
                    break
                return first[key]
        raise RanksError("a process did not introduce itself.")

    def close(self) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise RanksError("another process sent what is no message; start all of them again.")
    return message

"""What the processes of one model say to each other beside MLX's collectives: orders from rank 0,
heartbeats, errors and the end.

Each follower holds one TCP connection to rank 0, over which both send JSON lines. Arrays never go
this way. A process that stops answering is found by its silence, and one that dies by its closed
connection; both are reported to `on_loss` from the thread that reads the connection, since the main
thread may be blocked in a collective then.
"""

from __future__ import annotations

import hmac
import json
import os
import queue
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mlx_diffgemma.errors import DiffGemmaError

LOST = 75  # exit code of a process whose model is broken by another one: EX_TEMPFAIL, "try again"
BEAT_SECONDS = 1.0
SILENCE_SECONDS = 7.0  # after which a process that says nothing counts as hung
STUCK_SECONDS = 120.0  # after which an order that nobody gets on with counts as hung
JOIN_SECONDS = 60.0
LONGEST_LINE = 16 << 20  # bytes
_LOOK_SECONDS = 0.25
_GREETING_SECONDS = 2.0  # that a connection may take to show that it knows the secret
_END_SECONDS = 3.0  # that rank 0 waits for the followers to end


class RanksError(DiffGemmaError):
    """The processes of one model do not fit together, or one of them is gone.

    Attributes:
        code: the exit code of this process.
    """

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


OnLoss = Callable[[Ending], None]


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
            messages = self.receive(min(left, _LOOK_SECONDS))
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


class Leader:
    """Rank 0's end: it sends orders to all followers and watches them.

    Args:
        size: number of processes, this one among them.
        hosts: addresses under which the followers find this process.
        on_loss: called once, from a thread of its own, when a follower is lost; it is to end the
            process.

    Attributes:
        invitation: what the followers must be told to `join`.
    """

    def __init__(self, size: int, hosts: Sequence[str], on_loss: OnLoss) -> None:
        self.size = size
        self._idle = time.monotonic()  # when no order was outstanding last
        self._on_loss = on_loss
        self._server = _listening(hosts)
        port = self._server.getsockname()[1]
        self.invitation = Invitation(tuple(hosts), port, secrets.token_hex(32))
        self._peers: dict[int, _Peer] = {}
        self._sending = threading.Lock()
        self._ended = threading.Event()
        self._losing = threading.Lock()
        self._sent = 0

    def accept(self, seconds: float = JOIN_SECONDS) -> None:
        """Wait until all followers are connected, and begin to watch them. Whoever connects and
        does not know the secret is dropped.

        Raises:
            RanksError: some did not come in time.
        """
        until = time.monotonic() + seconds
        with self._server:
            while len(self._peers) < self.size - 1:
                left = until - time.monotonic()
                missing = sorted({*range(1, self.size)} - self._peers.keys())
                if left <= 0:
                    raise RanksError(
                        f"{_named(missing)} did not connect to rank 0 within {seconds:.0f} s; let "
                        f"TCP port {self.invitation.port} of it through the firewall, and start "
                        "again.",
                        LOST,
                    )
                self._server.settimeout(min(left, _LOOK_SECONDS))
                with suppress(TimeoutError):
                    self._introduce(self._server.accept()[0], until)
        for rank, peer in self._peers.items():
            threading.Thread(
                target=self._watch, args=(rank, peer), name=f"rank {rank}", daemon=True
            ).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _introduce(self, connection: socket.socket, until: float) -> None:
        line = Line(connection)
        nonce = secrets.token_hex(16)
        until = min(until, time.monotonic() + _GREETING_SECONDS)
        try:
            line.send({"nonce": nonce})
            rank, proof, answer = line.wait_for("hello", until)
            expected = self.invitation.proof(f"follower {rank}", nonce)
            if not hmac.compare_digest(str(proof), expected) or rank in self._peers:
                raise RanksError("a stranger connected.")
            line.send({"welcome": self.invitation.proof("leader", str(answer))})
        except (RanksError, OSError, ValueError, TypeError):
            line.close()
            return
        self._peers[rank] = _Peer(line)

    def send(self, order: Mapping[str, Any]) -> None:
        """Send an order to every follower, without waiting for them.

        Raises:
            ValueError: the order is longer than a line may be.
            RanksError: a follower is gone; the process is about to end.
        """
        with self._sending:
            self._sent += 1
            for rank, peer in self._peers.items():
                try:
                    peer.line.send({"order": dict(order)})
                except OSError:
                    raise RanksError(f"rank {rank} is gone.", LOST) from None

    def gather(self) -> dict[int, Any]:
        """What each follower hands in with `tell`, by rank. It waits for as long as they live."""
        return {rank: peer.told.get() for rank, peer in self._peers.items()}

    def end(self, ending: Ending = Ending(0), seconds: float = _END_SECONDS) -> None:
        """Tell all followers to end, and wait for them for some seconds. Later calls do nothing."""
        with self._losing:
            if self._ended.is_set():
                return
            self._ended.set()
        self._spread(ending)
        until = time.monotonic() + seconds
        for peer in self._peers.values():
            peer.gone.wait(max(0.0, until - time.monotonic()))

    def _spread(self, ending: Ending) -> None:
        for peer in self._peers.values():
            peer.line.send_last({"end": ending.code, "line": ending.line})

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            for peer in self._peers.values():
                with suppress(OSError):  # the thread that reads will notice
                    peer.line.send({"beat": 1})

    def _watch(self, rank: int, peer: _Peer) -> None:
        try:
            while (messages := peer.line.receive(_LOOK_SECONDS)) is not None:
                for message in messages:
                    if "error" in message:
                        line = f"rank {rank}: {message['error']}"
                        return self._lose(Ending(int(message.get("code", 1)), line))
                    if "told" in message:
                        peer.told.put(message["told"])
                    if message.get("done", peer.done) != peer.done:
                        peer.done, peer.moved = message["done"], time.monotonic()
                now = time.monotonic()
                if not messages and now - peer.line.heard > SILENCE_SECONDS:
                    return self._lose(Ending(LOST, _silent(rank, now - peer.line.heard)))
                self._check_progress(now)
            self._lose(Ending(LOST, _gone(rank)))
        except RanksError as error:
            self._lose(Ending(LOST, f"rank {rank}: {error}"))
        finally:
            peer.gone.set()

    def _check_progress(self, now: float) -> None:
        """Report a loss where orders are outstanding and no follower gets on."""
        behind = [rank for rank, peer in self._peers.items() if peer.done < self._sent]
        if not behind:
            self._idle = now
            return
        moved = max(self._idle, *(peer.moved for peer in self._peers.values()))
        if now - moved > STUCK_SECONDS:
            self._lose(
                Ending(
                    LOST,
                    f"{_named(behind)} did not finish an order for {now - moved:.0f} s; look at "
                    "what else runs there, and start again.",
                )
            )

    def _lose(self, ending: Ending) -> None:
        with self._losing:
            if self._ended.is_set():
                return
            self._ended.set()
        self._spread(ending)
        self._on_loss(ending)


@dataclass
class _Peer:
    line: Line
    told: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    gone: threading.Event = field(default_factory=threading.Event)
    done: int = 0
    moved: float = 0.0


class Follower:
    """A follower's end: it takes orders from rank 0 and watches it.

    Args:
        rank: which of the processes this is, from 1.
        invitation: what rank 0 tells.
        on_loss: called once, from a thread of its own, where rank 0 is lost or says that all
            processes must end and this one does not; it is to end the process.

    Attributes:
        ending: how rank 0 ended the processes; None before that.

    Raises:
        RanksError: rank 0 cannot be reached.
    """

    def __init__(self, rank: int, invitation: Invitation, on_loss: OnLoss) -> None:
        self.rank = rank
        self.ending: Ending | None = None
        self._on_loss = on_loss
        self._line = _connected(rank, invitation)
        self._orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._done = 0
        self._left = threading.Event()
        for target, name in ((self._watch, "rank 0"), (self._beat, "heartbeat")):
            threading.Thread(target=target, name=name, daemon=True).start()

    def orders(self) -> Iterator[dict[str, Any]]:
        """The orders of rank 0, one after the other; an order counts as done when the next one is
        asked for. It ends when rank 0 says so."""
        while (order := self._orders.get()) is not None:
            yield order
            self._done += 1
            if self._orders.empty():
                self._report()

    def tell(self, value: Any) -> None:
        """Hand in what rank 0 asks for with `gather`."""
        with suppress(OSError):
            self._line.send({"told": value})

    def fail(self, error: str, code: int = 1, seconds: float = _END_SECONDS) -> None:
        """Tell rank 0 that this process failed, upon which all end, and wait until it says so."""
        self._line.send_last({"error": error, "code": code})
        self._left.wait(seconds)

    def leave(self) -> None:
        """Close the connection, once this process is about to end."""
        self._left.set()
        self._line.close()

    def _report(self) -> None:
        with suppress(OSError):
            self._line.send({"done": self._done})

    def _beat(self) -> None:
        while not self._left.wait(BEAT_SECONDS):
            self._report()

    def _watch(self) -> None:
        try:
            while (messages := self._line.receive(_LOOK_SECONDS)) is not None:
                for message in messages:
                    if "end" in message:
                        return self._end(Ending(int(message["end"]), message.get("line")))
                    if "order" in message:
                        self._orders.put(message["order"])
                silent = time.monotonic() - self._line.heard
                if not messages and silent > SILENCE_SECONDS:
                    return self._lose(Ending(LOST, _silent(0, silent)))
            self._lose(Ending(LOST, _gone(0)))
        except RanksError as error:
            self._lose(Ending(LOST, str(error)))

    def _end(self, ending: Ending) -> None:
        """End the orders; where the main thread does not end in time, `on_loss` does."""
        self.ending = ending
        self._orders.put(None)
        if ending.line is None and self._left.wait(_END_SECONDS - 1.0):
            return
        self._lose(ending)

    def _lose(self, ending: Ending) -> None:
        if not self._left.is_set():
            self._left.set()
            self.ending = ending
            self._on_loss(ending)


def addresses() -> tuple[str, ...]:
    """Addresses of this machine under which another may reach it: those that MLX's host file gives
    to rank 0 or its JACCL coordinator has, and those of the machine's own name."""
    found: list[str] = []
    if path := os.environ.get("MLX_HOSTFILE"):
        with suppress(OSError, ValueError, LookupError, TypeError), open(path) as file:
            found += [str(each).rpartition(":")[0] for each in json.load(file)[0]]
    if coordinator := os.environ.get("MLX_JACCL_COORDINATOR"):
        found.append(coordinator.rpartition(":")[0])
    if not found or not all(_is_loopback(each) for each in found):
        with suppress(OSError):
            known = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
            found += [str(address[0]) for *_, address in known]
    # A link-local address is one on an interface of this machine, which another names otherwise.
    usable = [each.strip("[]") for each in found if "%" not in each and not each.startswith("fe80")]
    return tuple(dict.fromkeys(usable)) or ("127.0.0.1",)


def _is_loopback(host: str) -> bool:
    return host.strip("[]") in ("::1", "localhost") or host.startswith("127.")


def _listening(hosts: Sequence[str]) -> socket.socket:
    """A socket that listens at a free port: to this machine alone where that is enough."""
    if all(_is_loopback(host) for host in hosts):
        return socket.create_server((hosts[0], 0), family=_family(hosts[0]))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _connected(rank: int, invitation: Invitation, seconds: float = JOIN_SECONDS) -> Line:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for host in invitation.hosts:
            try:
                connection = socket.create_connection((host, invitation.port), timeout=2.0)
            except OSError:
                continue
            line = Line(connection)
            try:
                nonce = line.wait_for("nonce", min(until, time.monotonic() + JOIN_SECONDS / 4))
                own = secrets.token_hex(16)
                proof = invitation.proof(f"follower {rank}", str(nonce))
                line.send({"hello": [rank, proof, own]})
                welcome = line.wait_for("welcome", min(until, time.monotonic() + JOIN_SECONDS / 4))
                if hmac.compare_digest(str(welcome), invitation.proof("leader", own)):
                    return line
            except (RanksError, OSError):
                pass
            line.close()
        time.sleep(_LOOK_SECONDS)
    where = ", ".join(invitation.hosts)
    raise RanksError(
        f"rank {rank} cannot reach rank 0 at {where}, TCP port {invitation.port}; let it through "
        "the firewall there, and start again.",
        LOST,
    )


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _gone(rank: int) -> str:
    return f"rank {rank} ended without a word; see what happened there, and start all ranks again."


def _silent(rank: int, seconds: float) -> str:
    return (
        f"rank {rank} has said nothing for {seconds:.0f} s; wake that machine or look at its "
        "network, and start all ranks again."
    )

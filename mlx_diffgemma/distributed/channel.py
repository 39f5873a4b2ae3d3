"""What the processes of one model say to each other beside MLX's collectives: orders from rank 0,
heartbeats, errors and the end.

Each follower holds one TCP connection to rank 0, over which both send JSON lines. Arrays never go
this way. A process that stops answering is found by its silence, and one that dies by its closed
connection; both are reported to `on_loss` from the thread that reads the connection, since the main
thread may be blocked in a collective then.
"""

from __future__ import annotations

import hmac
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mlx_diffgemma.distributed.launched import is_loopback
from mlx_diffgemma.distributed.line import (
    LOOK_SECONDS,
    LOST,
    Ending,
    Invitation,
    Line,
    RanksError,
)

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 6.0  # after which a process that says nothing counts as hung
STUCK_SECONDS = 300.0  # after which an order that nobody gets on with counts as hung
JOIN_SECONDS = 60.0
_GREETING_SECONDS = 2.0  # that a connection may take to show that it knows the secret
_FIRST_SECONDS = 0.5  # that rank 0 has to fail of the same error as a follower, and to name it
_END_SECONDS = 3.0  # that rank 0 waits for the followers to end
_FAIL_SECONDS = 10.0  # that a follower which failed waits for rank 0 to end it

OnLoss = Callable[[Ending], None]


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
                self._server.settimeout(min(left, LOOK_SECONDS))
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
            self._send({"order": dict(order)})

    def spread(self, value: Any) -> None:
        """Send a value for which each follower waits with `value`; it is no order, and may take as
        long as it likes to be used.

        Raises:
            ValueError, RanksError: as for `send`.
        """
        with self._sending:
            self._send({"value": value})

    def _send(self, message: Mapping[str, Any]) -> None:
        for rank, peer in self._peers.items():
            try:
                peer.line.send(message)
            except OSError:
                time.sleep(_END_SECONDS)  # the thread that reads ends this process
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
        self._send_end(ending)
        until = time.monotonic() + seconds
        for peer in self._peers.values():
            peer.gone.wait(max(0.0, until - time.monotonic()))

    def _send_end(self, ending: Ending) -> None:
        for peer in self._peers.values():
            peer.line.send_last({"end": ending.code, "line": ending.line})

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            for peer in self._peers.values():
                with suppress(OSError):  # the thread that reads will notice
                    peer.line.send({"beat": 1})

    def _watch(self, rank: int, peer: _Peer) -> None:
        try:
            while (messages := peer.line.receive(LOOK_SECONDS)) is not None:
                for message in messages:
                    if "error" in message:
                        self._ended.wait(_FIRST_SECONDS)
                        line = f"rank {rank}: {message['error']}"
                        return self.lose(Ending(int(message.get("code", 1)), line))
                    if "told" in message:
                        peer.told.put(message["told"])
                    if message.get("done", peer.done) != peer.done:
                        peer.done, peer.moved = message["done"], time.monotonic()
                now = time.monotonic()
                if not messages and now - peer.line.heard > SILENCE_SECONDS:
                    return self.lose(Ending(LOST, _silent(rank, now - peer.line.heard)))
                self._check_progress(now)
            self.lose(Ending(LOST, _gone(rank)))
        except RanksError as error:
            self.lose(Ending(LOST, f"rank {rank}: {error}"))
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
            self.lose(
                Ending(
                    LOST,
                    f"{_named(behind)} did not finish an order for {now - moved:.0f} s; look at "
                    "what else runs there, and start again.",
                )
            )

    def lose(self, ending: Ending) -> None:
        """Tell all followers to end, and have `on_loss` end this process. Later calls do nothing,
        and neither do calls after `end`."""
        with self._losing:
            if self._ended.is_set():
                return
            self._ended.set()
        self._send_end(ending)
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
        self.ending: Ending | None = None
        self._on_loss = on_loss
        self._line = _connected(rank, invitation)
        self._orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._values: queue.SimpleQueue[Any] = queue.SimpleQueue()
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

    def value(self) -> Any:
        """The next value that rank 0 gives with `spread`; None too where it ends instead."""
        return self._values.get()

    def tell(self, value: Any) -> None:
        """Hand in what rank 0 asks for with `gather`."""
        with suppress(OSError):
            self._line.send({"told": value})

    def fail(self, error: str, code: int = 1, seconds: float = _FAIL_SECONDS) -> None:
        """Tell rank 0 that this process failed, upon which all end; `on_loss` ends this one. It
        comes back where that has not come to pass within `seconds`."""
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
            while (messages := self._line.receive(LOOK_SECONDS)) is not None:
                for message in messages:
                    if "end" in message:
                        return self._end(Ending(int(message["end"]), message.get("line")))
                    if "order" in message:
                        self._orders.put(message["order"])
                    if "value" in message:
                        self._values.put(message["value"])
                silent = time.monotonic() - self._line.heard
                if not messages and silent > SILENCE_SECONDS:
                    return self._lose(Ending(LOST, _silent(0, silent)))
            self._lose(Ending(LOST, _gone(0)))
        except RanksError as error:
            self._lose(Ending(LOST, str(error)))

    def _end(self, ending: Ending) -> None:
        """End the orders; where the main thread does not end in time, `on_loss` does."""
        if ending.line is not None:
            return self._lose(ending)
        self.ending = ending
        self._orders.put(None)
        self._values.put(None)
        if not self._left.wait(_END_SECONDS - 1.0):
            self._lose(ending)

    def _lose(self, ending: Ending) -> None:
        if not self._left.is_set():
            self.ending = ending
            self._on_loss(ending)


def _listening(hosts: Sequence[str]) -> socket.socket:
    """A socket that listens at a free port: to this machine alone where that is enough."""
    if all(is_loopback(host) for host in hosts):
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
            except (RanksError, OSError, TypeError):
                pass
            line.close()
        time.sleep(LOOK_SECONDS)
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

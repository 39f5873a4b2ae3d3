"""Several processes that compute one model: how they come together, agree, and end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from mlx_diffgemma.distributed import launched
from mlx_diffgemma.distributed.channel import (
    JOIN_SECONDS,
    SILENCE_SECONDS,
    Follower,
    Leader,
    OnLoss,
)
from mlx_diffgemma.distributed.line import LOST, Ending, Invitation, RanksError
from mlx_diffgemma.errors import DiffGemmaError

if TYPE_CHECKING:
    import mlx.core as mx

_INVITATION_BYTES = 4096
_COLLECTIVES = ("[ring]", "[jaccl]", "[mpi]", "[nccl]", "[distributed]")  # in MLX's own errors
_FLUSH_SECONDS = 0.5
_ENDING = threading.Lock()
# MLX holds Python's lock while it connects, so that only another process can end the wait.
_ENDS_A_WAIT = """
import os, select, sys
seconds, process, line = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if not select.select([0], [], [], seconds)[0]:
    os.write(2, f"error: {line}\\n".encode())
    os.kill(process, 9)
"""


class Ranks:
    """The processes of one model, as one of them sees them.

    Attributes:
        group: MLX's group of the processes.
        rank: which of them this is, from 0.
        size: how many there are.
        leader: the channel to the others, on rank 0; None on the others.
        follower: the channel to rank 0, on the others; None on rank 0.
        farewell: called when another process is lost, before this one ends; it must return within
            seconds.
    """

    def __init__(self, group: mx.distributed.Group, end: OnLoss) -> None:
        self.group = group
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.leader: Leader | None = None
        self.follower: Follower | None = None
        self.farewell: OnLoss | None = None
        self._end_process = end

    def lost(self, ending: Ending) -> None:
        """Say farewell, and end the process."""
        if self.farewell is not None:
            with suppress(Exception):
                self.farewell(ending)
        self._end_process(ending)

    def settle(self, error: BaseException) -> None:
        """Act on an error after which the processes cannot go on together; others are left to the
        caller. Where a collective broke, another process is gone, and the thread that watches it is
        about to end this one. Where an order was broken off, all are ended here."""
        if isinstance(error, RanksError) and self.leader is not None:
            self.leader.lose(Ending(error.exit_code, str(error)))
        if isinstance(error, RuntimeError) and str(error).startswith(_COLLECTIVES):
            time.sleep(SILENCE_SECONDS + 1.0)

    def agree(self, facts: Mapping[str, str]) -> None:
        """Go on only where `facts` are the same on all ranks. All of them have to call this.

        Args:
            facts: what must be the same, by the name that an error calls it.

        Raises:
            RanksError: a rank differs; the error names it and what differs. It is raised on rank 0;
                the other processes end with the same line.
        """
        for rank, theirs in self.gather(dict(facts)).items():
            for name in dict.fromkeys([*facts, *theirs]):
                here, there = (each.get(name, "none") for each in (facts, theirs))
                if here != there:
                    self.refuse(
                        f"rank {rank} has {name} {there} and rank 0 has {name} {here}; give all "
                        "ranks the same."
                    )
        self.spread(None)

    def gather(self, value: Any) -> dict[int, Any]:
        """What all other ranks give as `value`, by rank, on rank 0; nothing on the others. All of
        them have to call this. The values must be of JSON."""
        if self.leader is not None:
            return self.leader.gather()
        assert self.follower is not None
        self.follower.tell(value)
        return {}

    def spread(self, value: Any) -> Any:
        """The `value` of rank 0, on all ranks, each of which has to call this. It must be of
        JSON.

        Raises:
            SystemExit: rank 0 has ended all processes instead.
        """
        if self.leader is not None:
            self.leader.spread(value)
            return value
        assert self.follower is not None
        value = self.follower.value()
        if self.follower.ending is not None:
            raise SystemExit(self.end())
        return value

    def refuse(self, line: str) -> NoReturn:
        """End all ranks, on rank 0, with one line that each of them prints.

        Raises:
            RanksError: always, with that line.
        """
        self.end(Ending(1, line))
        raise RanksError(line)

    def fail(self, error: Exception) -> None:
        """End all processes because of an error in this one. On rank 0 the caller says which it
        was; of a follower's error, all processes print the line."""
        self.settle(error)
        code = error.exit_code if isinstance(error, DiffGemmaError) else 1
        if self.leader is not None:
            self.leader.end(Ending(code))
            return
        line = next(iter(str(error).splitlines()), "")
        if not isinstance(error, DiffGemmaError):
            line = f"{type(error).__name__}: {line}"
        assert self.follower is not None
        self.follower.fail(line, code)

    def end(self, ending: Ending = Ending(0)) -> int:
        """End all processes, on rank 0; leave, on the others. Returns the exit code of this one."""
        if self.leader is not None:
            self.leader.end(ending)
            return ending.code
        assert self.follower is not None
        self.follower.leave()
        return self.follower.ending.code if self.follower.ending else LOST


def end_process(ending: Ending) -> None:
    """End this process at once, whatever its other threads are doing, and say on stderr why."""
    with _ENDING:  # it is never given back
        flushing = threading.Thread(target=_flush, daemon=True)
        flushing.start()
        flushing.join(_FLUSH_SECONDS)
        if ending.line is not None:
            with suppress(OSError):
                os.write(2, f"error: {' '.join(ending.line.splitlines())}\n".encode())
        os._exit(ending.code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()


def join(end: OnLoss = end_process, seconds: float = JOIN_SECONDS) -> Ranks:
    """Come together with the other processes that were started with this one.

    Args:
        end: ends this process with a code and a line. It is called from a thread of its own when
            another process is lost.
        seconds: how long the others may take to come.

    Raises:
        RanksError: MLX cannot connect the processes, or they do not come in time.
    """
    with _ended_after(seconds):
        import mlx.core as mx

        try:
            group = mx.distributed.init(strict=True)
        except RuntimeError as error:
            reason = (str(error).splitlines() or ["no reason is given"])[0]
            raise RanksError(
                f"MLX cannot connect the processes ({reason}); check the host file and the "
                "network between the machines.",
                LOST,
            ) from None
        ranks, own = Ranks(group, end), b""
        if ranks.rank == 0:
            ranks.leader = Leader(ranks.size, launched.addresses(), ranks.lost)
            own = ranks.leader.invitation.as_bytes()
        invitation = Invitation.from_bytes(_shared(own, group))
    # What follows has limits and words of its own, such as those for a firewall.
    if ranks.leader is not None:
        ranks.leader.accept(seconds)
    else:
        ranks.follower = Follower(ranks.rank, invitation, ranks.lost)
    return ranks


def _shared(data: bytes, group: mx.distributed.Group) -> bytes:
    """The bytes of rank 0 on all ranks; the others give none."""
    import mlx.core as mx

    padded = list(data.ljust(_INVITATION_BYTES, b"\0"))
    assert len(padded) == _INVITATION_BYTES
    total = mx.distributed.all_sum(mx.array(padded, mx.int32), group=group, stream=mx.cpu)
    values: Any = total.tolist()
    return bytes(values).rstrip(b"\0")


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """End this process with one line where what is inside takes longer than `seconds`."""

    line = (
        f"rank {launched.rank()} has waited {seconds:.0f} s for the other ranks; see that all of "
        f"the {launched.count()} are started, and that the host file is right."
    )
    watch = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _ENDS_A_WAIT, str(seconds), str(os.getpid()), line],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not for it
    )
    try:
        yield
    finally:
        assert watch.stdin is not None
        watch.stdin.close()
        watch.wait()

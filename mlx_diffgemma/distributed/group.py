"""Several processes that compute one model: how they come together, agree, and end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import mlx.core as mx

from mlx_diffgemma.distributed import launched
from mlx_diffgemma.distributed.channel import JOIN_SECONDS, Follower, Leader, OnLoss
from mlx_diffgemma.distributed.line import LOST, Ending, Invitation, RanksError

_INVITATION_BYTES = 4096
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
    """

    def __init__(
        self, group: mx.distributed.Group, leader: Leader | None, follower: Follower | None
    ) -> None:
        self.group, self.leader, self.follower = group, leader, follower
        self.rank: int = group.rank()
        self.size: int = group.size()

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

    def end(self, ending: Ending = Ending(0)) -> int:
        """End all processes, on rank 0; leave, on the others. Returns the exit code of this one."""
        if self.leader is not None:
            self.leader.end(ending)
            return ending.code
        assert self.follower is not None
        self.follower.leave()
        return self.follower.ending.code if self.follower.ending else LOST


def join(on_loss: OnLoss, seconds: float = JOIN_SECONDS) -> Ranks:
    """Come together with the other processes that were started with this one.

    Args:
        on_loss: called from a thread of its own when another process is lost; it has to end this
            one.
        seconds: how long the others may take to come.

    Raises:
        RanksError: MLX cannot connect the processes, or they do not come in time.
    """
    with _ended_after(seconds):
        try:
            group = mx.distributed.init(strict=True)
        except RuntimeError as error:
            reason = (str(error).splitlines() or ["no reason is given"])[0]
            raise RanksError(
                f"MLX cannot connect the processes ({reason}); check the host file and the "
                "network between the machines.",
                LOST,
            ) from None
        if group.rank() == 0:
            leader = Leader(group.size(), launched.addresses(), on_loss)
            _shared(leader.invitation.as_bytes(), group)
            leader.accept(seconds)
            return Ranks(group, leader, None)
        invitation = Invitation.from_bytes(_shared(b"", group))
        return Ranks(group, None, Follower(group.rank(), invitation, on_loss))


def _shared(data: bytes, group: mx.distributed.Group) -> bytes:
    """The bytes of rank 0 on all ranks; the others give none."""
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

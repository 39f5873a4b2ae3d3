"""What the environment says of how this process was started: alone, or as one of several by
`mlx.launch`. Nothing of MLX is imported here."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any


def rank() -> int:
    """Which of the processes this is, from 0; 0 where it was started alone."""
    for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 0


def count() -> int:
    """How many processes were started together; 1 where this one was started alone."""
    for name in ("MLX_HOSTFILE", "MLX_IBV_DEVICES"):
        if listed := _listed(name):
            return len(listed)
    for name in ("MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 1


def addresses() -> tuple[str, ...]:
    """Addresses under which other machines may reach this one, which is rank 0: those that MLX's
    host file or its JACCL coordinator gives to rank 0, and those of the machine's own name."""
    found: list[str] = []
    with suppress(LookupError, TypeError):
        found += [str(each).rpartition(":")[0] for each in _listed("MLX_HOSTFILE")[0]]
    if coordinator := os.environ.get("MLX_JACCL_COORDINATOR"):
        found.append(coordinator.rpartition(":")[0])
    if not found or not all(is_loopback(each) for each in found):
        with suppress(OSError):
            known = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
            found += [str(address[0]) for *_, address in known]
    # A link-local address is one on an interface of this machine, which another names otherwise.
    usable = [each.strip("[]") for each in found if "%" not in each and not each.startswith("fe80")]
    return tuple(dict.fromkeys(usable)) or ("127.0.0.1",)


def is_loopback(host: str) -> bool:
    """Whether only this machine itself is reached under an address."""
    return host.strip("[]") in ("::1", "localhost") or host.startswith("127.")


def _listed(name: str) -> list[Any]:
    """The list in the JSON file that a variable names; empty where there is none."""
    with suppress(OSError, ValueError, RecursionError):
        listed = json.loads(Path(os.environ.get(name, "")).read_text())
        if isinstance(listed, list):
            return listed
    return []

"""Several processes that train one model, as `mlx.launch` starts them.

Each has the whole model and computes its share of the batches of a step; the gradients are averaged
and every process takes the same step. The first one alone evaluates, reports and writes.
"""

from __future__ import annotations

import socket

import mlx.core as mx

from mlx_diffgemma.errors import UsageError


def place() -> int:
    """Which of the processes this is, from 0."""
    return mx.distributed.init().rank()


def count() -> int:
    """How many processes train together; 1 where nothing started several."""
    return mx.distributed.init().size()


def is_first() -> bool:
    """Whether this is the process that evaluates, reports and writes."""
    return place() == 0


def any_says(truth: bool) -> bool:
    """Whether `truth` holds in any of the processes, every one of which has to call this."""
    return bool(mx.distributed.all_max(mx.array(truth, mx.int32)).item())


def check_together(step: int, batches: int) -> None:
    """Check that all processes begin at the same step, and can share the `batches` of a step.

    Raises:
        UsageError: the processes cannot go on together.
    """
    processes = count()
    if batches % processes:
        raise UsageError(
            f"grad_accumulation_steps ({batches}) must be a multiple of the {processes} processes, "
            "which share the batches of a step."
        )
    if any_says(mx.distributed.all_max(mx.array(step)).item() != step):
        raise UsageError(
            f"the processes would begin at different steps (here after {step}); give all of them "
            "the same state in the adapter path."
        )


def local_hosts(count: int) -> list[list[str]]:
    """Addresses on this machine for `count` processes. The file that MLX_HOSTFILE names is to hold
    them as JSON, and MLX_RANK is to say which of the processes one is."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    for one in sockets:
        one.close()
    return hosts

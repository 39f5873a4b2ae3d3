"""A model that several processes load together, each its share."""

from __future__ import annotations

import atexit
import hashlib
import json
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.checkpoint.loading import read_config
from mlx_diffgemma.checkpoint.shards import stored_tensors
from mlx_diffgemma.checks import numbers_in
from mlx_diffgemma.distributed import launched
from mlx_diffgemma.distributed.group import Ranks, join
from mlx_diffgemma.distributed.plan import first_fitting, model_in
from mlx_diffgemma.distributed.shares import KINDS, Split
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

AUTO = "auto"
_CONTEXT = 8192  # positions for which there is to be room, prompt and answer together


def load_together(
    folder: Path,
    ranks: Ranks | None = None,
    *,
    parallel: str | None = None,
    weights: str | None = None,
    check: bool = False,
    name: str | None = None,
    vision: bool | None = None,
) -> DiffusionGemma:
    """Load a rank's share of a model. Rank 0 gets a model whose passes all ranks compute; on the
    others this call computes them, and never returns.

    Args:
        folder: the checkpoint, on this machine.
        ranks: the processes; None joins them first.
        parallel, weights: as for `mlx_diffgemma.load`.
        check, vision: as for `mlx_diffgemma.load`.
        name: what errors call the model.

    Raises:
        UsageError: the model cannot be split so, or this process was started alone.
        RanksError: the ranks differ, or cannot come together.
        CheckpointError, ConfigError, MemoryShortageError: as for `mlx_diffgemma.load`.
        SystemExit: rank 0 has ended all processes, on the others.
    """
    if ranks is None:
        if launched.count() == 1:
            raise UsageError(
                "--parallel and --weights are for several processes; start them with mlx.launch, "
                "or drop them."
            )
        ranks = join()
        atexit.register(ranks.end)
    try:
        numbers = None if weights is None else numbers_in("--weights", weights)
        return _load(folder, ranks, parallel, numbers, check, name, vision)
    except Exception as error:
        ranks.fail(error)
        raise


def _load(
    folder: Path,
    ranks: Ranks,
    parallel: str | None,
    weights: tuple[float, ...] | None,
    check: bool,
    name: str | None,
    vision: bool | None,
) -> DiffusionGemma:
    from mlx_diffgemma.distributed.exchange import Exchange
    from mlx_diffgemma.distributed.following import follow
    from mlx_diffgemma.distributed.leading import lead
    from mlx_diffgemma.distributed.loading import load_share

    ranks.agree(fingerprint(folder))
    memories = [memory.available_memory() or 0]
    memories += [told for _, told in sorted(ranks.gather(memories[0]).items())]
    if ranks.leader is not None:
        split = chosen_split(folder, parallel, weights, memories)
        ranks.spread([split.kind, split.weights])
    else:
        kind, shares = ranks.spread(None)
        split = Split(kind, tuple(shares))
    loaded = load_share(folder, split, ranks.rank, check=check, name=name, vision=vision)
    ranks.gather("loaded")
    exchange = Exchange(ranks.group)
    if ranks.leader is not None:
        return lead(loaded.model, loaded.share, exchange, ranks.leader)
    assert ranks.follower is not None
    follow(loaded.model, loaded.share, exchange, ranks.follower.orders())
    raise SystemExit(ranks.end())


def fingerprint(folder: Path) -> dict[str, str]:
    """What tells one checkpoint from another without reading its weights: digests of its config,
    and of the names, shapes and types of its tensors.

    Raises:
        CheckpointError, ConfigError: files are missing or damaged.
    """
    tensors = stored_tensors(folder)
    headers = [[name, tensor.shape, tensor.dtype] for name, tensor in sorted(tensors.items())]
    return {"config.json": _digest(read_config(folder)), "weights": _digest(headers)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def chosen_split(
    folder: Path,
    parallel: str | None,
    weights: tuple[float, ...] | None,
    memories: Sequence[int],
) -> Split:
    """How the model in `folder` is divided.

    Args:
        parallel: kind of the split; None or "auto" takes the fastest that fits, and the last of
            `KINDS` where none does, of which loading then says what is missing.
        weights: a number for each rank; None gives all the same.
        memories: bytes that each rank offers, 0 where it does not say.

    Raises:
        UsageError: there is no such kind, or not one weight for each rank.
    """
    if weights is not None and len(weights) != len(memories):
        raise UsageError(
            f"--weights names {len(weights)} shares, and {len(memories)} processes were started; "
            "give one for each."
        )
    weights = weights or (1.0,) * len(memories)
    if parallel not in (None, AUTO):
        return Split(parallel, weights)
    model = model_in(folder, here=True)
    context = min(_CONTEXT, model.shapes.text.max_position_embeddings)
    found = first_fitting(model, weights, [size or inf for size in memories], context)
    return Split(KINDS[-1], weights) if found is None else found.split

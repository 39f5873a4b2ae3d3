"""`train --plan`: the memory of a run by its parts, and the batches and lengths that fit a Mac."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_diffgemma.cli.training import TrainingJob
    from mlx_diffgemma.distributed.plan import PlannedModel
    from mlx_diffgemma.train.training_memory import TrainingMemory

BATCHES, LENGTHS = (1, 2, 4, 8), (512, 1024, 2048, 4096)
MACS = (32, 64, 128)


def show(job: TrainingJob, *, as_json: bool) -> None:
    """Print the plan on stdout."""
    from mlx_diffgemma.cli.planned import planned_model

    base = planned_model(job.model, job.loading.revision, here=True)
    if as_json:
        print(json.dumps(_as_dict(job, base), indent=2))
    else:
        _print(job, base)


def _estimate(job: TrainingJob, base: PlannedModel, **settings: Any) -> TrainingMemory:
    from mlx_diffgemma.train import training_memory

    length = settings.pop("length", job.config.max_seq_length)
    config = replace(job.config, **settings)
    return training_memory.estimate(
        base.shapes, base.weights, config, length=length, activation_bytes=base.activation_bytes
    )


def _grid(job: TrainingJob, base: PlannedModel) -> list[dict[str, Any]]:
    """Memory in bytes for every batch and length, with and without gradient checkpointing, and the
    Macs (GB) that it fits."""
    from mlx_diffgemma.checkpoint.memory import raised_working_set, working_set

    rows = []
    for checkpoint in (False, True):
        for batch in BATCHES:
            for length in LENGTHS:
                needed = _estimate(
                    job, base, batch_size=batch, grad_checkpoint=checkpoint, length=length
                ).total
                rows.append(
                    {
                        "grad_checkpoint": checkpoint, "batch_size": batch,
                        "max_seq_length": length, "bytes": needed,
                        "fits_gb": [gb for gb in MACS if needed <= working_set(gb)],
                        "fits_gb_with_raised_limit": [
                            gb for gb in MACS if needed <= raised_working_set(gb)
                        ],
                    }
                )  # fmt: skip
    return rows


def _as_dict(job: TrainingJob, base: PlannedModel) -> dict[str, Any]:
    from mlx_diffgemma.train.training_memory import trained_numbers

    config, needed = job.config, _estimate(job, base)
    return {
        "model": job.model,
        "batch_size": config.batch_size,
        "max_seq_length": config.max_seq_length,
        "grad_checkpoint": config.grad_checkpoint,
        "trained_parameters": trained_numbers(base.shapes, config),
        "bytes": {**asdict(needed), "total": needed.total},
        "grid": _grid(job, base),
    }


def _print(job: TrainingJob, base: PlannedModel) -> None:
    from rich.console import Console
    from rich.table import Table

    from mlx_diffgemma.checkpoint.memory import size_text
    from mlx_diffgemma.train.training_memory import trained_numbers

    console, config = Console(highlight=False), job.config
    count = trained_numbers(base.shapes, config)
    console.print(f"{job.model} ({base.note})", soft_wrap=True)
    console.print(
        f"{config.fine_tune_type}, {count:,} parameters trained with {config.optimizer}; batch "
        f"{config.batch_size}, {config.max_seq_length:,} tokens, "
        f"{'with' if config.grad_checkpoint else 'without'} --grad-checkpoint:",
        soft_wrap=True,
    )
    needed = _estimate(job, base)
    parts = Table(show_header=False, box=None)
    parts.add_column()
    parts.add_column(justify="right")
    for name, size in asdict(needed).items():
        parts.add_row(name, size_text(size))
    parts.add_row("in all", size_text(needed.total))
    console.print(parts)
    grid = {
        (row["grad_checkpoint"], row["batch_size"], row["max_seq_length"]): row
        for row in _grid(job, base)
    }
    for checkpoint in (False, True):
        title = f"GB at the peak, {'with' if checkpoint else 'without'} --grad-checkpoint"
        table = Table(title=title, title_justify="left")
        table.add_column("tokens", justify="right")
        for batch in BATCHES:
            table.add_column(f"batch {batch}", justify="right")
        for length in LENGTHS:
            cells = (_cell(grid[checkpoint, batch, length]) for batch in BATCHES)
            table.add_row(f"{length:,}", *cells)
        console.print(table)
    console.print(
        f"Behind each size: the smallest Mac of {', '.join(map(str, MACS))} GB that holds it; in "
        "brackets after raising iogpu.wired_limit_mb to all but 3 GB. Counted, not measured.",
        soft_wrap=True,
    )


def _cell(row: dict[str, Any]) -> str:
    as_is, raised = row["fits_gb"], row["fits_gb_with_raised_limit"]
    if as_is and as_is[0] == raised[0]:
        where = f" {as_is[0]}"
    elif raised:
        where = f" ({raised[0]})"
    else:
        where = " none"
    return f"{row['bytes'] / 1e9:.1f}{where}"

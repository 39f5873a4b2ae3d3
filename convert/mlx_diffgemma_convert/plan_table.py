"""The table that `--plan` shows: sizes and memory of a result before any weight is fetched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.checkpoint.names import module_class, module_path
from mlx_diffgemma_convert.plan import Plan

_ANSWER = 256
_PROMPT = 2048


@dataclass(frozen=True)
class Row:
    """The modules of one class that are stored in one format."""

    kind: str
    format: str
    parameters: int
    bits: float
    nbytes: int


def rows(plan: Plan) -> list[Row]:
    """One row for each module class and format, in the order of their first tensors."""
    sums: dict[tuple[str, str], list[int]] = {}
    for target in plan.targets:
        kind = module_class(module_path(target.name))
        plain = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
        name = target.format.name if target.format.quantized else plain[target.dtype]
        entry = sums.setdefault((kind, name), [0, 0])
        entry[0] += target.rows * target.columns
        entry[1] += sum(stored.nbytes for stored in target.stored(plan.hugging_face))
    return [
        Row(kind, name, count, 8 * size / count, size)
        for (kind, name), (count, size) in sums.items()
    ]


def peak_memory(plan: Plan) -> int:
    """Bytes held while generating 256 tokens with the result after a prompt of 2,048."""
    weights = sum(row.nbytes for row in rows(plan) if row.kind != "vision")
    return memory.estimate(
        plan.config.text,
        weights,
        canvas_length=plan.config.canvas_length,
        sequences=[(_PROMPT, _ANSWER)],
    ).total


def summary(plan: Plan) -> dict[str, Any]:
    """The plan for machines: sizes in bytes, the smallest Macs in GB, and the rows of the table."""
    stored, needed = plan.stored_bytes(), peak_memory(plan)
    as_is, raised = memory.smallest_mac(needed)
    return {
        "source": plan.source.name,
        "revision": plan.source.revision,
        "recipe": plan.recipe.name,
        "files": len(plan.shards),
        "source_bytes": plan.source_bytes,
        "stored_bytes": stored,
        "peak_memory_bytes": needed,
        "smallest_mac_gb": as_is,
        "smallest_mac_gb_with_raised_limit": raised,
        "modules": [row.__dict__ for row in rows(plan)],
    }


def print_plan(plan: Plan) -> None:
    """Draw the table on stdout."""
    from rich.console import Console
    from rich.table import Table

    found = summary(plan)
    table = Table(title=f"{plan.source.name} as {plan.recipe.name}", title_justify="left")
    for name in ("modules", "format"):
        table.add_column(name)
    for name in ("parameters", "bits per weight", "size"):
        table.add_column(name, justify="right")
    for row in rows(plan):
        table.add_row(
            row.kind, row.format, f"{row.parameters:,}", f"{row.bits:.2f}", size_text(row.nbytes)
        )
    parameters = sum(row.parameters for row in rows(plan))
    bits = 8 * found["stored_bytes"] / parameters
    table.add_section()
    table.add_row("total", "", f"{parameters:,}", f"{bits:.2f}", size_text(found["stored_bytes"]))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{found['files']} file{'s' if found['files'] > 1 else ''} from "
        f"{size_text(found['source_bytes'])}; expected peak memory when running "
        f"{size_text(found['peak_memory_bytes'])} (canvas of {plan.config.canvas_length}, prompt "
        f"of {_PROMPT:,} tokens).",
        soft_wrap=True,
    )
    console.print(fits_text(found), soft_wrap=True)


def fits_text(found: dict[str, Any]) -> str:
    """Which Macs run it, in a sentence."""
    as_is = found["smallest_mac_gb"]
    raised = found["smallest_mac_gb_with_raised_limit"]
    if raised is None:
        return "Fits no Mac of today."
    text = f"Fits Macs with {as_is} GB and more" if as_is else "Fits no Mac as it comes"
    if as_is is None or raised < as_is:
        limit = memory.raised_limit_mb(raised)
        text += f"; with {raised} GB after `sudo sysctl iogpu.wired_limit_mb={limit}`"
    return text + "."


def size_text(size: int) -> str:
    """A size to two decimals."""
    return memory.size_text(size, 2)

"""`mlx-diffgemma distributed`: one model over several Macs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_diffgemma.checks import numbers_in
from mlx_diffgemma.cli import errors
from mlx_diffgemma.cli.command import command
from mlx_diffgemma.cli.help_page import PLAIN, PlainCommand
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.reading import shown
from mlx_diffgemma.settings import Setting

if TYPE_CHECKING:
    from rich.table import Table

    from mlx_diffgemma.checkpoint.memory import MemoryEstimate
    from mlx_diffgemma.distributed.plan import PlannedModel, SplitPlan

_MOST_HOSTS = 64
_CONTEXT = 8192
_MARKS = {"yes": "fits", "raised": "fits*", "no": "no"}

app = typer.Typer(cls=errors.Program, no_args_is_help=True, **PLAIN)


@app.callback()
def distributed() -> None:
    """Plan how several Macs share a model."""


@dataclass(frozen=True)
class Macs:
    """The Macs to plan for.

    Raises:
        UsageError: a number is out of range, or the options name different counts of Macs.
    """

    hosts: Annotated[int | None, Setting("Number of Macs; 2 if left out.")] = None
    memory: Annotated[
        str | None,
        Setting(
            "Memory of each Mac in GB, as it is sold: one number, or one for each such as 64,32. "
            "The smallest Macs that do are named if left out."
        ),
    ] = None
    weights: Annotated[
        str | None,
        Setting("Share of each Mac beside the others, such as 2,1; even if left out."),
    ] = None

    def __post_init__(self) -> None:
        counts = {len(numbers) for numbers in (self.shares, self.gigabytes) if len(numbers) > 1}
        if self.hosts is not None:
            counts.add(self.hosts)
        if len(counts) > 1:
            raise UsageError(
                "--hosts, --memory and --weights are of different numbers of Macs "
                f"({', '.join(map(str, sorted(counts)))}); give one number for each Mac."
            )
        if not 1 <= self.count <= _MOST_HOSTS:
            raise UsageError(f"--hosts must be between 1 and {_MOST_HOSTS}, not {self.count}.")
        if any(each != int(each) or not 4 <= each <= 4096 for each in self.gigabytes):
            raise UsageError(
                f"--memory {shown(self.memory)} must be whole GB, between 4 and 4096 for each Mac."
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """What --weights says; nothing if it is left out."""
        return () if self.weights is None else numbers_in("--weights", self.weights)

    @property
    def gigabytes(self) -> tuple[float, ...]:
        """What --memory says; nothing if it is left out."""
        return () if self.memory is None else numbers_in("--memory", self.memory)

    @property
    def count(self) -> int:
        """How many Macs there are."""
        if self.hosts is not None:
            return self.hosts
        longest = max(len(self.shares), len(self.gigabytes))
        return longest if longest > 1 else 2

    @property
    def weight_of_each(self) -> tuple[float, ...]:
        """The share of each Mac beside the others."""
        return self.shares if len(self.shares) > 1 else (1.0,) * self.count

    @property
    def memory_of_each(self) -> tuple[int, ...] | None:
        """Memory of each Mac in GB; None where it was not given."""
        given = tuple(map(int, self.gigabytes))
        return given * self.count if len(given) == 1 else given or None


@app.command("plan", cls=PlainCommand)
@command(
    "mlx-diffgemma distributed plan --hosts 2 --memory 32",
    "mlx-diffgemma distributed plan --recipe 8bit --memory 64,32 --weights 2,1 --context 262144",
    "mlx-diffgemma distributed plan --model my-model --hosts 4 --json",
)
def plan(
    *,
    macs: Macs,
    model: Annotated[
        str | None,
        Setting("Folder or Hugging Face repository to plan for; only its headers are read."),
    ] = None,
    revision: Annotated[str | None, Setting("Branch, tag or commit.")] = None,
    recipe: Annotated[
        str | None,
        Setting("Recipe of the released model to plan for; all recipes if neither is named."),
    ] = None,
    context: Annotated[
        int | None,
        Setting(
            "Tokens of the conversation that is held, answer included; 8192, or as many as the "
            "model can hold, if left out."
        ),
    ] = None,
    json: Annotated[bool, Setting("One JSON object instead of a table.")] = False,
) -> None:
    """Show what each of several Macs would hold of a model, and which splits fit.

    Sizes are counted from shapes, not measured. "tensor" cuts every layer, "experts" the experts
    alone, and "pipeline" gives whole layers to each Mac.
    """
    from mlx_diffgemma.checkpoint.quantization import RECIPES
    from mlx_diffgemma.cli.planned import planned_model, released

    if model is not None and recipe is not None:
        raise UsageError("--recipe is of the released model; drop it or --model.")
    if revision is not None and model is None:
        raise UsageError("--revision goes with --model: add it, or drop --revision.")
    if recipe is not None and recipe not in RECIPES:
        raise UsageError(f"--recipe {shown(recipe)} is unknown; known are {', '.join(RECIPES)}.")
    if model is not None:
        planned = {model: planned_model(model, revision)}
    else:
        names = [recipe] if recipe is not None else list(RECIPES)
        planned = {name: released(name) for name in names}
    longest = min(each.shapes.text.max_position_embeddings for each in planned.values())
    context = min(_CONTEXT, longest) if context is None else context
    if not 1 <= context <= longest:
        raise UsageError(f"--context must be between 1 and {longest:,}, not {context}.")
    found = {name: _plans(each, macs, context) for name, each in planned.items()}
    if json:
        _print_json(macs, context, planned, found)
    elif len(found) == 1:
        _print_ranks(macs, context, planned, found)
    else:
        _print_recipes(macs, context, found)


def _plans(model: PlannedModel, macs: Macs, context: int) -> list[SplitPlan]:
    """The plan of one Mac, and of each kind of split."""
    from mlx_diffgemma.distributed.plan import plan
    from mlx_diffgemma.distributed.shares import KINDS, Split

    splits = [Split.even("tensor", 1)]
    if macs.count > 1:
        splits += [Split(kind, macs.weight_of_each) for kind in KINDS]
    return [plan(model, split, context) for split in splits]


def _name(plan: SplitPlan) -> str:
    return plan.split.kind if plan.split.ranks > 1 else "one Mac"


def _memory(plan: SplitPlan, macs: Macs) -> Sequence[int] | None:
    """Memory of the Macs of a plan; that of the largest where it is a plan of one Mac."""
    each = macs.memory_of_each
    return [max(each)] if each is not None and plan.split.ranks == 1 else each


def _fits(plan: SplitPlan, macs: Macs) -> str:
    """Whether the given Macs hold it, or which Macs do at least."""
    from mlx_diffgemma.checkpoint.memory import smallest_mac

    if not plan.ranks:
        return "-"
    given = _memory(plan, macs)
    if given is not None:
        return _MARKS[plan.fit(given)]
    fullest = max(plan.ranks, key=lambda rank: rank.total)
    as_is, raised = smallest_mac(fullest.total)
    if raised is None:
        return "none"
    return str(as_is) if as_is == raised else f"{raised}*"


def _print_recipes(macs: Macs, context: int, found: dict[str, list[SplitPlan]]) -> None:
    from rich.table import Table

    title = f"GB on the fullest of {macs.count} Macs, {context:,} tokens held{_relative(macs)}"
    table = Table(title=title, title_justify="left")
    table.add_column("recipe")
    for each in next(iter(found.values())):
        table.add_column(_name(each), justify="right")
    for name, plans in found.items():
        cells = (f"{_fullest(each)} {_fits(each, macs)}" if each.ranks else "-" for each in plans)
        table.add_row(name, *cells)
    _print(table, macs, next(iter(found.values())))


def _fullest(plan: SplitPlan) -> str:
    return f"{max(rank.total for rank in plan.ranks) / 1e9:.1f}"


def _print_ranks(
    macs: Macs,
    context: int,
    planned: dict[str, PlannedModel],
    found: dict[str, list[SplitPlan]],
) -> None:
    from rich.table import Table

    from mlx_diffgemma.checkpoint.memory import size_text
    from mlx_diffgemma.distributed.plan import longest_context

    ((name, model),) = planned.items()
    (plans,) = found.values()
    named = model.note if model.note.startswith(name) else f"{name} ({model.note})"
    table = Table(
        title=f"{named}, {context:,} tokens held{_relative(macs)}",
        title_justify="left",
    )
    for column in ("split", "Mac"):
        table.add_column(column)
    for column in ("weights", "prefix", "computing", "in all"):
        table.add_column(column, justify="right")
    known = macs.memory_of_each is not None
    table.add_column("fits" if known else "smallest Mac", justify="right")
    if known:
        table.add_column("longest context", justify="right")
    for each in plans:
        given = _memory(each, macs)
        for rank, needed in enumerate(each.ranks):
            row = [_name(each) if rank == 0 else "", str(rank)]
            row += [size_text(size) for size in _sizes(needed)]
            row.append(_fits(each, macs) if rank == 0 else "")
            if given is not None:
                longest = longest_context(model, each.split, given) if rank == 0 else None
                row.append("" if longest is None else f"{longest:,}")
            table.add_row(*row)
        table.add_section()
    _print(table, macs, plans)


def _sizes(needed: MemoryEstimate) -> tuple[int, int, int, int]:
    """Bytes of weights, of the prefix, of what is computed at a time, and of all of them."""
    return (
        needed.weights,
        needed.prefix,
        max(needed.prefill, needed.step),
        needed.total,
    )


def _relative(macs: Macs) -> str:
    weights = macs.weight_of_each
    return "" if len(set(weights)) == 1 else f", weights {', '.join(f'{w:g}' for w in weights)}"


def _print(table: Table, macs: Macs, plans: Sequence[SplitPlan]) -> None:
    from mlx_diffgemma.cli.output import print_table

    print_table(table)
    for each in plans:
        if each.why_not is not None:
            print(f"{_name(each)}: {each.why_not}")
    if macs.memory_of_each is None:
        print("Behind each size: the smallest Mac in GB that holds it.")
    print(
        "* after raising iogpu.wired_limit_mb to all but 3 GB. Counted, not measured; the vision "
        "tower is not counted."
    )


def _print_json(
    macs: Macs,
    context: int,
    planned: dict[str, PlannedModel],
    found: dict[str, list[SplitPlan]],
) -> None:
    import json

    from mlx_diffgemma.checkpoint.memory import smallest_mac
    from mlx_diffgemma.distributed.plan import longest_context

    models = []
    for name, plans in found.items():
        splits = []
        for each in plans:
            given = _memory(each, macs)
            ranks = []
            for needed in each.ranks:
                weights, prefix, computing, total = _sizes(needed)
                as_is, raised = smallest_mac(total)
                ranks.append(
                    {
                        "weights_bytes": weights, "prefix_bytes": prefix,
                        "computing_bytes": computing, "bytes": total, "smallest_mac_gb": as_is,
                        "smallest_mac_gb_with_raised_limit": raised,
                    }
                )  # fmt: skip
            entry: dict[str, Any] = {
                "split": each.split.kind if each.split.ranks > 1 else None,
                "ranks": ranks,
                "why_not": each.why_not,
            }
            if given is not None:
                entry["fits"] = each.fit(given)
                entry["longest_context"] = longest_context(planned[name], each.split, given)
            splits.append(entry)
        models.append({"model": name, "weights_bytes": planned[name].weights, "splits": splits})
    print(
        json.dumps(
            {
                "hosts": macs.count, "memory_gb": macs.memory_of_each,
                "weights": macs.weight_of_each, "context": context, "models": models,
            },
            indent=2,
        )
    )  # fmt: skip

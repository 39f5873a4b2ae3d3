"""What each of several Macs would hold of a model, in bytes counted from its shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.checkpoint.loading import open_checkpoint
from mlx_diffgemma.checkpoint.memory import MemoryEstimate
from mlx_diffgemma.checkpoint.quantization import Format
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.distributed.shares import KINDS, Split, local_config, shares_of
from mlx_diffgemma.errors import UsageError

STORED = "from the headers of its weights; activations in bf16, as on a GPU"
"""The note of a model whose weights count as stored."""

_STEP_SIZE = 2048  # positions of a prompt that a GPU encodes at a time


@dataclass(frozen=True)
class PlannedModel:
    """A model to plan for, of which nothing is loaded.

    Attributes:
        shapes: its config.
        formats: formats of its quantized modules, by path.
        sizes: bytes of each parameter of the text model, or of each stored tensor, by name.
        activation_bytes: bytes of one number of an activation.
        note: what the figures are taken from.
    """

    shapes: ModelConfig
    formats: Mapping[str, Format]
    sizes: Mapping[str, int]
    activation_bytes: int
    note: str

    @property
    def weights(self) -> int:
        """Bytes of all weights of the text model."""
        return sum(self.sizes.values())


@dataclass(frozen=True)
class SplitPlan:
    """What the ranks of a split need.

    Attributes:
        split: how the model is divided.
        ranks: memory of each rank; none where the model cannot be divided so.
        why_not: why it cannot be divided so.
    """

    split: Split
    ranks: tuple[MemoryEstimate, ...]
    why_not: str | None = None

    def fits_in(self, limits: Sequence[float]) -> bool:
        """Whether the ranks hold it where each may take as many bytes as its limit says."""
        return bool(self.ranks) and all(
            rank.total <= limit for rank, limit in zip(self.ranks, limits, strict=True)
        )

    def fit(self, macs: Sequence[int]) -> str:
        """Whether Macs with so many binary gigabytes, one for each rank, hold it: "yes", "raised"
        where Metal's limit must be raised to all but 3 GB on one of them, or "no"."""
        if self.fits_in([memory.working_set(gb) for gb in macs]):
            return "yes"
        return "raised" if self.fits_in([memory.raised_working_set(gb) for gb in macs]) else "no"


def model_in(folder: Path, *, here: bool) -> PlannedModel:
    """The model in a folder, from the headers of its weights.

    Args:
        here: whether to count what it takes as loaded on this machine; else it counts as stored,
            with activations in 16 bits.

    Raises:
        CheckpointError, ConfigError: the folder holds no model, or a damaged one.
    """
    opened = open_checkpoint(folder)
    sizes, formats = opened.sizes(as_stored=not here), opened.formats()
    if not here:
        return PlannedModel(opened.config, formats, sizes, 2, STORED)
    item = 2 if opened.dtype is None else opened.dtype.size
    note = "from the headers of its weights, as loaded on this machine"
    return PlannedModel(opened.config, formats, sizes, item, note)


def plan(model: PlannedModel, split: Split, context: int) -> SplitPlan:
    """Count what each rank needs to hold its weights and one sequence of `context` positions, the
    answer included, and to run a denoising step. The vision tower is not counted."""
    try:
        shares = shares_of(model.shapes, split, model.formats)
    except UsageError as error:
        return SplitPlan(split, (), str(error))
    canvas = model.shapes.canvas_length
    return SplitPlan(
        split,
        tuple(
            memory.estimate(
                local_config(share).text,
                share.held_bytes(model.sizes),
                canvas_length=canvas,
                sequences=[(max(0, context - canvas), canvas)],
                activation_bytes=model.activation_bytes,
                step_size=_STEP_SIZE,
            )
            for share in shares
        ),
    )


def longest_context(model: PlannedModel, split: Split, macs: Sequence[int]) -> int:
    """The longest sequence, in whole canvases, that Macs with so many binary gigabytes hold after
    raising Metal's limit; 0 where they do not hold the model."""
    canvas = model.shapes.canvas_length
    low, high = 0, model.shapes.text.max_position_embeddings // canvas
    while low < high:
        middle = (low + high + 1) // 2
        if plan(model, split, middle * canvas).fit(macs) == "no":
            high = middle - 1
        else:
            low = middle
    return low * canvas


def first_fitting(
    model: PlannedModel, weights: Sequence[float], limits: Sequence[float], context: int
) -> SplitPlan | None:
    """The plan of the first kind of split, from the one with the fastest steps on, that ranks with
    so many bytes of memory hold; None if none fits."""
    plans = (plan(model, Split(kind, tuple(weights)), context) for kind in KINDS)
    return next((each for each in plans if each.fits_in(limits)), None)

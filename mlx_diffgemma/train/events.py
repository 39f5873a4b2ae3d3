"""What the training loop reports while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Report:
    """How the optimizer steps since the last report went; losses and norm are means over them.

    Attributes:
        step: optimizer steps done, from 1.
        loss: what is minimized: `canvas_loss` + weight · `encoder_loss`, in nats a token.
        canvas_loss: cross-entropy over the whole canvas.
        encoder_loss: next-token cross-entropy of the encoder; 0 where it has no weight.
        learning_rate: rate of the last step.
        grad_norm: norm of all gradients together, before clipping.
        tokens: ids of sequences and canvases since the run began, earlier sittings included.
        tokens_per_second, examples_per_second: pace without evaluations and saves.
        peak_memory: most memory held so far, in GB (1e9 bytes).
        seconds_left: seconds that the remaining steps take at the pace of this report.
    """

    step: int
    loss: float
    canvas_loss: float
    encoder_loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    examples_per_second: float
    peak_memory: float
    seconds_left: float


@dataclass(frozen=True)
class Evaluation:
    """How the model does on held-out examples.

    Attributes:
        step: optimizer steps done.
        loss: mean canvas loss over the noise levels, in nats a token; NaN where it was not
            measured.
        by_noise: canvas loss by the share of corrupted tokens; empty where it was not measured.
        encoder_loss: next-token cross-entropy of the encoder; 0 where it has no weight.
        exact: share of held-out responses that generation gives exactly; None if not asked for.
    """

    step: int
    loss: float
    encoder_loss: float
    by_noise: Mapping[float, float] = field(default_factory=dict)
    exact: float | None = None


@dataclass(frozen=True)
class Saved:
    """The trained weights are on the disk at `path`, and the state of the run is beside them."""

    step: int
    path: Path


@dataclass(frozen=True)
class Finished:
    """All steps are done. `seconds` is the time of this sitting."""

    step: int
    seconds: float


Event = Report | Evaluation | Saved | Finished

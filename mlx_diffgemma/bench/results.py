"""What a run of the benchmark found, for machines; times in seconds, sizes in bytes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from mlx_diffgemma.bench.constraint import ConstraintCost
from mlx_diffgemma.bench.device import Device
from mlx_diffgemma.bench.prefill import PrefillReport
from mlx_diffgemma.bench.rival import RivalReport
from mlx_diffgemma.bench.speed import ProfileLimit, ProfileSpeed, TwinReport
from mlx_diffgemma.bench.steps import StepReport


@dataclass(frozen=True)
class ModelReport:
    """The model that was measured.

    Attributes:
        name: as the user gave it.
        layers: number of its layers.
        format: format of its weights: a recipe, "4 bits", "unquantized", or "as stored".
        weights: bytes of its weights.
        random: whether the weights were drawn at random.
    """

    name: str
    layers: int
    format: str
    weights: int
    random: bool


@dataclass(frozen=True)
class BenchReport:
    """Everything that one run measured; `speeds` with a checkpoint, `limits` with random weights.

    Attributes:
        profile: name of the profile under which the step was measured.
        load: how busy the machine was, as its average number of runnable processes per core over
            the last minute; None where the system does not say.
    """

    model: ModelReport
    device: Device
    profile: str
    seed: int
    load: float | None
    prefill: tuple[PrefillReport, ...]
    step: StepReport
    constraints: tuple[ConstraintCost, ...] = ()
    speeds: tuple[ProfileSpeed, ...] = ()
    limits: tuple[ProfileLimit, ...] = ()
    rivals: tuple[RivalReport, ...] = ()
    twins: tuple[TwinReport, ...] = ()

    def as_json(self) -> str:
        """One JSON object on one line."""
        return json.dumps(asdict(self))

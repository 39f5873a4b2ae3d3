"""Settings of a training run. Those that mean the same as in mlx-lm have mlx-lm's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from mlx_diffgemma.checks import (
    check_choice,
    check_integer,
    check_number,
    check_share,
    overridden,
)
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.settings import Setting

OPTIMIZERS = ("adam", "adamw", "muon", "sgd", "adafactor")
SCHEDULES = ("cosine", "constant", "linear")
KINDS = ("lora", "dora", "full")
EVALUATED_NOISE = (0.2, 0.5, 0.8, 1.0)
"""Noise levels, as shares of corrupted tokens, at which held-out loss is measured."""


_ADAPTERS, _STEPS, _OBJECTIVE, _REPORTS = "Adapters", "Steps", "Objective", "Reports"


@dataclass(frozen=True)
class LoraParameters:
    """Settings of the adapters, which are mlx-lm's `lora_parameters`.

    Raises:
        UsageError: a setting is out of range.
    """

    rank: Annotated[int, Setting("Rank of the adapters.", panel=_ADAPTERS)] = 16
    scale: Annotated[
        float, Setting("Factor that the adapters are multiplied with.", panel=_ADAPTERS)
    ] = 2.0
    dropout: Annotated[
        float, Setting("Share of the adapters' inputs that dropout sets to zero.", panel=_ADAPTERS)
    ] = 0.0
    keys: Annotated[
        tuple[str, ...] | None,
        Setting(
            "Modules to adapt, such as attention, mlp, experts, self_conditioning, "
            "attention.q_proj or layers[-4:].mlp; it may be given several times.",
            ("--target",),
            _ADAPTERS,
            "attention, mlp",
        ),
    ] = None

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 1)
        check_number("scale", self.scale, 0.0)
        check_share("dropout", self.dropout, below=True)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; the annotation of a field says what it means.

    Attributes:
        decay: share of the steps after the warm-up over which the schedule falls, which are the
            last ones. Before them the rate stays at its peak, so that a run can still be made
            longer.
        sorted_batches: batches that are drawn together and sorted by length, so that few positions
            are padding; 1 sorts nothing.
        optimizer_config: arguments for the optimizer by name, as in `mlx.optimizers`.
        lora_parameters: shape of the adapters.
        compile: whether the operations of a step are fused; None fuses them on a GPU only. On a
            CPU that takes g++ and a minute the first time, and saves a tenth to a fifth after it.

    Raises:
        UsageError: a setting is out of range.
    """

    batch_size: Annotated[
        int, Setting("Examples of one forward and backward pass.", panel=_STEPS)
    ] = 4
    iters: Annotated[int, Setting("Optimizer steps of the run.", panel=_STEPS)] = 1000
    val_batches: Annotated[
        int, Setting("Batches of held-out examples in an evaluation; -1 takes all.", panel=_REPORTS)
    ] = 25
    learning_rate: Annotated[float, Setting("Peak learning rate.", panel=_STEPS)] = 1e-4
    lr_schedule: Annotated[
        str,
        Setting(
            f"Schedule of the learning rate after the warm-up: {', '.join(SCHEDULES)}.",
            panel=_STEPS,
        ),
    ] = "cosine"
    decay: float = 1.0
    warmup: Annotated[
        int, Setting("Steps over which the learning rate rises from 0 to its peak.", panel=_STEPS)
    ] = 0
    final_learning_rate: Annotated[
        float, Setting("Learning rate of the last step, as a share of the peak.", panel=_STEPS)
    ] = 0.0
    steps_per_report: Annotated[
        int, Setting("Steps from one line about the loss to the next; 0 for none.", panel=_REPORTS)
    ] = 10
    steps_per_eval: Annotated[
        int, Setting("Steps from one evaluation to the next; 0 for none.", panel=_REPORTS)
    ] = 200
    save_every: Annotated[
        int, Setting("Steps from one save to the next; 0 saves at the end alone.", panel=_REPORTS)
    ] = 100
    sorted_batches: int = 8
    max_seq_length: Annotated[
        int,
        Setting("Most tokens of a prompt and response; longer examples are refused.", panel=_STEPS),
    ] = 2048
    grad_checkpoint: Annotated[
        bool,
        Setting(
            "Less memory for a third more time: layers are computed again for the gradient.",
            panel=_STEPS,
        ),
    ] = False
    grad_accumulation_steps: Annotated[
        int,
        Setting(
            "Batches whose gradients are averaged into one step; processes share them.",
            panel=_STEPS,
        ),
    ] = 1
    clear_cache_threshold: Annotated[
        int,
        Setting(
            "Bytes of unused memory from which it is given back after a step; 0 keeps it.",
            panel=_STEPS,
        ),
    ] = 0
    optimizer: Annotated[str, Setting(f"Optimizer: {', '.join(OPTIMIZERS)}.", panel=_STEPS)] = (
        "adamw"
    )
    optimizer_config: Mapping[str, Any] = field(default_factory=dict)
    clip_norm: Annotated[
        float | None, Setting("Largest norm of all gradients together.", panel=_STEPS)
    ] = 1.0
    seed: Annotated[int, Setting("Number that every random choice follows from.", panel="Run")] = 0
    fine_tune_type: Annotated[
        str, Setting(f"Kind of fine-tuning: {', '.join(KINDS)}.", panel=_ADAPTERS)
    ] = "lora"
    num_layers: Annotated[
        int, Setting("Layers to adapt, counted from the last; -1 for all.", panel=_ADAPTERS)
    ] = -1
    lora_parameters: LoraParameters = field(default_factory=LoraParameters)
    mask_prompt: Annotated[
        bool, Setting("Encoder's loss on the response alone, without the prompt.", panel=_OBJECTIVE)
    ] = True
    encoder_loss_weight: Annotated[
        float,
        Setting(
            "Weight of the encoder's next-token loss; 0 saves its computation.", panel=_OBJECTIVE
        ),
    ] = 1.0
    self_conditioning: Annotated[
        float,
        Setting("Share of the examples whose decoder sees its own first guess.", panel=_OBJECTIVE),
    ] = 0.5
    span_fraction: Annotated[
        float,
        Setting(
            "Share of the examples that are corrupted in one contiguous span.", panel=_OBJECTIVE
        ),
    ] = 0.0
    min_noise: Annotated[
        float,
        Setting("Smallest share t of corrupted tokens; t ~ U(min_noise, 1).", panel=_OBJECTIVE),
    ] = 1e-4
    compile: bool | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "iters", "max_seq_length", "grad_accumulation_steps",
                     "sorted_batches"):  # fmt: skip
            check_integer(name, getattr(self, name), 1)
        for name in ("steps_per_report", "steps_per_eval", "save_every", "warmup", "seed",
                     "clear_cache_threshold"):  # fmt: skip
            check_integer(name, getattr(self, name), 0)
        for name in ("val_batches", "num_layers"):
            if getattr(self, name) != -1:
                check_integer(name, getattr(self, name), 1)
        check_number("learning_rate", self.learning_rate, 0.0)
        check_number("encoder_loss_weight", self.encoder_loss_weight, 0.0, inclusive=True)
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, 0.0)
        for name in ("decay", "final_learning_rate", "self_conditioning", "span_fraction"):
            check_share(name, getattr(self, name))
        check_share("min_noise", self.min_noise, below=True)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("lr_schedule", self.lr_schedule, SCHEDULES)
        check_choice("fine_tune_type", self.fine_tune_type, KINDS)
        if self.warmup > self.iters:
            raise UsageError(f"warmup ({self.warmup}) must not be above iters ({self.iters}).")

    def override(self, **settings: Any) -> TrainConfig:
        """A copy with the settings that are not None replaced.

        Raises:
            UsageError: a setting is unknown or out of range.
        """
        return overridden(self, settings)

"""How a model is trained: mlx-lm's names where they mean the same, ours for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_diffgemma.checks import (
    check_choice,
    check_integer,
    check_number,
    check_share,
    overridden,
)
from mlx_diffgemma.errors import UsageError

OPTIMIZERS = ("adam", "adamw", "muon", "sgd", "adafactor")
SCHEDULES = ("cosine", "constant", "linear")
KINDS = ("lora", "dora", "full")
EVALUATED_NOISE = (0.2, 0.5, 0.8, 1.0)
"""Noise levels at which held-out loss is measured."""


@dataclass(frozen=True)
class LoraParameters:
    """mlx-lm's `lora_parameters`; `keys` names the modules of a layer, None takes the default."""

    rank: int = 16
    scale: float = 2.0
    dropout: float = 0.0
    keys: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 1)
        check_number("scale", self.scale, 0.0)
        check_share("dropout", self.dropout, below=True)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        batch_size: examples of one forward and backward pass.
        iters: optimizer steps.
        val_batches: batches of held-out examples in an evaluation; -1 takes all.
        learning_rate: at its highest.
        lr_schedule: what follows the warm-up: "cosine" or "linear" down to `final_learning_rate`,
            or "constant".
        decay: share of the steps after the warm-up that the schedule takes, the last ones; before,
            the rate stays at its highest, so that a run can still be made longer.
        warmup: steps over which the learning rate rises from 0.
        final_learning_rate: what the schedule ends with, as a share of `learning_rate`.
        steps_per_report, steps_per_eval, save_every: how often; 0 for never (the end is saved
            in any case).
        sorted_batches: batches that are drawn together and sorted by length, so that few positions
            are padding; 1 sorts nothing.
        max_seq_length: most tokens of a prompt and response; longer examples are refused.
        grad_checkpoint: keep only the inputs of layers, and compute them again for the gradient.
        grad_accumulation_steps: batches whose gradients are averaged into one step; several
            processes share them, so a multiple of their number.
        clear_cache_threshold: bytes of unused memory from which it is given back after a step;
            0 keeps it.
        optimizer: one of `OPTIMIZERS`.
        optimizer_config: arguments for it by name, as in `mlx.optimizers`.
        clip_norm: largest norm of all gradients together; None for no limit.
        seed: of every random choice.
        fine_tune_type: "lora", "dora" or "full".
        num_layers: layers to adapt, from the last; -1 for all.
        lora_parameters: of the adapters.
        mask_prompt: leave the prompt out of the encoder's loss.
        encoder_loss_weight: of the encoder's next-token loss; 0 saves its computation.
        self_conditioning: share of the examples whose decoder sees its own first guess.
        span_fraction: share of the examples that are corrupted in one contiguous span.
        compile: fuse the operations of a step (on a CPU with g++, a minute the first time, then
            a tenth to a fifth faster); None for on a GPU only.
        min_noise: smallest share t of corrupted tokens; t ~ U(min_noise, 1).
    """

    batch_size: int = 4
    iters: int = 1000
    val_batches: int = 25
    learning_rate: float = 1e-4
    lr_schedule: str = "cosine"
    decay: float = 1.0
    warmup: int = 0
    final_learning_rate: float = 0.0
    steps_per_report: int = 10
    steps_per_eval: int = 200
    save_every: int = 100
    sorted_batches: int = 8
    max_seq_length: int = 2048
    grad_checkpoint: bool = False
    grad_accumulation_steps: int = 1
    clear_cache_threshold: int = 0
    optimizer: str = "adamw"
    optimizer_config: Mapping[str, Any] = field(default_factory=dict)
    clip_norm: float | None = 1.0
    seed: int = 0
    fine_tune_type: str = "lora"
    num_layers: int = -1
    lora_parameters: LoraParameters = field(default_factory=LoraParameters)
    mask_prompt: bool = True
    encoder_loss_weight: float = 1.0
    self_conditioning: float = 0.5
    span_fraction: float = 0.0
    min_noise: float = 1e-4
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

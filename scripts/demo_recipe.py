"""The recipe of a run of `train_demo.py`, as settings of the training loop and as its examples."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_diffgemma.train.config import TrainConfig
    from mlx_diffgemma.train.examples import Stream

MICRO_BATCH = 16
"""Examples that a process computes at once."""


@dataclass(frozen=True)
class Recipe:
    """What decides the course of a run.

    Attributes:
        examples: how many there are to be, from the beginning.
        shares: of the tasks among them.
        ramp: the share of the examples over which they become as hard as those of an exam.
        batch: examples of an optimizer step.
        rate: learning rate of the matrices (Muon); that of the rest is a tenth of it (Adam).
        decay: share of the examples over which the rates fall to nothing, at the end.
        encoder: weight of the encoder's loss, which the shipped model was trained without.
        seed: of everything.
    """

    examples: int = 160_000
    shares: Mapping[str, float] = field(
        default_factory=lambda: {
            "one": 0.35, "two": 0.3, "bare": 0.1,
            "record": 0.07, "sort": 0.06, "count": 0.06, "fill": 0.06,
        }
    )  # fmt: skip
    ramp: float = 0.2
    batch: int = 32
    rate: float = 0.02
    decay: float = 0.3
    encoder: float = 0.0
    seed: int = 0


def training(recipe: Recipe) -> TrainConfig:
    """The recipe as settings of the training loop."""
    from mlx_diffgemma.train.config import TrainConfig

    steps = recipe.examples // recipe.batch
    return TrainConfig(
        batch_size=MICRO_BATCH,
        grad_accumulation_steps=recipe.batch // MICRO_BATCH,
        compile=shutil.which("g++") is not None or None,
        iters=steps,
        optimizer="muon",
        optimizer_config={"weight_decay": 0.02},
        learning_rate=recipe.rate,
        lr_schedule="linear",
        decay=recipe.decay,
        warmup=min(60, steps),
        fine_tune_type="full",
        encoder_loss_weight=recipe.encoder,
        min_noise=0.01,
        span_fraction=0.25,
        seed=recipe.seed,
        steps_per_report=50,
        steps_per_eval=1000,
        save_every=100,
    )


def recipe_of(folder: Path) -> Recipe:
    """The recipe of the run in `folder`, or the usual one."""
    path = folder / "recipe.json"
    return Recipe(**json.loads(path.read_text())) if path.exists() else Recipe()


def stream_of(recipe: Recipe, tokenizer: Any) -> Stream:
    """The examples of a run, by number."""
    from exercises.tasks import Curriculum
    from mlx_diffgemma.text.control_tokens import control_tokens_of
    from mlx_diffgemma.text.prompt import encode_prompt
    from mlx_diffgemma.text.response import encode_response, end_of_turn
    from mlx_diffgemma.text.tokenizer import hf_tokenizer
    from mlx_diffgemma.train.examples import Example

    curriculum = Curriculum(recipe.shares, round(recipe.ramp * recipe.examples), recipe.seed)
    controls, end = control_tokens_of(hf_tokenizer(tokenizer)), end_of_turn(tokenizer)

    def stream(first: int, count: int) -> list[Example]:
        examples = []
        for number in range(first, first + count):
            exercise = curriculum[number]
            prompt = encode_prompt(tokenizer, exercise.prompt)
            response = encode_response(controls, exercise.answer, end)
            examples.append(Example((*prompt, *response), len(prompt)))
        return examples

    return stream

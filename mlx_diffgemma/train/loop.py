"""The training loop: a generator of events. It prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.train.config import TrainConfig
from mlx_diffgemma.train.events import Event
from mlx_diffgemma.train.examples import Example, Supply


def train(
    model: DiffusionGemma,
    config: TrainConfig,
    train_examples: Supply,
    valid_examples: Sequence[Example],
    folder: Path,
    *,
    resume: bool = False,
    generate_exact: Callable[[DiffusionGemma], float] | None = None,
) -> Iterator[Event]:
    """Train the trainable parameters of `model`, yielding events as things happen.

    Args:
        train_examples: all there are, or a stream of them.
        valid_examples: held-out examples; none turns the evaluation of the loss off.
        folder: where `adapters.safetensors` (all trainable parameters) and the state go.
        resume: go on from the state in `folder`, where there is one.
        generate_exact: gives the share of held-out responses that generation gets exactly.

    Raises:
        UsageError: an example is too long, or the state is of another run.
        NumericalError: the loss is not finite; the step is named.
    """
    raise NotImplementedError

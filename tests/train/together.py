"""Train on `copy_task` for three steps; the processes of one run are all called like this:

    python together.py FOLDER BATCHES_A_STEP

Prints what happened, a line an event.
"""

from __future__ import annotations

import sys
from pathlib import Path

from training import copies, small_model

from mlx_diffgemma.errors import DiffGemmaError
from mlx_diffgemma.train.config import TrainConfig
from mlx_diffgemma.train.loop import train

CONFIG = TrainConfig(
    batch_size=2,
    sorted_batches=1,  # so that the same batches make a step, however many share them
    iters=3,
    learning_rate=0.1,
    optimizer="sgd",
    optimizer_config={},
    warmup=1,
    fine_tune_type="full",
    steps_per_report=0,
    steps_per_eval=2,
    save_every=2,
)


def main(folder: Path, batches: int) -> None:
    config = CONFIG.override(grad_accumulation_steps=batches)
    try:
        for event in train(small_model(), config, copies, copies(99, 4), folder, resume=True):
            print(type(event).__name__, event.step, flush=True)
    except DiffGemmaError as error:
        print(error, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

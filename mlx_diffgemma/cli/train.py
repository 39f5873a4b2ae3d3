"""`mlx-diffgemma train`: LoRA, DoRA or full fine-tuning on one's own data."""

from __future__ import annotations

from typing import Annotated

from mlx_diffgemma.cli import training
from mlx_diffgemma.cli.command import Only, command
from mlx_diffgemma.cli.settings import Loading
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.settings import Setting


@command(
    "mlx-diffgemma train --model demo --data my-data --iters 500",
    "mlx-diffgemma train --model demo --data my-data --plan",
    "mlx-diffgemma train --model demo --data my-data --config lora.yaml --rank 8",
)
def train(
    *,
    loading: Annotated[Loading, Only("model", "revision", "chat_template", "trust_remote_code")],
    run: training.Run,
    plan: Annotated[
        bool, Setting("Memory that the run would take; nothing is loaded or trained.", panel="Run")
    ] = False,
    json: Annotated[bool, Setting("Plan as one JSON object.", panel="Run")] = False,
) -> None:
    """Fine-tune a model on prompts and responses; writes adapters for --adapter-path and fuse.

    Data are JSON lines as mlx-lm's: {"messages": [...]}, {"prompt": ..., "completion": ...} or
    {"text": ...}. A quantized base stays as it is (QLoRA).
    """
    if json and not plan:
        raise UsageError("--json is about the plan; add --plan.")
    job = training.gather(loading, run)
    if plan:
        from mlx_diffgemma.cli.training_plan import show

        show(job, as_json=json)
    else:
        training.run(job)

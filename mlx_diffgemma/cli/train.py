"""`mlx-diffgemma train`: LoRA, DoRA or full fine-tuning on one's own data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_diffgemma.cli import errors, options
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.train.config import KINDS, OPTIMIZERS, SCHEDULES, LoraParameters, TrainConfig

_RUN, _ADAPTERS, _STEPS, _OBJECTIVE, _REPORTS = (
    "Run", "Adapters", "Steps", "Objective", "Reports",
)  # fmt: skip
_DEFAULT, _LORA = TrainConfig(), LoraParameters()


def _option(*names: str, help: str, panel: str, default: Any = None) -> Any:
    shown = False if default is None else str(default)
    return typer.Option(*names, help=help, show_default=shown, rich_help_panel=panel)


def _setting(name: str, help: str, panel: str) -> Any:
    """The option for a field of `TrainConfig`; left out, a file says it, or the default."""
    default = getattr(_DEFAULT, name)
    return _option(f"--{name.replace('_', '-')}", help=help, panel=panel, default=default)


def _flag(name: str, help: str, panel: str) -> Any:
    flag = name.replace("_", "-")
    return _option(f"--{flag}/--no-{flag}", help=help, panel=panel, default=getattr(_DEFAULT, name))


def train(
    ctx: typer.Context,
    model: options.Model = None,
    revision: options.Revision = None,
    data: Annotated[
        str | None,
        _option(
            "--data",
            help="Folder with train.jsonl (and valid.jsonl, test.jsonl), or a "
            "Hugging Face data set.",
            panel=_RUN,
        ),
    ] = None,
    adapter_path: Annotated[
        Path | None,
        _option("--adapter-path", help="Folder to write.", panel=_RUN, default="adapters"),
    ] = None,
    config: Annotated[
        Path | None,
        _option("--config", "-c", help="YAML file with settings, as mlx-lm's.", panel=_RUN),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run in --adapter-path.", rich_help_panel=_RUN
        ),
    ] = False,
    resume_adapter_file: Annotated[
        Path | None,
        _option("--resume-adapter-file", help="Begin with the adapters in this file.", panel=_RUN),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Say what memory it takes; load and train nothing.", rich_help_panel=_RUN
        ),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="The plan as one JSON object.", rich_help_panel=_RUN)
    ] = False,
    test: Annotated[
        bool | None, _option("--test", help="Measure the test split at the end.", panel=_RUN)
    ] = None,
    test_batches: Annotated[
        int | None,
        _option("--test-batches", help="Of the test split; -1 for all.", panel=_RUN, default=500),
    ] = None,
    chat_template: options.ChatTemplate = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: Annotated[int | None, _setting("seed", "Of every random choice.", _RUN)] = None,
    fine_tune_type: Annotated[
        str | None, _setting("fine_tune_type", f"One of: {', '.join(KINDS)}.", _ADAPTERS)
    ] = None,
    target: Annotated[
        list[str] | None,
        _option(
            "--target",
            help="Modules to adapt (repeatable): attention, mlp, experts, "
            "self_conditioning, attention.q_proj, layers[-4:].mlp, ...",
            panel=_ADAPTERS,
            default="attention, mlp",
        ),
    ] = None,
    num_layers: Annotated[
        int | None, _setting("num_layers", "Layers to adapt, from the last; -1: all.", _ADAPTERS)
    ] = None,
    rank: Annotated[
        int | None,
        _option("--rank", help="Rank of the adapters.", panel=_ADAPTERS, default=_LORA.rank),
    ] = None,
    scale: Annotated[
        float | None,
        _option(
            "--scale", help="What they are multiplied with.", panel=_ADAPTERS, default=_LORA.scale
        ),
    ] = None,
    dropout: Annotated[
        float | None,
        _option("--dropout", help="Before the adapters.", panel=_ADAPTERS, default=_LORA.dropout),
    ] = None,
    iters: Annotated[int | None, _setting("iters", "Optimizer steps.", _STEPS)] = None,
    batch_size: Annotated[int | None, _setting("batch_size", "Examples at once.", _STEPS)] = None,
    grad_accumulation_steps: Annotated[
        int | None, _setting("grad_accumulation_steps", "Batches a step.", _STEPS)
    ] = None,
    max_seq_length: Annotated[
        int | None, _setting("max_seq_length", "Most tokens of prompt and response.", _STEPS)
    ] = None,
    grad_checkpoint: Annotated[
        bool | None, _flag("grad_checkpoint", "Less memory, a third more time.", _STEPS)
    ] = None,
    clear_cache_threshold: Annotated[
        int | None,
        _setting("clear_cache_threshold", "Unused bytes to give back from; 0: never.", _STEPS),
    ] = None,
    optimizer: Annotated[
        str | None, _setting("optimizer", f"One of: {', '.join(OPTIMIZERS)}.", _STEPS)
    ] = None,
    learning_rate: Annotated[
        float | None, _setting("learning_rate", "At its highest.", _STEPS)
    ] = None,
    lr_schedule: Annotated[
        str | None, _setting("lr_schedule", f"One of: {', '.join(SCHEDULES)}.", _STEPS)
    ] = None,
    warmup: Annotated[int | None, _setting("warmup", "Steps up to it.", _STEPS)] = None,
    final_learning_rate: Annotated[
        float | None, _setting("final_learning_rate", "At the end, as a share of it.", _STEPS)
    ] = None,
    clip_norm: Annotated[float | None, _setting("clip_norm", "Of the gradient.", _STEPS)] = None,
    mask_prompt: Annotated[
        bool | None, _flag("mask_prompt", "No encoder loss on the prompt.", _OBJECTIVE)
    ] = None,
    encoder_loss_weight: Annotated[
        float | None, _setting("encoder_loss_weight", "Of next tokens; 0: none.", _OBJECTIVE)
    ] = None,
    self_conditioning: Annotated[
        float | None, _setting("self_conditioning", "Share that sees its first guess.", _OBJECTIVE)
    ] = None,
    span_fraction: Annotated[
        float | None, _setting("span_fraction", "Share corrupted in one span.", _OBJECTIVE)
    ] = None,
    min_noise: Annotated[
        float | None, _setting("min_noise", "Least share of corrupted tokens.", _OBJECTIVE)
    ] = None,
    steps_per_report: Annotated[
        int | None, _setting("steps_per_report", "Steps between two lines.", _REPORTS)
    ] = None,
    steps_per_eval: Annotated[
        int | None, _setting("steps_per_eval", "Steps between evaluations; 0: never.", _REPORTS)
    ] = None,
    val_batches: Annotated[
        int | None, _setting("val_batches", "Of the valid split; -1: all.", _REPORTS)
    ] = None,
    eval_generate: Annotated[
        int | None,
        _option(
            "--eval-generate",
            help="Held-out prompts to answer at each evaluation, for the "
            "share that comes out exactly.",
            panel=_REPORTS,
            default=0,
        ),
    ] = None,
    save_every: Annotated[
        int | None, _setting("save_every", "Steps between saves; 0: at the end.", _REPORTS)
    ] = None,
    report_to: Annotated[
        str | None,
        _option("--report-to", help="wandb, swanlab, or both with a comma.", panel=_REPORTS),
    ] = None,
    project_name: Annotated[
        str | None, _option("--project-name", help="There.", panel=_REPORTS)
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Fine-tune a model on prompts and responses; writes adapters for --adapter-path and fuse.

    Data are JSON lines as mlx-lm's: {"messages": [...]}, {"prompt": ..., "completion": ...} or
    {"text": ...}. A quantized base stays as it is (QLoRA).

    Example: mlx-diffgemma train --data my-data --iters 500
    """
    given = {name: value for name, value in ctx.params.items() if value not in (None, [], ())}

    def body() -> None:
        from mlx_diffgemma.cli import training, training_plan

        if json and not plan:
            raise UsageError("--json is about the plan; add --plan.")
        request = training.gather(given)
        if plan:
            training_plan.show(request, as_json=json)
        else:
            training.run(request)

    errors.run(body, debug=errors.debugging(ctx))

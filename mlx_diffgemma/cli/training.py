"""What `train` does once its options are read: it gathers the settings, opens data and model, and
shows the events of the loop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

from mlx_diffgemma.cli.command import Changes, Of
from mlx_diffgemma.cli.settings import DEFAULT_MODEL, Loading
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.settings import Setting
from mlx_diffgemma.train.config import LoraParameters, TrainConfig

if TYPE_CHECKING:
    from mlx_diffgemma.config import ModelConfig
    from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
    from mlx_diffgemma.train.data import Splits

Given = TypeVar("Given", "Loading", "Run")

_STATE = "state.safetensors"
_KEPT = ("revision", "chat_template", "trust_remote_code")  # of loading, on resuming
_RUN, _REPORTS = "Run", "Reports"


@dataclass(frozen=True)
class Run:
    """What a run works on, where it writes, and what it reports; the fields have mlx-lm's names.

    A field that is left out is taken from the file of settings, else from the run that is resumed,
    else from the defaults.
    """

    data: Annotated[
        str | None,
        Setting(
            "Folder with train.jsonl (and valid.jsonl, test.jsonl), or a Hugging Face data set.",
            panel=_RUN,
        ),
    ] = None
    adapter_path: Annotated[
        Path | None, Setting("Folder to write the adapters to.", panel=_RUN, default="adapters")
    ] = None
    config: Annotated[
        Path | None,
        Setting("YAML file with settings, as mlx-lm's.", ("--config", "-c"), panel=_RUN),
    ] = None
    resume: Annotated[bool, Setting("Continuation of the run in --adapter-path.", panel=_RUN)] = (
        False
    )
    resume_adapter_file: Annotated[
        Path | None, Setting("File with adapters to begin with.", panel=_RUN)
    ] = None
    test: Annotated[
        bool | None, Setting("Test split, measured at the end.", ("--test",), panel=_RUN)
    ] = None
    test_batches: Annotated[
        int | None, Setting("Batches of the test split; -1 for all.", panel=_RUN, default="500")
    ] = None
    eval_generate: Annotated[
        int | None,
        Setting(
            "Number of held-out prompts to answer at each evaluation; the share of "
            "exact answers is reported.",
            panel=_REPORTS,
            default="0",
        ),
    ] = None
    report_to: Annotated[
        str | None,
        Setting("Services to report to: wandb, swanlab, or both with a comma.", panel=_REPORTS),
    ] = None
    project_name: Annotated[
        str | None, Setting("Name of the project at these services.", panel=_REPORTS)
    ] = None
    training: Annotated[Changes, Of(TrainConfig, shows_defaults=True)] = field(
        default_factory=Changes
    )
    adapters: Annotated[Changes, Of(LoraParameters, shows_defaults=True)] = field(
        default_factory=Changes
    )


@dataclass(frozen=True)
class TrainingJob:
    """A run with all its settings, from the command line, a file and an earlier run.

    Attributes:
        config: how to train.
        loading: the base model.
        run: data and reports.
        folder: folder of the adapters.
    """

    config: TrainConfig
    loading: Loading
    run: Run
    folder: Path

    @property
    def model(self) -> str:
        return self.loading.model or DEFAULT_MODEL


def gather(loading: Loading, run: Run) -> TrainingJob:
    """The settings of the command line, over those of `--config`, over those of the run to resume.

    Raises:
        UsageError: a setting is unknown or out of range, or there is nothing to resume.
    """
    from mlx_diffgemma.train.settings_file import normalized, read_yaml

    layers = [] if run.config is None else [read_yaml(run.config.expanduser())]
    written = next((layer["adapter_path"] for layer in layers if layer.get("adapter_path")), None)
    folder = Path(run.adapter_path or written or "adapters").expanduser()
    if run.resume:
        layers.insert(0, normalized(_earlier(folder)))
    read: dict[str, object] = {}
    lora: dict[str, object] = {}
    for layer in layers:
        lora |= layer.pop("lora_parameters", None) or {}
        read |= layer
    training = _named(TrainConfig, read) | run.training
    adapters = LoraParameters(**cast("dict[str, Any]", lora | run.adapters))
    return TrainingJob(
        TrainConfig().override(**training, lora_parameters=adapters),
        _filled(loading, read),
        _filled(run, read),
        folder,
    )


def _named(cls: type[Any], values: Mapping[str, object]) -> dict[str, object]:
    known = {field.name for field in fields(cls)}
    return {name: value for name, value in values.items() if name in known}


def _filled(given: Given, read: Mapping[str, object]) -> Given:
    """Settings of the command line; those that it leaves out are taken from `read`."""
    missing: dict[str, Any] = {
        name: value
        for name, value in _named(type(given), read).items()
        if getattr(given, name) in (None, False)
    }
    return replace(given, **missing)


def _earlier(folder: Path) -> dict[str, Any]:
    from mlx_diffgemma.checkpoint.adapters import CONFIG
    from mlx_diffgemma.reading import read_object

    if not (folder / CONFIG).exists() or not (folder / _STATE).exists():
        raise UsageError(f"{folder} holds no run that could be resumed; leave --resume out.")
    return read_object(folder / CONFIG)


def run(job: TrainingJob) -> None:
    """Read the data, load the model, train, and say on stderr how that goes.

    Raises:
        DiffGemmaError: data, model or settings cannot be used, or memory does not suffice.
        KeyboardInterrupt: Ctrl-C was pressed; how to go on was said on stderr.
    """
    from mlx_diffgemma.checkpoint import locate
    from mlx_diffgemma.checkpoint.loading import load_model, read_config
    from mlx_diffgemma.checkpoint.memory import wired
    from mlx_diffgemma.config import ModelConfig

    if not job.run.data:
        raise UsageError("say what to train on: --data with a folder or a data set.")
    _check_folder(job)
    path = locate.locate(job.model, job.loading.revision)
    shapes = ModelConfig.from_dict(read_config(path))
    splits = _read_data(job, path, shapes)
    _check_memory(job, path, shapes, splits)
    say(f"loading {job.model}")
    model, _ = load_model(path, name=job.model)
    with wired():
        _train(job, model, splits)


def _check_folder(job: TrainingJob) -> None:
    from mlx_diffgemma.checkpoint.adapters import WEIGHTS

    folder = job.folder
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--adapter-path {folder} is a file; name a folder.")
    if not job.run.resume and any((folder / name).exists() for name in (WEIGHTS, _STATE)):
        raise UsageError(
            f"{folder} holds a run already; add --resume to go on with it, or choose another "
            "--adapter-path."
        )


def _read_data(job: TrainingJob, path: Path, shapes: ModelConfig) -> Splits:
    from mlx_diffgemma.text.tokenizer import load_tokenizer
    from mlx_diffgemma.train.data import Limits, load_data

    tokenizer = load_tokenizer(
        path,
        eos_token_ids=list(shapes.end_token_ids()),
        chat_template=job.loading.chat_template,
        trust_remote_code=job.loading.trust_remote_code,
    )
    context = shapes.text.max_position_embeddings
    limits = Limits(job.config.max_seq_length, context, shapes.canvas_length)
    wanted = ["train", "valid", *(["test"] if job.run.test else [])]
    splits = load_data(str(job.run.data), tokenizer, limits, wanted)
    if not splits.valid:
        if job.run.eval_generate:
            raise UsageError("--eval-generate needs held-out examples: add valid.jsonl.")
        say("no valid split: training goes without evaluation.")
    lengths = [len(example.tokens) for example in splits.train]
    say(
        f"{len(lengths)} examples, {sum(lengths):,} tokens, the longest {max(lengths):,}; "
        f"{len(splits.valid)} held out"
    )
    return splits


def _check_memory(job: TrainingJob, path: Path, shapes: ModelConfig, splits: Splits) -> None:
    """Estimate the memory of the run.

    Raises:
        MemoryShortageError: the run does not fit.
    """
    from mlx_diffgemma.checkpoint.loading import weight_bytes
    from mlx_diffgemma.train import training_memory

    longest = max(len(example.tokens) for example in (*splits.train, *splits.valid))
    estimate = training_memory.estimate(
        shapes,
        weight_bytes(path),
        job.config,
        length=longest,
        activation_bytes=training_memory.activation_bytes(),
    )
    training_memory.require(estimate, job.model, job.config)


def _train(job: TrainingJob, model: DiffusionGemma, splits: Splits) -> None:
    from mlx_diffgemma.checkpoint.adapters import fingerprint
    from mlx_diffgemma.train import processes
    from mlx_diffgemma.train.adapt import (
        adapter_config,
        prepare,
        trainable_count,
        write_adapter_config,
    )
    from mlx_diffgemma.train.events import Saved
    from mlx_diffgemma.train.loop import train
    from mlx_diffgemma.train.progress import History, Reporter, line_of

    config, folder = job.config, job.folder
    mark = fingerprint(model)
    if job.run.resume and _earlier(folder).get("fingerprint") != mark:
        raise UsageError(f"{folder} was trained on another base model; load that one.")
    keys = prepare(model, config)
    if job.run.resume_adapter_file:
        _begin_with(model, Path(job.run.resume_adapter_file).expanduser())
    events = train(
        model, config, splits.train, splits.valid, folder,
        resume=job.run.resume, generate_exact=_exact(model, job, splits),
    )  # fmt: skip
    if not processes.is_first():
        for _ in events:
            pass
        return
    content = adapter_config(
        config, model=job.model, data=str(job.run.data), keys=keys, fingerprint=mark
    )
    kept = {name: getattr(job.loading, name) for name in _KEPT}
    kept["eval_generate"] = job.run.eval_generate
    content |= {name: value for name, value in kept.items() if value}
    reporter = Reporter(job.run.report_to, job.run.project_name, folder, content)
    write_adapter_config(folder, content)
    history = History(folder, resume=job.run.resume)
    say(f"training {trainable_count(model):,} parameters; Ctrl-C stops")
    saved = 0
    try:
        for event in events:
            history.add(event)
            reporter.add(event)
            if isinstance(event, Saved):
                saved = event.step
            line = line_of(event, config.iters)
            if line is not None:
                say(line)
    except KeyboardInterrupt:
        history.draw()
        say(_stopped(folder, saved, job.run.resume))
        raise
    if job.run.test:
        _test(model, job, splits)
    chart = history.draw()
    say(f"{folder}: adapters.safetensors{f', {chart.name}' if chart else ''}. Try them:")
    say(f"mlx-diffgemma generate --model {job.model} --adapter-path {folder} -p ...")


def _begin_with(model: DiffusionGemma, path: Path) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    try:
        weights: Any = mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--resume-adapter-file {path} cannot be read ({reason}).") from None
    slots: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    wrong = [n for n, a in weights.items() if n not in slots or a.shape != slots[n].shape]
    if wrong or not weights:
        raise UsageError(
            f"--resume-adapter-file {path} does not fit what is trained now "
            f"({wrong[0] if wrong else 'it is empty'}); use the same model, rank and targets."
        )
    model.load_weights(list(weights.items()), strict=False)


def _exact(
    model: DiffusionGemma, job: TrainingJob, splits: Splits
) -> Callable[[DiffusionGemma], float] | None:
    """A function that gives the share of exact answers to held-out prompts; None where it is not
    wanted."""
    count = job.run.eval_generate or 0
    if count < 1:
        return None
    from mlx_diffgemma.fitting import diffusion_config
    from mlx_diffgemma.train.evaluate import exact_rate

    examples = splits.valid[:count]
    longest = max(len(example.response) for example in examples)
    config = diffusion_config(model, max_tokens=longest)
    return lambda trained: exact_rate(trained, examples, config)


def _test(model: DiffusionGemma, job: TrainingJob, splits: Splits) -> None:
    from dataclasses import replace

    from mlx_diffgemma.train.evaluate import held_out_loss
    from mlx_diffgemma.train.events import Evaluation
    from mlx_diffgemma.train.loop import sizes_of
    from mlx_diffgemma.train.progress import line_of

    batches = job.run.test_batches
    config = replace(job.config, val_batches=500 if batches is None else batches)
    found = held_out_loss(model, splits.test, config, sizes_of(model))
    tested = replace(splits, valid=splits.test)
    exact = _exact(model, job, tested)
    evaluation = Evaluation(
        config.iters, found.mean, found.encoder, found.by_noise, exact(model) if exact else None
    )
    say(f"test split: {line_of(evaluation, config.iters)}")


def _stopped(folder: Path, saved: int, resumed: bool) -> str:
    if not saved and not resumed:
        return "stopped; nothing was saved yet (--save-every says how often)."
    at = f"after step {saved}" if saved else "as they were"
    return (
        f"stopped; adapters and state are saved {at}. Go on with: mlx-diffgemma train --resume "
        f"--adapter-path {folder}"
    )


def say(text: str) -> None:
    """Write a line to stderr; of several processes that train, only the first writes."""
    from mlx_diffgemma.train import processes

    if processes.is_first():
        print(text, file=sys.stderr, flush=True)

"""What `train` does, once its options are read: settings gathered, data and model opened, the
events of the loop shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_diffgemma.cli.options import DEFAULT_MODEL
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.train.config import LoraParameters, TrainConfig

if TYPE_CHECKING:
    from mlx_diffgemma.config import ModelConfig
    from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
    from mlx_diffgemma.train.data import Splits

_STATE = "state.safetensors"
_KEPT = ("revision", "chat_template", "trust_remote_code", "eval_generate")  # on resuming


@dataclass(frozen=True)
class Request:
    """A run as it was asked for.

    Attributes:
        options: what is about the run rather than the training, by mlx-lm's names.
        resume: go on with the run in `folder`.
    """

    config: TrainConfig
    options: Mapping[str, Any]
    folder: Path
    resume: bool

    @property
    def model(self) -> str:
        return str(self.options.get("model") or DEFAULT_MODEL)


def gather(given: Mapping[str, Any]) -> Request:
    """The settings of the command line, over those of `--config`, over those of the run to resume.

    Raises:
        UsageError: one is unknown or out of range, or there is nothing to resume.
    """
    from mlx_diffgemma.train.settings import normalized, read_yaml

    settings: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    layers = [dict(given)]
    if given.get("config"):
        layers.insert(0, read_yaml(given["config"].expanduser()))
    where = next((layer["adapter_path"] for layer in layers[::-1] if layer.get("adapter_path")), "")
    folder = Path(where or "adapters").expanduser()
    resume = bool(given.get("resume"))
    if resume:
        layers.insert(0, normalized(_earlier(folder)))
    for layer in layers:
        lora |= layer.pop("lora_parameters", None) or {}
        settings |= layer
    lora |= {name: settings.pop(name) for name in ("rank", "scale", "dropout") if name in settings}
    if "target" in settings:
        lora["keys"] = tuple(settings.pop("target"))
    known = {field.name for field in fields(TrainConfig)}
    options = {name: settings[name] for name in settings if name not in known}
    config = TrainConfig().override(
        **{name: value for name, value in settings.items() if name in known},
        lora_parameters=LoraParameters(**lora),
    )
    return Request(config, options, folder, resume)


def _earlier(folder: Path) -> dict[str, Any]:
    from mlx_diffgemma.checkpoint.adapters import CONFIG
    from mlx_diffgemma.reading import read_object

    if not (folder / CONFIG).exists() or not (folder / _STATE).exists():
        raise UsageError(f"{folder} holds no run that could be resumed; leave --resume out.")
    return read_object(folder / CONFIG)


def run(request: Request) -> None:
    """Train, from reading the data to the last word.

    Raises:
        DiffGemmaError: in one line.
        KeyboardInterrupt: Ctrl-C; how to go on was said.
    """
    from mlx_diffgemma.checkpoint import locate
    from mlx_diffgemma.checkpoint.loading import load_model, read_config
    from mlx_diffgemma.checkpoint.memory import wired
    from mlx_diffgemma.config import ModelConfig

    options = request.options
    if not options.get("data"):
        raise UsageError("say what to train on: --data with a folder or a data set.")
    _check_folder(request)
    path = locate.locate(request.model, options.get("revision"))
    shapes = ModelConfig.from_dict(read_config(path))
    splits = _read_data(request, path, shapes)
    _check_memory(request, path, shapes, splits)
    say(f"loading {request.model}")
    model, _ = load_model(path, name=request.model)
    with wired():
        _train(request, model, splits)


def _check_folder(request: Request) -> None:
    from mlx_diffgemma.checkpoint.adapters import WEIGHTS

    folder = request.folder
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--adapter-path {folder} is a file; name a folder.")
    if not request.resume and any((folder / name).exists() for name in (WEIGHTS, _STATE)):
        raise UsageError(
            f"{folder} holds a run already; add --resume to go on with it, or choose another "
            "--adapter-path."
        )


def _read_data(request: Request, path: Path, shapes: ModelConfig) -> Splits:
    from mlx_diffgemma.text.tokenizer import load_tokenizer
    from mlx_diffgemma.train.data import Limits, load_data

    options = request.options
    tokenizer = load_tokenizer(
        path,
        eos_token_ids=list(shapes.end_token_ids()),
        chat_template=options.get("chat_template"),
        trust_remote_code=bool(options.get("trust_remote_code")),
    )
    context = shapes.text.max_position_embeddings
    limits = Limits(request.config.max_seq_length, context, shapes.canvas_length)
    wanted = ["train", "valid", *(["test"] if options.get("test") else [])]
    splits = load_data(str(options["data"]), tokenizer, limits, wanted)
    if not splits.valid:
        if options.get("eval_generate"):
            raise UsageError("--eval-generate needs held-out examples: add valid.jsonl.")
        say("no valid split: training goes without evaluation.")
    lengths = [len(example.tokens) for example in splits.train]
    say(
        f"{len(lengths)} examples, {sum(lengths):,} tokens, the longest {max(lengths):,}; "
        f"{len(splits.valid)} held out"
    )
    return splits


def _check_memory(request: Request, path: Path, shapes: ModelConfig, splits: Splits) -> None:
    """Raise MemoryShortageError where the run cannot end well."""
    from mlx_diffgemma.checkpoint.loading import weight_bytes
    from mlx_diffgemma.train import plan

    longest = max(len(example.tokens) for example in (*splits.train, *splits.valid))
    estimate = plan.estimate(
        shapes,
        weight_bytes(path),
        request.config,
        length=longest,
        activation_bytes=plan.activation_bytes(),
    )
    plan.require(estimate, request.model, request.config)


def _train(request: Request, model: DiffusionGemma, splits: Splits) -> None:
    from mlx_diffgemma.checkpoint.adapters import fingerprint
    from mlx_diffgemma.train import processes
    from mlx_diffgemma.train.adapt import prepare, trainable_count
    from mlx_diffgemma.train.adapters import adapter_config, write_adapter_config
    from mlx_diffgemma.train.events import Saved
    from mlx_diffgemma.train.loop import train
    from mlx_diffgemma.train.progress import History, Reporter, line_of

    config, options, folder = request.config, request.options, request.folder
    mark = fingerprint(model)
    if request.resume and _earlier(folder).get("fingerprint") != mark:
        raise UsageError(f"{folder} was trained on another base model; load that one.")
    keys = prepare(model, config)
    if options.get("resume_adapter_file"):
        _begin_with(model, Path(options["resume_adapter_file"]).expanduser())
    events = train(
        model, config, splits.train, splits.valid, folder,
        resume=request.resume, generate_exact=_exact(model, request, splits),
    )  # fmt: skip
    if not processes.is_first():
        for _ in events:
            pass
        return
    content = adapter_config(
        config, model=request.model, data=str(options["data"]), keys=keys, fingerprint=mark
    )
    content |= {name: options[name] for name in _KEPT if options.get(name)}
    reporter = Reporter(options.get("report_to"), options.get("project_name"), folder, content)
    write_adapter_config(folder, content)
    history = History(folder, resume=request.resume)
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
        say(_stopped(folder, saved, request.resume))
        raise
    if options.get("test"):
        _test(model, request, splits)
    chart = history.draw()
    say(f"{folder}: adapters.safetensors{f', {chart.name}' if chart else ''}. Try them:")
    say(f"mlx-diffgemma generate --model {request.model} --adapter-path {folder} -p ...")


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
    model: DiffusionGemma, request: Request, splits: Splits
) -> Callable[[DiffusionGemma], float] | None:
    """What answers held-out prompts, as far as that is wanted."""
    count = request.options.get("eval_generate") or 0
    if count < 1:
        return None
    from mlx_diffgemma.generation import diffusion_config
    from mlx_diffgemma.train.evaluate import exact_rate

    examples = splits.valid[:count]
    longest = max(len(example.response) for example in examples)
    config = diffusion_config(model, max_tokens=longest)
    return lambda trained: exact_rate(trained, examples, config)


def _test(model: DiffusionGemma, request: Request, splits: Splits) -> None:
    from dataclasses import replace

    from mlx_diffgemma.train.evaluate import held_out_loss
    from mlx_diffgemma.train.events import Evaluation
    from mlx_diffgemma.train.loop import sizes_of
    from mlx_diffgemma.train.progress import line_of

    batches = request.options.get("test_batches")
    config = replace(request.config, val_batches=500 if batches is None else batches)
    found = held_out_loss(model, splits.test, config, sizes_of(model))
    tested = replace(splits, valid=splits.test)
    exact = _exact(model, request, tested)
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


def show_plan(request: Request, *, as_json: bool) -> None:
    """Print what memory training takes."""
    from mlx_diffgemma.cli.training_plan import show

    show(request, as_json=as_json)


def say(text: str) -> None:
    """One line on stderr, from the first of the processes that train."""
    from mlx_diffgemma.train import processes

    if processes.is_first():
        print(text, file=sys.stderr, flush=True)

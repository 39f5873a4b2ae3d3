"""`mlx-diffgemma bench`: how fast the model is on this machine, and where the time goes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_diffgemma.bench import openblas as openblas_room
from mlx_diffgemma.checkpoint.locate import RELEASE
from mlx_diffgemma.cli.command import Only, command
from mlx_diffgemma.cli.settings import Loading
from mlx_diffgemma.diffusion.profiles import DEFAULT as DEFAULT_PROFILE
from mlx_diffgemma.diffusion.profiles import profile_settings
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.settings import Setting

if TYPE_CHECKING:
    from mlx_diffgemma.bench.results import BenchReport
    from mlx_diffgemma.bench.run import Plan

RIVAL, TWIN = "mlx-vlm", "mlx-lm"

_MODEL, _WHAT, _BESIDE = "Random weights", "What to measure", "Beside others"


@dataclass(frozen=True)
class Shapes:
    """Random weights: whether to draw them, in whose shapes, and in which format."""

    random: Annotated[
        bool, Setting("Random weights in place of a model that is loaded.", panel=_MODEL)
    ] = False
    like: Annotated[
        str,
        Setting(
            "Shapes of the random model: a built-in name, such as small-262k, or a "
            "folder with a config.json.",
            panel=_MODEL,
        ),
    ] = RELEASE
    layers: Annotated[
        int | None, Setting("Number of layers of the random model; all if left out.", panel=_MODEL)
    ] = None
    bits: Annotated[int | None, Setting("Bits per weight of the random model.", panel=_MODEL)] = (
        None
    )
    recipe: Annotated[
        str | None,
        Setting(
            "Recipe by which the random model is quantized, as the converter names it.",
            panel=_MODEL,
        ),
    ] = None
    dtype: Annotated[
        str | None,
        Setting(
            "Type of the activations; float32 on a CPU, bfloat16 on a GPU if left out.",
            panel=_MODEL,
        ),
    ] = None

    def __post_init__(self) -> None:
        shape = (self.like, self.layers, self.bits, self.recipe, self.dtype)
        if not self.random and shape != (RELEASE, None, None, None, None):
            raise UsageError(
                "--like, --layers, --bits, --recipe and --dtype go with --random: add it, or "
                "drop them."
            )


@dataclass(frozen=True)
class Measuring:
    """What is measured, and how often."""

    prefill: Annotated[str, Setting("Lengths of prompts to encode.", panel=_WHAT)] = "512,2048"
    prefix: Annotated[int, Setting("Tokens before the canvas of a step.", panel=_WHAT)] = 512
    batch: Annotated[
        int, Setting("Number of sequences that are computed together.", panel=_WHAT)
    ] = 1
    profile: Annotated[
        str, Setting("Profile under which the step is taken apart.", panel=_WHAT)
    ] = DEFAULT_PROFILE
    vocabulary_pass: Annotated[
        str | None,
        Setting(
            "Form of the pass over the vocabulary in that step, such as whole; the model's own if "
            "left out.",
            panel=_WHAT,
        ),
    ] = None
    constraints: Annotated[
        bool,
        Setting("Comparison of steps with and without constraints, run in turns.", panel=_WHAT),
    ] = False
    prompt: Annotated[str | None, Setting("Prompt to answer.", ("--prompt", "-p"), panel=_WHAT)] = (
        None
    )
    canvas_length: Annotated[int | None, Setting("Tokens drafted at a time.", panel=_WHAT)] = None
    max_tokens: Annotated[
        int | None,
        Setting("Most tokens to generate for one answer.", ("--max-tokens", "-m"), panel=_WHAT),
    ] = None
    seed: Annotated[int, Setting("Number that random draws follow from.", panel=_WHAT)] = 0
    repeats: Annotated[
        int, Setting("Number of measurements, of which the median counts.", panel=_WHAT)
    ] = 5

    def __post_init__(self) -> None:
        for name in ("prefix", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, not {getattr(self, name)}.")
        profile_settings(self.profile)


@command(
    "mlx-diffgemma bench --model demo",
    "mlx-diffgemma bench --random --like small-262k --bits 4",
    "mlx-diffgemma bench --random --layers 2 --bits 4 --profile exact --json",
)
def bench(
    *,
    twin: Annotated[
        str | None,
        typer.Argument(
            metavar="[TWIN]", help="Autoregressive model for --against mlx-lm.", show_default=""
        ),
    ] = None,
    loading: Annotated[Loading, Only("model", "adapter_path", "parallel", "weights")],
    shapes: Shapes,
    measuring: Measuring,
    against: Annotated[
        tuple[str, ...],
        Setting(
            f"Other program to run in turns: '{RIVAL}' on the same weights, or '{TWIN}' with an "
            "autoregressive model named behind it.",
            panel=_BESIDE,
        ),
    ] = (),
    openblas: Annotated[
        str | None,
        typer.Option(
            "--openblas",
            help="Path of libopenblas.so.0, to put under MLX on a CPU.",
            envvar=openblas_room.VARIABLE,
            rich_help_panel=_BESIDE,
        ),
    ] = None,
    json: Annotated[bool, Setting("One JSON object instead of tables.", panel="Output")] = False,
) -> None:
    """Measure prefill, a denoising step and its parts, speeds and memory, beside what the device
    could do at best."""
    lengths = _lengths(measuring.prefill)
    if shapes.random and loading.model is not None:
        raise UsageError("--model and --random exclude each other: drop one.")
    if loading.adapter_path is not None and (shapes.random or against):
        raise UsageError("--adapter-path goes with --model; fuse it to compare others.")
    if loading.ranks is not None and (shapes.random or against):
        raise UsageError("--random and --against need one Mac alone: drop them, or mlx.launch.")
    rival, twin_model = _others(against, twin)
    blas = openblas_room.load_openblas(openblas) if openblas else None
    from mlx_diffgemma.bench.run import PROMPT, Plan

    _require(rival, measuring.vocabulary_pass)
    plan = Plan(
        prefill=lengths,
        prefix=measuring.prefix,
        batch=measuring.batch,
        canvas_length=measuring.canvas_length,
        repeats=measuring.repeats,
        seed=measuring.seed,
        profile=measuring.profile,
        vocabulary_pass=measuring.vocabulary_pass,
        prompt=measuring.prompt or PROMPT,
        max_tokens=measuring.max_tokens,
        constraints=measuring.constraints,
        rival=rival,
        twin=twin_model,
        blas=blas,
        say=_say,
    )
    report = _measure(loading, shapes, plan)
    if json:
        print(report.as_json())
    else:
        from mlx_diffgemma.bench.table import as_tables
        from mlx_diffgemma.cli.output import print_table

        print_table(as_tables(report))


def _measure(loading: Loading, shapes: Shapes, plan: Plan) -> BenchReport:
    from mlx_diffgemma.bench.run import run_bench

    if not shapes.random:
        from mlx_diffgemma.cli import opening

        opened = opening.open_model(loading)
        return run_bench(opened.model, plan, name=opened.name, tokenizer=opened.tokenizer)
    from mlx_diffgemma.bench.presets import config_like
    from mlx_diffgemma.bench.random_model import chosen_dtype, chosen_recipe, random_model
    from mlx_diffgemma.config import ModelConfig

    config = ModelConfig.from_dict(config_like(shapes.like, shapes.layers))
    recipe, dtype = chosen_recipe(shapes.bits, shapes.recipe), chosen_dtype(shapes.dtype)
    _say("drawing weights")
    drawn = random_model(config, recipe, dtype, plan.seed)
    return run_bench(drawn, plan, name=shapes.like, weights_format=recipe.name)


def _lengths(text: str) -> tuple[int, ...]:
    """The lengths in a text such as `512,2048`.

    Raises:
        UsageError: it is no list of numbers from 1.
    """
    try:
        lengths = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        lengths = (0,)
    if any(length < 1 for length in lengths):
        raise UsageError(f"--prefill '{text}' is no list of lengths; write 512,2048.")
    return lengths


def _others(against: Sequence[str], twin: str | None) -> tuple[bool, str | None]:
    """Whether to run mlx-vlm, and the model to run mlx-lm with, or None.

    Raises:
        UsageError: a program is unknown, or --against mlx-lm and its model do not come together.
    """
    for name in against:
        if name not in (RIVAL, TWIN):
            raise UsageError(f"--against '{name}' is unknown; known are {RIVAL} and {TWIN} MODEL.")
    if (TWIN in against) != (twin is not None):
        missing = "a model" if twin is None else f"--against {TWIN}"
        raise UsageError(f"{missing} is missing; write --against {TWIN} MODEL.")
    return RIVAL in against, twin


def _require(rival: bool, vocabulary_pass: str | None) -> None:
    """Raise the errors of these options now, before weights are loaded.

    Raises:
        CheckpointError: mlx-vlm is wanted and not installed.
        UsageError: there is no such pass over the vocabulary.
    """
    from mlx_diffgemma.bench.rival import rival_version
    from mlx_diffgemma.bench.steps import vocabulary_pass_named

    if rival:
        rival_version()
    if vocabulary_pass is not None:
        vocabulary_pass_named(vocabulary_pass)


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)

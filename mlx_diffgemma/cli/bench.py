"""`mlx-diffgemma bench`: how fast is it here, where does the time go, how far is the floor?"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_diffgemma.bench import openblas as openblas_room
from mlx_diffgemma.checkpoint.locate import RELEASE
from mlx_diffgemma.cli import errors, options
from mlx_diffgemma.diffusion.profiles import DEFAULT as DEFAULT_PROFILE
from mlx_diffgemma.diffusion.profiles import profile_settings
from mlx_diffgemma.errors import UsageError

if TYPE_CHECKING:
    from mlx_diffgemma.bench.report import BenchReport
    from mlx_diffgemma.bench.run import Plan

RIVAL, TWIN = "mlx-vlm", "mlx-lm"

_MODEL, _WHAT, _BESIDE = "Random weights", "What to measure", "Beside others"
_OUTPUT = "Output"


@dataclass(frozen=True)
class Shapes:
    """Random weights: in whose shapes, how many layers, and in which format."""

    like: str
    layers: int | None
    bits: int | None
    recipe: str | None
    dtype: str | None


def bench(
    ctx: typer.Context,
    twin: Annotated[
        str | None,
        typer.Argument(
            metavar="[TWIN]", help="The autoregressive model for --against mlx-lm.", show_default=""
        ),
    ] = None,
    model: options.Model = None,
    adapter_path: options.AdapterPath = None,
    random: Annotated[
        bool,
        typer.Option(
            "--random", help="Draw the weights instead of loading any.", rich_help_panel=_MODEL
        ),
    ] = False,
    like: Annotated[
        str,
        typer.Option(
            "--like",
            help="Whose shapes: a built-in name (the default, or small-262k), or a folder with a "
            "config.json.",
            rich_help_panel=_MODEL,
        ),
    ] = RELEASE,
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers", help="How many of its layers; all if left out.", rich_help_panel=_MODEL
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option("--bits", help="Quantize everything to so many bits.", rich_help_panel=_MODEL),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", help="Quantize as the converter does under it.", rich_help_panel=_MODEL
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Type of the activations; float32 on a CPU, bfloat16 on a GPU if left out.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    prefill: Annotated[
        str,
        typer.Option("--prefill", help="Lengths of prompts to encode.", rich_help_panel=_WHAT),
    ] = "512,2048",
    prefix: Annotated[
        int,
        typer.Option("--prefix", help="Tokens before the canvas of a step.", rich_help_panel=_WHAT),
    ] = 512,
    batch: Annotated[
        int, typer.Option("--batch", help="Sequences at once.", rich_help_panel=_WHAT)
    ] = 1,
    canvas_length: options.CanvasLength = None,
    profile: Annotated[
        str,
        typer.Option(
            "--profile", help="Under which the step is taken apart.", rich_help_panel=_WHAT
        ),
    ] = DEFAULT_PROFILE,
    vocabulary_pass: Annotated[
        str | None,
        typer.Option(
            "--vocabulary-pass",
            help="Form of the pass over the vocabulary in that step, such as whole; the model's "
            "own if left out.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    constraints: Annotated[
        bool,
        typer.Option(
            "--constraints",
            help="Also run steps with and without constraints, in turns.",
            rich_help_panel=_WHAT,
        ),
    ] = False,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="What to answer.", rich_help_panel=_WHAT),
    ] = None,
    max_tokens: options.MaxTokens = None,
    repeats: Annotated[
        int,
        typer.Option(
            "--repeats", help="Measurements, of which the median counts.", rich_help_panel=_WHAT
        ),
    ] = 5,
    seed: options.Seed = 0,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            help=f"Run another program in turns: '{RIVAL}' on the same weights, or '{TWIN}' with "
            "an autoregressive model named behind it.",
            rich_help_panel=_BESIDE,
        ),
    ] = None,
    openblas: Annotated[
        str | None,
        typer.Option(
            "--openblas",
            help="Path of libopenblas.so.0, to put under MLX on a CPU.",
            envvar=openblas_room.VARIABLE,
            rich_help_panel=_BESIDE,
        ),
    ] = None,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object instead of tables.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Measure prefill, a denoising step and its parts, speeds and memory, beside what the device
    could do at best."""

    def body() -> None:
        lengths = _lengths(prefill)
        for name, value in (("--prefix", prefix), ("--batch", batch), ("--repeats", repeats)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}.")
        if random and model is not None:
            raise UsageError("--model and --random exclude each other: drop one.")
        if adapter_path is not None and (random or against):
            raise UsageError("--adapter-path goes with --model; fuse it to compare others.")
        shapes = Shapes(like, layers, bits, recipe, dtype) if random else None
        if not random and (layers, bits, recipe, dtype, like) != (None,) * 4 + (RELEASE,):
            raise UsageError("--like, --layers, --bits, --recipe and --dtype go with --random.")
        rival, twin_model = _others(against or [], twin)
        profile_settings(profile)  # fails rather now than once weights are there
        blas = None
        if openblas:
            blas = openblas_room.load_openblas(openblas)
        from mlx_diffgemma.bench.run import PROMPT, Plan

        _require(rival, vocabulary_pass)
        plan = Plan(
            prefill=lengths, prefix=prefix, batch=batch, canvas_length=canvas_length,
            repeats=repeats, seed=seed or 0, profile=profile, vocabulary_pass=vocabulary_pass,
            prompt=prompt or PROMPT, max_tokens=max_tokens, constraints=constraints, rival=rival,
            twin=twin_model, blas=blas, say=_say,
        )  # fmt: skip
        report = _measure(model, adapter_path, shapes, plan)
        if json:
            print(report.as_json())
        else:
            _print_tables(report)

    errors.run(body, debug=errors.debugging(ctx))


def _measure(
    model: str | None, adapter_path: str | None, shapes: Shapes | None, plan: Plan
) -> BenchReport:
    from mlx_diffgemma.bench.run import run_bench

    if shapes is None:
        from mlx_diffgemma.cli import session

        opened = session.open_model(model, adapter_path=adapter_path)
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
    """`512,2048` -> (512, 2048)."""
    try:
        lengths = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        lengths = (0,)
    if any(length < 1 for length in lengths):
        raise UsageError(f"--prefill '{text}' is no list of lengths; write 512,2048.")
    return lengths


def _others(against: list[str], twin: str | None) -> tuple[bool, str | None]:
    """Whether to run mlx-vlm, and with which model mlx-lm."""
    for name in against:
        if name not in (RIVAL, TWIN):
            raise UsageError(f"--against '{name}' is unknown; known are {RIVAL} and {TWIN} MODEL.")
    if (TWIN in against) != (twin is not None):
        missing = "a model" if twin is None else f"--against {TWIN}"
        raise UsageError(f"{missing} is missing; write --against {TWIN} MODEL.")
    return RIVAL in against, twin


def _require(rival: bool, vocabulary_pass: str | None) -> None:
    """Fail rather now than once weights are there."""
    from mlx_diffgemma.bench.rival import rival_version
    from mlx_diffgemma.bench.steps import vocabulary_pass_named

    if rival:
        rival_version()
    if vocabulary_pass is not None:
        vocabulary_pass_named(vocabulary_pass)


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


def _print_tables(report: BenchReport) -> None:
    from rich.console import Console

    from mlx_diffgemma.bench.table import as_tables

    # A pipe has no width of its own.
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 110
    Console(width=width, markup=False, emoji=False, highlight=False).print(as_tables(report))

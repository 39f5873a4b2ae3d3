"""One run of the benchmark, from what was asked for to a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlx_diffgemma.bench.constraint import ConstraintCost, measure_constraints
from mlx_diffgemma.bench.counting import Weights
from mlx_diffgemma.bench.device import load_a_core, measure_device
from mlx_diffgemma.bench.prefill import measure_prefill
from mlx_diffgemma.bench.random_model import formats_of, weight_bytes
from mlx_diffgemma.bench.results import BenchReport, ModelReport
from mlx_diffgemma.bench.rival import (
    DEFAULT_SAMPLER,
    OUR_SAMPLER,
    RivalReport,
    compare_steps,
)
from mlx_diffgemma.bench.speed import (
    Answerer,
    ProfileLimit,
    ProfileSpeed,
    TwinReport,
    compare_twin,
    measure_limits,
    measure_profiles,
)
from mlx_diffgemma.bench.steps import measure_step, using_pass, vocabulary_pass_named
from mlx_diffgemma.checkpoint.memory import wired
from mlx_diffgemma.diffusion.profiles import DEFAULT as DEFAULT_PROFILE
from mlx_diffgemma.diffusion.profiles import PROFILES, profile_settings
from mlx_diffgemma.fitting import diffusion_config
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

PROMPT = "Write a short story about a lighthouse."


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        prefill: lengths of the prompts to encode, in tokens.
        prefix: tokens before the canvas of a step.
        batch: sequences computed together.
        canvas_length: tokens of a canvas; None takes the model's own.
        repeats: measurements, of which the median counts.
        seed: number that random draws follow from.
        profile: name of the profile of the steps; the report compares all profiles as well.
        vocabulary_pass: the form of the pass over the vocabulary in the step that is taken apart,
            by its name; None takes the model's own.
        prompt: text that a checkpoint answers.
        max_tokens: most tokens of an answer; None takes the default.
        constraints: whether to run steps with and without a constraint.
        rival: whether to run mlx-vlm beside it.
        twin: an autoregressive model to run mlx-lm with.
        blas: what OpenBLAS calls itself where it was loaded.
        say: called with the name of each measurement as it begins.
    """

    prefill: tuple[int, ...] = (512,)
    prefix: int = 512
    batch: int = 1
    canvas_length: int | None = None
    repeats: int = 5
    seed: int = 0
    profile: str = DEFAULT_PROFILE
    vocabulary_pass: str | None = None
    prompt: str = PROMPT
    max_tokens: int | None = None
    constraints: bool = False
    rival: bool = False
    twin: str | None = None
    blas: str | None = None
    say: Callable[[str], None] = field(default=lambda text: None, repr=False)


@wired()
def run_bench(
    model: DiffusionGemma,
    plan: Plan,
    *,
    name: str,
    weights_format: str = "as stored",
    tokenizer: TokenizerWrapper | None = None,
) -> BenchReport:
    """Measure `model`. A `tokenizer` of None says that the weights are random, so that no answer is
    generated.

    Raises:
        UsageError: a setting is out of range or names something unknown.
        CheckpointError: a program or model to compare with is missing or cannot be run.
    """
    chosen_pass = None
    if plan.vocabulary_pass is not None:
        chosen_pass = vocabulary_pass_named(plan.vocabulary_pass)
    config = diffusion_config(model, canvas_length=plan.canvas_length)
    chosen = config.override(**profile_settings(plan.profile))
    load = load_a_core()
    plan.say("measuring the device")
    device = measure_device(model.dtype, plan.blas)
    weights = Weights(model.config, formats_of(model), model.dtype.size)
    common = {"batch": plan.batch, "repeats": plan.repeats, "seed": plan.seed}

    plan.say("encoding prompts")
    prefill = measure_prefill(model, plan.prefill, weights, device, **common)
    plan.say("denoising")
    with using_pass(model, chosen_pass):
        step = measure_step(model, chosen, weights, device, prefix=plan.prefix, **common)
    speeds: tuple[ProfileSpeed, ...] = ()
    limits: tuple[ProfileLimit, ...] = ()
    answerer: Answerer | None = None
    if tokenizer is None:
        plan.say("comparing profiles")
        limits = measure_limits(model, config, PROFILES, prefix=plan.prefix, **common)
    else:
        plan.say("answering under each profile")
        speeds = measure_profiles(
            model, tokenizer, plan.prompt, PROFILES,
            max_tokens=plan.max_tokens, repeats=plan.repeats, seed=plan.seed,
        )  # fmt: skip
        answerer = Answerer(
            model, tokenizer, plan.prompt,
            profile=plan.profile, max_tokens=plan.max_tokens, seed=plan.seed,
        )  # fmt: skip
    constraints: tuple[ConstraintCost, ...] = ()
    if plan.constraints:
        plan.say("constraining")
        constraints = measure_constraints(
            model, chosen, prefix=plan.prefix, repeats=plan.repeats, seed=plan.seed
        )
    rivals: tuple[RivalReport, ...] = ()
    twins: tuple[TwinReport, ...] = ()
    if plan.rival:
        plan.say("running mlx-vlm in turns")
        rivals = compare_steps(
            model, chosen, prefix=plan.prefix, repeats=plan.repeats, seed=plan.seed,
            samplers=(DEFAULT_SAMPLER, OUR_SAMPLER),
        )  # fmt: skip
    if plan.twin is not None:
        plan.say("running mlx-lm in turns")
        twins = (
            compare_twin(
                plan.twin, plan.prompt, ours=answerer,
                max_tokens=plan.max_tokens or config.max_tokens, repeats=plan.repeats,
            ),
        )  # fmt: skip
    return BenchReport(
        model=ModelReport(
            name, model.config.text.num_hidden_layers, weights_format, weight_bytes(model),
            random=tokenizer is None,
        ),
        device=device, profile=plan.profile, seed=plan.seed, load=load, prefill=prefill,
        step=step, constraints=constraints, speeds=speeds, limits=limits, rivals=rivals,
        twins=twins,
    )  # fmt: skip

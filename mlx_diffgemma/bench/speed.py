"""Tokens per second: of each profile, and of an autoregressive model in turns with ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from mlx_diffgemma.bench.steps import Stepper
from mlx_diffgemma.bench.timing import alternate
from mlx_diffgemma.checkpoint.locate import locate
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.profiles import profile_settings
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.generation import GenerationResponse, stream_generate
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

TWIN = "mlx-lm"


@dataclass(frozen=True)
class ProfileSpeed:
    """An answer under one profile, its prompt's time left out.

    Attributes:
        profile: name of the profile.
        tokens: tokens of the last answer.
        canvases: canvases of the last answer.
        steps: denoising steps of all canvases of the last answer.
        tokens_per_second: median over all repeats.
        tokens_per_forward: tokens of the last answer for each of its forward passes.
    """

    profile: str
    tokens: int
    canvases: int
    steps: int
    tokens_per_second: float
    tokens_per_forward: float


@dataclass(frozen=True)
class ProfileLimit:
    """What a profile takes at most, where random weights say nothing of how many steps it needs.

    Attributes:
        max_steps: most denoising steps of a canvas.
        seconds: median of one step.
        canvas_seconds: seconds of a canvas that uses up its steps.
    """

    profile: str
    max_steps: int
    seconds: float
    canvas_seconds: float


@dataclass(frozen=True)
class TwinReport:
    """An autoregressive model on the same prompt.

    Attributes:
        name: name of the other program and of its model.
        tokens: tokens of its last answer.
        tokens_per_second: median speed of its answers, the first token left out.
        ours_tokens_per_second: None where there is no answer of ours to compare with.
        ratio: our tokens per second over theirs, or None.
    """

    name: str
    tokens: int
    tokens_per_second: float
    ours_tokens_per_second: float | None
    ratio: float | None


class Answerer:
    """Answers the same prompt again and again under one profile; each call takes the next seed."""

    def __init__(
        self,
        model: DiffusionGemma,
        tokenizer: TokenizerWrapper,
        prompt: str,
        *,
        profile: str,
        max_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        self._model, self._tokenizer, self._prompt = model, tokenizer, prompt
        self._profile = profile
        self._max_tokens, self._seed = max_tokens, seed
        self.responses: list[GenerationResponse] = []

    def __call__(self) -> None:
        *_, last = stream_generate(
            self._model,
            self._tokenizer,
            self._prompt,
            self._max_tokens,
            seed=self._seed + len(self.responses),
            draft=False,
            profile=self._profile,
        )
        self.responses.append(last)

    def tokens_per_second(self, repeats: int) -> float:
        """The median of the last `repeats` answers."""
        return median(response.generation_tps for response in self.responses[-repeats:])


def measure_profiles(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    prompt: str,
    profiles: Iterable[str],
    *,
    max_tokens: int | None = None,
    repeats: int = 3,
    seed: int = 0,
) -> tuple[ProfileSpeed, ...]:
    """Answer `prompt` `repeats` times under each profile, in turns, after one answer to warm up."""
    answerers = {
        name: Answerer(model, tokenizer, prompt, profile=name, max_tokens=max_tokens, seed=seed)
        for name in profiles
    }
    alternate(answerers, repeats)
    reports = []
    for name, answerer in answerers.items():
        last = answerer.responses[-1]
        steps = last.denoising_steps
        reports.append(
            ProfileSpeed(
                name, last.generation_tokens, len(steps), sum(steps),
                answerer.tokens_per_second(repeats), last.tokens_per_forward,
            )
        )  # fmt: skip
    return tuple(reports)


def measure_limits(
    model: DiffusionGemma,
    config: DiffusionConfig,
    profiles: Iterable[str],
    *,
    prefix: int,
    batch: int = 1,
    repeats: int = 5,
    seed: int = 0,
) -> tuple[ProfileLimit, ...]:
    """Time a step of each profile, in turns, and multiply it by the most steps of a canvas."""
    configs = {name: config.override(**profile_settings(name)) for name in profiles}
    steppers = {
        name: Stepper(model, each, prefix=prefix, batch=batch, seed=seed)
        for name, each in configs.items()
    }
    times = {name: median(taken) for name, taken in alternate(steppers, repeats).items()}
    return tuple(
        ProfileLimit(
            name, each.max_denoising_steps, times[name], each.max_denoising_steps * times[name]
        )
        for name, each in configs.items()
    )


def compare_twin(
    path_or_repo: str,
    prompt: str,
    *,
    ours: Answerer | None = None,
    max_tokens: int = 256,
    repeats: int = 3,
) -> TwinReport:
    """Run mlx-lm's own generation with an autoregressive model, in turns with ours.

    Raises:
        CheckpointError: the model cannot be found, mlx-lm cannot load it, or it answers nothing.
    """
    from mlx_lm import load
    from mlx_lm import stream_generate as stream

    folder = locate(path_or_repo)
    try:
        model, tokenizer = load(str(folder))[:2]
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"--against {TWIN}: it cannot load {path_or_repo} ({' '.join(str(error).split())}); "
            "name an autoregressive model in MLX form."
        ) from error
    ids = tokenizer.encode(prompt)
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt}]
        # mlx-lm asks for a thought where the vocabulary knows them; ours thinks only when asked.
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False
        )
    speeds: list[float] = []
    tokens = 0

    def theirs() -> None:
        nonlocal tokens
        start, written = None, 0
        for _ in stream(model, tokenizer, ids, max_tokens=max_tokens):
            # The first token comes with the prompt.
            start, written = start or perf_counter(), written + 1
        if start is not None and written > 1:
            speeds.append((written - 1) / (perf_counter() - start))
        tokens = written

    runs: dict[str, Callable[[], object]] = {"theirs": theirs}
    if ours is not None:
        runs = {"ours": ours, **runs}
    alternate(runs, repeats)
    if not speeds:
        raise CheckpointError(
            f"--against {TWIN}: {path_or_repo} answered nothing to the prompt; give another."
        )
    speed = median(speeds[-repeats:])
    mine = None if ours is None else ours.tokens_per_second(repeats)
    return TwinReport(
        f"{TWIN}, {path_or_repo}", tokens, speed, mine, None if mine is None else mine / speed
    )

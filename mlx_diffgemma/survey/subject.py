"""What a survey is made of: models, how much is measured on them, and how fast they are here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np

from mlx_diffgemma import cpu
from mlx_diffgemma.bench.counting import Cost
from mlx_diffgemma.bench.device import Device, measure_device
from mlx_diffgemma.bench.presets import RELEASE, TINY, config_like
from mlx_diffgemma.bench.random_model import chosen_recipe, default_dtype
from mlx_diffgemma.bench.timing import seconds
from mlx_diffgemma.bench.workbench import SMALL_SIZES, Sizes, Workbench
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.checkpoint.memory import available_memory, size_text
from mlx_diffgemma.checkpoint.quantization import Recipe
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.diffusion.profiles import DEFAULT, PROFILES
from mlx_diffgemma.errors import MemoryShortageError
from mlx_diffgemma.generation import generate, load
from mlx_diffgemma.kernels.dispatch import Launcher
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.survey import pass_cases
from mlx_diffgemma.survey.kernel_cases import kernel_cases

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_LAYERS = (6, 4, 2)  # of a random model; the first that fits
_SHARE = 0.6  # of the memory that is available, for the weights of a random model
_SAMPLED = 40  # of so many cases, one is timed
_SEED = 7


@dataclass(frozen=True)
class Extent:
    """How much is checked and measured.

    Attributes:
        sizes: what steps and passes are measured on.
        checked: what the pass in chunks and the whole pass are compared on.
        profiles: names of profiles.
        repeats: measurements, of which the median counts.
        burst: steps that are timed together.
        puzzles: sudokus to solve in each way.
        max_tokens: most tokens of an answer whose speed is measured.
    """

    sizes: Sizes
    checked: pass_cases.Sizes
    profiles: tuple[str, ...] = tuple(PROFILES)
    repeats: int = 3
    burst: int = 2
    puzzles: int = 8
    max_tokens: int = 256


FULL = Extent(
    Sizes(batches=(1, 4), prompt=2048, prompt_chunks=(512, 2048), vocabulary_chunks=(8192, 32768)),
    pass_cases.Sizes(),
)
SMALL = Extent(
    replace(SMALL_SIZES, batches=(1, 2), prompt_chunks=(16, 64), vocabulary_chunks=(1024, 4096)),
    pass_cases.SMALL_SIZES,
    ("exact", DEFAULT),
    repeats=1,
    puzzles=2,
)
"""What a CPU does in seconds: its times say nothing of a GPU's."""


@dataclass(frozen=True)
class Opened:
    """A model that a survey is to be made of.

    Attributes:
        name: what it is called in the table.
        model, tokenizer: what `load` returns.
    """

    name: str
    model: DiffusionGemma
    tokenizer: TokenizerWrapper


class Subject:
    """What a survey is made of, and its pieces. Models are made or loaded when they are needed.

    Args:
        extent: how much is checked and measured.
        launcher: runs the source of the kernels; None where nothing can.
        kernels: what to call the launcher.
        opened: a model of the user's; None takes the demo, and random weights.
    """

    def __init__(
        self,
        extent: Extent,
        launcher: Launcher | None,
        kernels: str,
        opened: Opened | None = None,
    ) -> None:
        self.extent, self.launcher, self.kernels, self.opened = extent, launcher, kernels, opened

    @cached_property
    def demo(self) -> Opened:
        """The demo model in the type that a large model has here."""
        like, tokenizer = load("demo", lazy=True)
        model, _ = load_model("demo", dtype=default_dtype())
        model.config = like.config
        return Opened("demo", model, tokenizer)

    @cached_property
    def bench(self) -> Workbench:
        """What steps and passes are measured on.

        Raises:
            MemoryShortageError: there is no room for random weights.
        """
        extent = self.extent
        if self.opened is not None:
            return _bench_of(self.opened.model, extent)
        if cpu.is_device():
            return _random_bench(TINY, None, extent)
        room = available_memory()
        for layers in _LAYERS:
            bench = _random_bench(RELEASE, layers, extent)
            if room is None or bench.weight_bytes <= _SHARE * room:
                return bench
        raise MemoryShortageError(
            f"random weights need {size_text(bench.weight_bytes)}, and {size_text(room or 0)} are "
            "available; close other programs."
        )

    @cached_property
    def device(self) -> Device:
        """The device and its peaks, as they are measured now."""
        return measure_device(self.bench.dtype)

    @cached_property
    def slowness(self) -> float:
        """How many times the device's least time a step takes, as it is measured now."""
        bench = self.bench
        variant = bench.steps()[0]
        run = variant.make()
        run()
        return max(1.0, seconds(run) / self.device.floor(variant.cost))

    @cached_property
    def demo_seconds(self) -> float:
        """Seconds that a sudoku takes, as they are measured now; the model is loaded before."""
        self.solves(0, DEFAULT)
        return seconds(lambda: self.solves(1, DEFAULT))

    @cached_property
    def case_seconds(self) -> float:
        """Mean seconds of a few cases, each run twice, since half of all find their kernels
        compiled."""
        if self.launcher is None:
            return 0.0
        taken = []
        for case in list(kernel_cases())[::_SAMPLED] * 2:
            try:
                taken.append(seconds(partial(case.run, self.launcher)))
            except Exception:  # the piece with this case will say what is wrong
                taken.append(0.0)
        return mean(taken)

    def least(self, cost: Cost) -> float:
        """Seconds that `cost` is guessed to take, by how long a step took."""
        return self.slowness * self.device.floor(cost)

    def puzzle(self, number: int) -> sudoku.Puzzle:
        """A sudoku, the same on every machine."""
        return sudoku.make_puzzle(np.random.default_rng([_SEED, number]))

    def solves(self, number: int, profile: str) -> bool:
        """Whether the demo model solves a sudoku under a profile."""
        puzzle, demo = self.puzzle(number), self.demo
        prompt = sudoku.prompt([puzzle])
        answer = generate(demo.model, demo.tokenizer, prompt, seed=number, profile=profile)
        return answer == puzzle.solution


def _bench_of(model: DiffusionGemma, extent: Extent) -> Workbench:
    """A workbench for a model that is loaded, at the length of its own canvases."""
    canvas = model.config.canvas_length
    positions = tuple(dict.fromkeys((canvas, max(1, canvas // 4), max(1, canvas // 8))))
    sizes = replace(extent.sizes, canvas=canvas, positions=positions)
    return Workbench(
        model.config, Recipe("as stored", ()), model.dtype, sizes, extent.burst, extent.profiles,
        loaded=model,
    )  # fmt: skip


def _random_bench(like: str, layers: int | None, extent: Extent) -> Workbench:
    return Workbench(
        ModelConfig.from_dict(config_like(like, layers)), chosen_recipe(None, "4bit"),
        default_dtype(), extent.sizes, extent.burst, extent.profiles,
    )  # fmt: skip

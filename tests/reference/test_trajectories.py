"""Whole denoising trajectories against transformers' `generate`, fed the same random draws.

The reference runs with its own random numbers while they are recorded; our loop then gets the
recording. Every step must be equal token for token. Where a sequence parts from the reference, the
test proves that rounding decided a tie there (and fails otherwise), and follows it no further.
Run with `-m reference -s` to see how many were equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from demo_checkpoint import demo_config, demo_weights, two_puzzles
from recording import RecordedCanvas, RecordedStep, Recording, record
from reference_model import ROUTER_TIE, RouterGaps, build_reference
from replay import CanvasDraws, replay_noise, replaying
from tiny_models import make_config, make_model, make_weights
from transformers import DiffusionGemmaForBlockDiffusion

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.diffusion.canvas import Canvas
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.events import DenoisingStep, Finished
from mlx_diffgemma.diffusion.generate import generate_canvases
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

pytestmark = pytest.mark.reference

LOGIT_TIE, ENTROPY_TIE = 2e-4, 1e-4


class Pair:
    """Both implementations with the same weights."""

    def __init__(self, raw: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
        self.config = ModelConfig.from_dict(raw)
        self.ours = make_model(self.config, weights)
        self.theirs = build_reference(raw, weights)

    def compare(self, prompts: list[list[int]], seed: int, canvases: int, eos: list[int]):
        """Run both; returns a `Comparison`."""
        tokens = canvases * self.config.canvas_length
        settings = DiffusionConfig(max_tokens=tokens, eos_token_ids=tuple(eos))
        return compared(self.ours, self.theirs, prompts, settings, seed, step_size=11)


def random_pair(raw: dict[str, Any], seed: int, gain: float) -> Pair:
    config = ModelConfig.from_dict(raw)
    return Pair(raw, make_weights(config, seed, gain, feedback=0.05))


class Comparison:
    """Follows our run beside a recording."""

    def __init__(self, recording: Recording, batch: int, eos: list[int]) -> None:
        self.recording, self.eos = recording, eos
        self.parted: dict[int, str] = {}
        self.steps = 0
        self.finished = False
        self.batch = batch

    def step(self, event: DenoisingStep, settings: DiffusionConfig) -> None:
        if event.row in self.parted:
            return
        ours, recorded = event.canvas, self.recording.canvases[event.canvas.index]
        theirs = recorded.steps[ours.passes - 1]
        self.steps += 1
        same = (
            np.array_equal(ours.draft, theirs.draft[event.row])
            and np.array_equal(ours.accepted, theirs.accepted[event.row])
            and np.array_equal(np.array(ours.tokens), theirs.canvas[event.row])
            and self._stops(ours, recorded) == bool(theirs.done[event.row])
        )
        if not same:
            self.parted[event.row] = self._tie(ours, theirs, event.row, settings)

    def _stops(self, ours: Canvas, recorded: RecordedCanvas) -> bool:
        """Whether the stop rule was met; used-up steps end ours, and leave the reference's open."""
        if ours.done and not ours.converged:
            assert ours.passes == ours.settings.max_denoising_steps == len(recorded.steps)
        return ours.converged

    def _tie(self, ours: Canvas, theirs: RecordedStep, row: int, settings: DiffusionConfig) -> str:
        """What rounding decided here; fails where there is no tie."""
        where = f"canvas {ours.index}, step {ours.passes}, sequence {row}"
        canvas = self.recording.canvases[ours.index]
        undecided = [c.steps[0].router_gaps[row] for c in self.recording.canvases]
        undecided = undecided[: ours.index + 1]
        undecided += [step.router_gaps[row] for step in canvas.steps[: ours.passes]]
        if min(undecided) < ROUTER_TIE:
            return f"{where}: a router was undecided by {min(undecided):.1e}"

        logits = theirs.processed[row].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        entropy = -(np.exp(log_p) * log_p).sum(-1)
        differs = ours.draft != theirs.draft[row]
        if differs.any():
            two = np.sort(logits[differs], axis=-1)[:, -2:]
            gap = (two[:, 1] - two[:, 0]).max()
            assert gap < LOGIT_TIE, f"{where}: drafts differ, the top two logits by {gap:.1e}"
            return f"{where}: the top two logits were {gap:.1e} apart"
        differs = ours.accepted != theirs.accepted[row]
        if differs.any():
            ordered = np.sort(entropy)
            margin = np.abs(np.cumsum(ordered) - ordered - settings.entropy_bound).min()
            spread = np.ptp(entropy[differs])
            least = min(margin, spread if differs.sum() > 1 else np.inf)
            assert least < ENTROPY_TIE, f"{where}: accepted differ, nearest tie {least:.1e}"
            return f"{where}: the entropies were {least:.1e} from the bound or each other"
        margin = abs(entropy.mean() - settings.confidence_threshold)
        assert ours.converged != theirs.done[row], f"{where}: the next canvas differs"
        assert margin < ENTROPY_TIE, f"{where}: stops differ, {margin:.1e} from the threshold"
        return f"{where}: the mean entropy was {margin:.1e} from the threshold"

    def finish(self, event: Finished) -> None:
        self.finished = True
        for row, tokens in enumerate(event.tokens):
            if row in self.parted:
                continue
            theirs = self.recording.sequences[row].tolist()
            ends = [place for place, token in enumerate(theirs) if token in self.eos]
            assert list(tokens) == (theirs[: ends[0]] if ends else theirs)
            assert event.finish_reasons[row] == ("stop" if ends else "length")
            steps = [
                1 + int(np.argmax([s.done[row] for s in canvas.steps]))
                if canvas.steps[-1].done[row]
                else len(canvas.steps)
                for canvas in self.recording.canvases[: len(event.steps[row])]
            ]
            assert list(event.steps[row]) == steps


def compared(
    ours: DiffusionGemma,
    theirs: DiffusionGemmaForBlockDiffusion,
    prompts: Sequence[Sequence[int]],
    settings: DiffusionConfig,
    seed: int,
    *,
    step_size: int,
    **inputs: torch.Tensor,
) -> Comparison:
    """Run the reference's `generate` with these `inputs` beside the prompts, then our loop with
    its draws, and follow both. Prompts are encoded in chunks of `step_size`."""
    eos = list(settings.eos_token_ids)
    gaps = RouterGaps(theirs, len(prompts))
    recording = record(
        theirs, [list(ids) for ids in prompts], seed=seed, max_new_tokens=settings.max_tokens,
        eos_token_id=eos or None, router_gaps=gaps, **inputs,
    )  # fmt: skip
    gaps.close()
    draws = [
        CanvasDraws(
            canvas.initial,
            np.stack([step.draw for step in canvas.steps]),
            np.stack([step.noise for step in canvas.steps]),
        )
        for canvas in recording.canvases
    ]
    comparison = Comparison(recording, len(prompts), eos)
    for event in generate_canvases(
        ours,
        prompts,
        settings,
        replay_noise(draws),
        denoiser=replaying(ours),
        prefill_step_size=step_size,
    ):
        if isinstance(event, DenoisingStep):
            comparison.step(event, settings)
        elif isinstance(event, Finished):
            comparison.finish(event)
    return comparison


def report(name: str, comparisons: list[Comparison], least_equal: float = 0.6) -> None:
    assert all(c.finished for c in comparisons)
    batch = sum(c.batch for c in comparisons)
    parted = [reason for c in comparisons for reason in c.parted.values()]
    steps = sum(c.steps for c in comparisons)
    canvases = sum(len(c.recording.canvases) for c in comparisons)
    print(
        f"\n{name}: {batch - len(parted)} of {batch} trajectories equal, {steps} steps of "
        f"sequences compared, {canvases} canvases",
        *parted,
        sep="\n  ",
    )
    assert batch - len(parted) >= least_equal * batch


@pytest.fixture(scope="module")
def demo() -> Pair:
    return Pair(demo_config(), demo_weights())


def test_demo_model_over_two_canvases(demo):
    comparisons = [demo.compare([two_puzzles(seed)], seed, 2, [1, 5]) for seed in range(24)]
    report("demo model", comparisons, least_equal=0.9)
    assert sum(len(c.recording.canvases) > 1 for c in comparisons) >= 20


def test_demo_model_batch(demo):
    comparisons = []
    for seed in range(2):
        long = two_puzzles(seed)
        one = long[: 14 + 6 * 7 - 1] + long[-9:]  # the first puzzle alone: one canvas
        comparisons.append(demo.compare([long, one, two_puzzles(seed + 50)], seed, 2, [1, 5]))
    report("demo model, batches of three", comparisons)
    ends = {len(steps) for c in comparisons for steps in [c.recording.canvases]}
    assert max(ends) > 1


@pytest.mark.parametrize("gain", [1.0, 4.0], ids=["uncertain", "certain"])
def test_random_models_over_three_canvases(gain):
    comparisons = []
    for seed in range(6):
        raw = make_config(seed)
        prompt = np.random.default_rng(seed).integers(7, raw["text_config"]["vocab_size"], 5 + seed)
        pair = random_pair(raw, seed, gain)
        comparisons.append(pair.compare([prompt.tolist()], seed, 3, []))
    report(f"random models, gain {gain:g}", comparisons)


def test_random_models_in_batches_of_three():
    comparisons = []
    for seed in range(2):
        raw = make_config(seed)
        rng = np.random.default_rng(seed)
        prompts = [
            rng.integers(7, raw["text_config"]["vocab_size"], length).tolist()
            for length in (4, 21, 2 + seed)
        ]
        pair = random_pair(raw, seed, 4.0)
        comparisons.append(pair.compare(prompts, seed, 3, [1, 5, 9]))
    report("random models, batches of three", comparisons)

"""A canvas that is stuck starts again from noise, against plain reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mock_model import LENGTH, VOCAB, MockModel, MockPredict, Told

from mlx_diffgemma.diffusion.canvas import FREE, Canvas, Layout
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.diffusion.noise import SeededNoise

DRAFT = np.arange(LENGTH) + 10
FALLING_AND_STUCK = [9.0, 4.0, 3.7, 3.8, 3.9]  # nats; from the third on no tenth below the second


def held(nats: float, places: int = LENGTH - 1) -> np.ndarray:
    """[C] entropies that sum to `nats`, of which the default bound accepts `places` + 1."""
    entropy = np.zeros(LENGTH)
    entropy[places:] = nats / (LENGTH - places)
    return entropy


def course(entropies: Sequence[np.ndarray], canvas: Canvas | None = None, **given) -> list[Canvas]:
    """A canvas after each pass that finds these entropies, until it is done; its draft changes in
    every pass."""
    model = MockModel()
    told = [(DRAFT + n % 2, entropy) for n, entropy in enumerate(entropies)]
    if canvas is None:
        canvas = Canvas.start(DiffusionConfig(**given), SeededNoise(0), 0, LENGTH, VOCAB)
    denoiser, seen = Denoiser(model, Told([told])), [canvas]
    while not seen[-1].done and len(seen) <= len(told):
        seen += denoiser.step([seen[-1]], [model.make_cache().prefix])
    return seen[1:]


def begun_anew(canvases: Sequence[Canvas]) -> list[int]:
    """The numbers of the passes after which a canvas starts again."""
    return [canvas.passes for canvas in canvases if canvas.passes == canvas.begun]


def test_a_stuck_canvas_starts_again_from_noise():
    stuck = course([held(nats) for nats in FALLING_AND_STUCK], restart_after=3)
    last, again = stuck[-2:]
    assert (last.step, last.begun) == (5, 0)
    assert (again.step, again.begun, again.passes, again.done) == (1, 5, 5, False)
    assert again.temperature == again.settings.t_max
    assert mx.all(again.soft_embeddings == 0)
    assert not np.array_equal(again.tokens, last.tokens)
    assert begun_anew(course([held(nats) for nats in FALLING_AND_STUCK])) == []


@pytest.mark.parametrize(
    "entropies, passes",
    [
        ([9.0, 4.0, 3.7, 3.8], 3),  # not for long enough
        ([9.0, 4.0, 3.5, 3.8, 3.9], 3),  # a tenth lower in between
        ([0.89**n for n in range(9)], 3),
        ([0.0] * 9, 3),  # nothing is lower than nothing
    ],
)
def test_a_canvas_that_comes_on_goes_on(entropies, passes):
    found = course([held(nats) for nats in entropies], restart_after=passes, stability_threshold=9)
    assert begun_anew(found) == []
    assert len(found) == len(entropies)


def test_a_canvas_that_holds_noise_is_not_stuck():
    assert begun_anew(course([held(4.0, LENGTH - 2)] * 9, restart_after=3)) == []
    assert begun_anew(course([held(4.0)] * 9, restart_after=3)) == [4]


def test_a_canvas_that_is_stuck_again_is_done():
    *_, last = course([held(4.0)] * 20, restart_after=3)
    assert (last.passes, last.begun, last.done, last.converged) == (8, 4, True, True)


def test_a_canvas_starts_again_only_in_the_first_sixth_of_the_steps():
    assert begun_anew(course([held(4.0)] * 9, restart_after=3, max_denoising_steps=24)) == [4]
    later = course([held(4.0)] * 9, restart_after=3, max_denoising_steps=23)
    assert begun_anew(later) == []
    assert (later[-1].passes, later[-1].done, later[-1].converged) == (4, True, True)


def test_a_canvas_that_is_stuck_in_the_second_half_goes_on():
    ended = course([held(4.0)] * 9, restart_after=3, max_denoising_steps=8)
    assert (ended[-1].passes, ended[-1].converged) == (4, True)
    late = course([held(4.0)] * 9, restart_after=3, max_denoising_steps=7)
    assert (late[-1].passes, late[-1].converged) == (7, False)
    # What counts is the schedule, not the passes: a leap is as far as its steps.
    leapt = course([held(4.0)] * 9, restart_after=3, max_denoising_steps=12, leap_until=12)
    assert (leapt[-1].passes, leapt[-1].converged) == (6, False)


def test_the_first_pass_after_a_restart_does_not_leap():
    found = course([held(4.0)] * 7, restart_after=3, leap_until=12)
    assert begun_anew(found) == [4]
    assert [canvas.step for canvas in found] == [2, 5, 8, 1, 2, 5, 8]


def test_certainty_counts_the_passes_since_the_start():
    entropies = [held(4.0)] * 4 + [held(0.2)]
    *_, last = course(entropies, restart_after=3, certain_below=0.3)
    assert (last.passes, last.done) == (5, True)
    *_, last = course(entropies, certain_below=0.3)
    assert (last.passes, last.done) == (5, False)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 12))
def test_passes_never_outnumber_the_steps(steps, restart_after, leap_until):
    found = course(
        [held(4.0)] * 13, restart_after=restart_after, leap_until=leap_until,
        max_denoising_steps=steps,
    )  # fmt: skip
    assert found[-1].done and found[-1].passes <= steps
    assert all(canvas.is_last_step for canvas in found if canvas.passes == steps - 1)


class Asked(SeededNoise):
    """Remembers what it was asked for."""

    asked: ClassVar[list[tuple[str, int]]] = []

    def draw_key(self, canvas, step):
        self.asked.append(("draw", step))
        return super().draw_key(canvas, step)

    def renoise(self, canvas, step, length, vocab):
        self.asked.append(("noise", step))
        return super().renoise(canvas, step, length, vocab)


def test_steps_that_are_taken_again_draw_anew():
    Asked.asked.clear()
    config = DiffusionConfig(restart_after=1, entropy_bound=99.0, max_denoising_steps=16)
    model, predict, steps = MockModel(), MockPredict(peak=0.0), []
    denoiser, canvas = Denoiser(model, predict), Canvas.start(config, Asked(0), 0, LENGTH, VOCAB)
    while not canvas.done:
        steps.append(canvas.step)
        (canvas,) = denoiser.step([canvas], [model.make_cache().prefix])
    assert canvas.begun and steps.count(1) == 2
    assert len(set(Asked.asked)) == len(Asked.asked) == 2 * len(steps) + 1


@pytest.mark.parametrize("start", [{"initial": [7] * LENGTH}, {"first_step": 2}, {"endless": True}])
def test_a_canvas_that_began_otherwise_is_never_put_back_to_noise(start):
    config = DiffusionConfig(restart_after=2)
    canvas = Canvas.start(config, SeededNoise(0), 0, LENGTH, VOCAB, **start)
    found = course([held(4.0)] * 9, canvas)
    assert len(found) == 9 and begun_anew(found) == []


def test_pinned_tokens_outlast_a_restart():
    pinned = (5, *[FREE] * (LENGTH - 1))
    config = DiffusionConfig(restart_after=2)
    canvas = Canvas.start(config, SeededNoise(0), 0, LENGTH, VOCAB, layout=Layout(pinned, {}))
    found = course([held(4.0)] * 3, canvas)
    assert begun_anew(found) == [3]
    assert found[-1].tokens[0].item() == 5 and found[-1].layout is canvas.layout

"""When the device is asked, and how often it is waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mock_model import MockModel, MockPredict

from mlx_diffgemma.diffusion.canvas import Canvas
from mlx_diffgemma.diffusion.config import SAMPLERS, DiffusionConfig
from mlx_diffgemma.diffusion.constraints import FREE, Layout, token_mask
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.diffusion.events import CanvasCommitted, DenoisingStep, PrefillProgress
from mlx_diffgemma.diffusion.generate import generate_canvases
from mlx_diffgemma.diffusion.noise import SeededNoise, seeded
from mlx_diffgemma.diffusion.profiles import PROFILES, profile_settings
from mlx_diffgemma.kernels.dispatch import override

PROMPTS = [[3, 8, 8, 20], [11], [30, 2, 9, 9, 9, 17, 4]]


@pytest.fixture(autouse=True)
def as_plain_mlx() -> Iterator[None]:
    """The emulator of kernels reads what it is given: it would be counted."""
    with override("mlx"):
        yield


def settings(**changes: Any) -> DiffusionConfig:
    defaults = {"max_tokens": 27, "max_denoising_steps": 12, "confidence_threshold": 0.2}
    return DiffusionConfig(**{**defaults, **changes})


def stream_of(predict: MockPredict, model: MockModel, config: DiffusionConfig) -> Iterator:
    denoiser = Denoiser(model, predict)
    return generate_canvases(model, PROMPTS, config, seeded(0), denoiser=denoiser)


def test_the_next_step_is_queued_before_the_last_one_is_yielded() -> None:
    """In order of calls: queue 1, read 1, queue 2, yield 1, read 2, queue 3, yield 2, …"""
    log: list[str] = []

    class Listening(MockPredict):
        def __call__(self, canvases, prefixes):
            log.append(f"queue {self.calls + 1}")
            return super().__call__(canvases, prefixes)

    steps = 0
    for event in stream_of(Listening(peak=0), MockModel(), settings()):
        if isinstance(event, DenoisingStep) and event.row == 0:
            steps += 1
            log.append(f"yield {steps}")
    assert steps == 36
    expected = ["queue 1"]
    for step in range(1, 37):
        expected += [f"queue {step + 1}"] * (step < 36) + [f"yield {step}"]
    assert log == expected


@pytest.mark.parametrize("steps", [1, 2, 11, 12, 13, 30])
def test_a_consumer_that_leaves_wastes_one_step_at_most(steps: int) -> None:
    predict, model = MockPredict(peak=0), MockModel()
    stream = stream_of(predict, model, settings())
    for event in stream:
        if isinstance(event, DenoisingStep) and event.row == 0:
            steps -= 1
            if not steps:
                break
    shown, calls = event.canvas.index * 12 + event.canvas.passes, predict.calls
    stream.close()
    assert calls == predict.calls == shown + 1


def test_nothing_is_wasted_at_the_end() -> None:
    """No step is queued for a canvas that is done: its next one is, or none."""
    predict = MockPredict(peak=0)
    events = list(stream_of(predict, MockModel(), settings(max_tokens=1)))
    assert predict.calls == 12
    assert sum(isinstance(event, DenoisingStep) for event in events) == 36


def test_a_consumer_that_leaves_during_the_prefill_has_no_step_computed() -> None:
    predict, model = MockPredict(), MockModel()
    stream = stream_of(predict, model, settings())
    assert isinstance(next(stream), PrefillProgress)
    stream.close()
    assert predict.calls == 0 and model.encoded == []


class Waits:
    """Counts what makes the host wait for the device: evaluations and reads of arrays."""

    def __init__(self) -> None:
        self.evaluations = self.reads = self.queued = 0

    @property
    def all(self) -> int:
        return self.evaluations + self.reads


@contextmanager
def counted_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    waits = Waits()

    def counting(owner: Any, name: str, what: str, where: Any = lambda *_: True) -> None:
        whole = getattr(owner, name)

        def count(*arguments: Any, **more: Any) -> Any:
            if where(*arguments):
                setattr(waits, what, getattr(waits, what) + 1)
            return whole(*arguments, **more)

        patch.setattr(owner, name, count)

    def of_mlx(value: Any, *_: Any) -> bool:
        return isinstance(value, mx.array)

    with monkeypatch.context() as patch:
        for name in ("eval", "synchronize"):
            counting(mx, name, "evaluations")
        counting(mx, "async_eval", "queued")
        for name in ("array", "asarray", "stack", "concatenate"):
            counting(np, name, "reads", of_mlx)
        for name in (
            "item",
            "tolist",
            "__bool__",
            "__int__",
            "__float__",
            "__array__",
            "__index__",
        ):
            if hasattr(mx.array, name):
                counting(mx.array, name, "reads")
        yield waits


def test_the_counter_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with counted_waits(monkeypatch) as waits:
        np.array(mx.zeros(3)), np.array([1, 2])
        mx.zeros(1).item(), mx.zeros(2).tolist(), bool(mx.array(1))
        mx.eval(mx.zeros(2)), mx.async_eval(mx.zeros(2))
    assert (waits.reads, waits.evaluations, waits.queued) == (4, 1, 1)
    np.array(mx.zeros(3))
    assert waits.reads == 4


def canvases_of(model, config: DiffusionConfig, kind: str) -> list[Canvas]:
    vocab, length = model.config.text.vocab_size, model.config.canvas_length
    rows = 3 if kind == "three" else 1
    layout = None
    if kind == "layout":
        masks = {at: token_mask(range(7, 60), vocab) for at in range(3, length)}
        layout = Layout((7, 8, *[FREE] * (length - 2)), masks)
    return [
        Canvas.start(config, SeededNoise(0, row), 0, length, vocab, layout=layout)
        for row in range(rows)
    ]


@pytest.mark.parametrize("kind", ["one", "three", "layout"])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_waits_once(tiny_model, monkeypatch, sampler, profile, kind) -> None:
    """In every profile and under every sampler, alone, in company and held to a layout."""
    model = tiny_model(3)
    model.eval()
    chosen = profile_settings(profile) | {"sampler": sampler, "max_denoising_steps": 5}
    if chosen.get("settled_after"):
        chosen["settled_after"] = 1
    canvases = canvases_of(model, DiffusionConfig().override(**chosen), kind)
    prompts = [[7, 8, 9 + row] for row in range(len(canvases))]
    prefixes = model.encode(prompts, [model.empty_prefix()] * len(prompts))[1]
    mx.eval([prefix.arrays() for prefix in prefixes])
    denoiser = Denoiser(model)
    for _ in range(4):
        with counted_waits(monkeypatch) as waits:
            queued = denoiser.queue(canvases, prefixes)
        assert (waits.all, waits.queued) == (0, 1)
        with counted_waits(monkeypatch) as waits:
            canvases = queued.read()
        assert waits.all == 1
        for canvas in canvases:  # what the host goes on with is on the host
            assert isinstance(canvas.draft, np.ndarray)
            assert isinstance(canvas.entropy, np.ndarray)
            assert isinstance(canvas.accepted, np.ndarray)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_run_waits_once_a_step_and_once_a_chunk(tiny_model, monkeypatch, profile) -> None:
    """A canvas that is committed is encoded without a wait of its own."""
    model = tiny_model(3, sliding_window=9)
    model.eval()
    config = DiffusionConfig(
        max_tokens=2 * model.config.canvas_length, max_denoising_steps=6
    ).override(**(profile_settings(profile) | {"max_denoising_steps": 6}))
    steps, chunks, commits = set(), 0, 0
    with counted_waits(monkeypatch) as waits:
        for event in generate_canvases(
            model, [list(range(7, 40))], config, seeded(0), prefill_step_size=16
        ):
            if isinstance(event, DenoisingStep):
                steps.add((event.canvas.index, event.canvas.passes))
            chunks += isinstance(event, PrefillProgress) and event.done > 0
            commits += isinstance(event, CanvasCommitted)
    assert (chunks, commits) == (3, 2)
    assert waits.evaluations == chunks
    assert waits.reads == len(steps)


def test_looks_and_scores_wait_once(tiny_model, monkeypatch) -> None:
    model = tiny_model(3)
    model.eval()
    canvases = canvases_of(model, DiffusionConfig(), "three")
    prefixes = model.encode([[7], [8, 9], [7, 9, 9]], [model.empty_prefix()] * 3)[1]
    denoiser = Denoiser(model)
    with counted_waits(monkeypatch) as waits:
        denoiser.look(canvases, prefixes)
    assert waits.all == 1
    with counted_waits(monkeypatch) as waits:
        denoiser.score(canvases, prefixes, [0, 3, 5], [[7, 8], [9], [10, 11, 12]])
    assert waits.all == 1

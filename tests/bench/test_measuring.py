"""What is measured on small random models: whole and consistent, in tables and as JSON."""

from __future__ import annotations

import json
from io import StringIO

import mlx.core as mx
import pytest
from rich.console import Console

from mlx_diffgemma.bench.counting import Cost
from mlx_diffgemma.bench.device import Device, measure_device
from mlx_diffgemma.bench.random_model import chosen_recipe, random_model
from mlx_diffgemma.bench.rival import RivalReport
from mlx_diffgemma.bench.run import Plan, run_bench
from mlx_diffgemma.bench.speed import ProfileSpeed, TwinReport
from mlx_diffgemma.bench.steps import (
    VOCABULARY_PASSES,
    Stepper,
    using_pass,
    vocabulary_pass_named,
    waits_a_step,
)
from mlx_diffgemma.bench.table import as_tables
from mlx_diffgemma.bench.timing import alternate, milliseconds, peak_bytes
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.events import DenoisingStep
from mlx_diffgemma.diffusion.generate import generate_canvases
from mlx_diffgemma.diffusion.noise import seeded
from mlx_diffgemma.diffusion.profiles import PROFILES
from mlx_diffgemma.errors import UsageError

PLAN = Plan(prefill=(5, 9), prefix=7, batch=2, canvas_length=6, repeats=1)


@pytest.fixture
def model(tiny_config):
    config = ModelConfig.from_dict(tiny_config())
    return random_model(config, chosen_recipe(None, None), mx.float32)


@pytest.fixture
def known_device(monkeypatch):
    device = Device("d", "m", "float32", operations=1e9, bandwidth=1e9)
    monkeypatch.setattr("mlx_diffgemma.bench.run.measure_device", lambda *_: device)


@pytest.fixture
def report(model, known_device):
    return run_bench(model, PLAN, name="tiny", weights_format="unquantized")


def test_a_report_is_whole(report):
    step = report.step
    assert [run.length for run in report.prefill] == [5, 9]
    assert (step.batch, step.canvas, step.prefix) == (2, 6, 7)
    assert [part.name for part in step.parts] == ["layers", "vocabulary pass", "rest"]
    layers, vocabulary, rest = step.parts
    assert step.waits >= 1
    assert layers.floor_seconds == max(layers.operations, layers.bytes) / 1e9 > 0
    assert vocabulary.floor_seconds > 0 == rest.floor_seconds
    assert step.seconds > 0 and layers.seconds > 0 and rest.seconds > 0
    assert step.peak_memory == step.beyond_weights + report.model.weights
    assert {limit.profile: limit.max_steps for limit in report.limits} == {
        name: settings.get("max_denoising_steps", 48) for name, settings in PROFILES.items()
    }
    for limit in report.limits:
        assert limit.canvas_seconds == limit.max_steps * limit.seconds


def test_json_has_every_field(report):
    found = json.loads(report.as_json())
    assert set(found) == {
        "model", "device", "profile", "seed", "load", "prefill", "step", "speeds", "limits",
        "rivals", "twins", "constraints",
    }  # fmt: skip
    assert found["model"] == {
        "name": "tiny", "layers": report.model.layers, "format": "unquantized",
        "weights": report.model.weights, "random": True,
    }  # fmt: skip
    assert set(found["step"]["parts"][0]) == {
        "name", "seconds", "operations", "bytes", "floor_seconds"
    }  # fmt: skip
    assert set(found["step"]) == {
        "batch", "canvas", "prefix", "seconds", "parts", "waits", "peak_memory", "beyond_weights"
    }  # fmt: skip
    assert found["prefill"][0]["tokens_per_second"] > 0


def test_tables_show_what_there_is(report):
    import dataclasses

    full = dataclasses.replace(
        report,
        step=dataclasses.replace(report.step, seconds=2.0, waits=1.5),
        limits=(),
        speeds=(ProfileSpeed("exact", 120, 2, 40, 33.3, 3.0),),
        rivals=(RivalReport("other 1.0", 0.5, 2.0, 0.25, 10_000_000, 99_000_000),),
        twins=(TwinReport("twin", 64, 50.0, None, None),),
    )
    text = StringIO()
    Console(file=text, width=110).print(as_tables(full))
    shown = " ".join(text.getvalue().split())
    assert "profile balanced, batch 2, canvas 6, prefix 7" in shown
    assert "│ exact │ 120 │ 2 │ 40 │ 3.0 │ 33.3 │" in shown
    assert "│ other 1.0 │ 500 │ 2000 │ 0.25 │ 10 │ 99 │" in shown
    assert "│ twin │ 64 │ 50.0 │ – │ – │" in shown
    assert "│ whole step │ 2000 │ 1.5 │" in shown
    assert "Profiles at their cap" not in shown


def test_steps_are_those_of_the_loop(model):
    """The first steps of an endless canvas are those of a canvas with as many."""
    config = DiffusionConfig(max_denoising_steps=1 << 20, canvas_length=6, max_tokens=6)
    stepper = Stepper(model, config, prefix=1, seed=3)
    drafts = [stepper()[0].draft.tolist() for _ in range(3)]
    prompt = [[int(mx.random.randint(8, model.config.text.vocab_size, (1, 1),
                                     key=mx.random.key(3)).item())]]  # fmt: skip
    events = generate_canvases(model, prompt, config, seeded(3))
    steps = [
        event.canvas.draft.tolist() for event, _ in zip(_steps(events), range(3), strict=False)
    ]
    assert drafts == steps


def _steps(events):
    return (event for event in events if isinstance(event, DenoisingStep))


def test_steps_never_end_and_number_on(model):
    stepper = Stepper(model, DiffusionConfig(max_denoising_steps=2, canvas_length=4), prefix=3)
    assert [[canvas.passes for canvas in stepper()] for _ in range(7)] == [[n] for n in range(1, 8)]


def test_a_step_of_several_sequences_is_one_call(model):
    stepper = Stepper(model, DiffusionConfig(canvas_length=4), prefix=3, batch=3)
    calls = [stepper() for _ in range(2)]
    assert [[canvas.passes for canvas in canvases] for canvases in calls] == [[1] * 3, [2] * 3]
    assert [canvas.noise.sequence for canvas in calls[1]] == [0, 1, 2]


@pytest.mark.parametrize("name", VOCABULARY_PASSES)
@pytest.mark.usefixtures("known_device")
def test_vocabulary_passes_go_by_name(model, name, monkeypatch):
    own, calls = model.vocabulary_pass, []

    def noted(*args, **kwargs):
        calls.append(name)
        return found(*args, **kwargs)

    found = vocabulary_pass_named(name)
    monkeypatch.setattr("mlx_diffgemma.bench.steps.VOCABULARY_PASSES", {name: noted})
    plan = Plan(prefill=(), prefix=2, canvas_length=4, repeats=1, vocabulary_pass=name)
    assert run_bench(model, plan, name="x").step.seconds > 0
    assert calls and model.vocabulary_pass is own
    with pytest.raises(UsageError, match=rf"^--vocabulary-pass 'no' is unknown; known are {name}"):
        vocabulary_pass_named("no")


def test_a_pass_is_put_back_after_a_failure(model):
    own = model.vocabulary_pass
    with pytest.raises(KeyError), using_pass(model, vocabulary_pass_named("whole")):
        raise KeyError
    assert model.vocabulary_pass is own


def test_waits_are_those_of_one_step(model):
    """The whole vocabulary takes none; what the host wants to know is one read."""
    stepper = Stepper(model, DiffusionConfig(canvas_length=4), prefix=3, batch=2)
    stepper()
    with using_pass(model, vocabulary_pass_named("whole")):
        assert waits_a_step(stepper) == 1


def test_the_floor_is_the_slower_of_computing_and_reading():
    device = Device("d", "m", "float32", operations=100.0, bandwidth=10.0)
    assert device.floor(Cost(operations=200, bytes=10)) == 2
    assert device.floor(Cost(operations=200, bytes=70)) == 7


def test_a_device_can_do_something():
    device = measure_device(mx.float32, "some BLAS")
    assert device.operations > 1e8 and device.bandwidth > 1e7
    assert (device.dtype, device.blas) == ("float32", "some BLAS")


def test_turns_alternate_and_warm_up():
    order: list[str] = []
    times = alternate({name: lambda n=name: order.append(n) for name in "ab"}, repeats=2)
    assert order == ["a", "b"] * 3
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2}


def test_peak_is_of_the_call_alone():
    def hold(megabytes):
        return lambda: mx.eval(mx.zeros((megabytes, 1_000_000), mx.uint8) + 1)

    large, small = peak_bytes(hold(64)), peak_bytes(hold(4))
    assert large - small > 50_000_000


@pytest.mark.usefixtures("known_device")
def test_constraints_are_measured_beside_none(model):
    plan = Plan(prefill=(), prefix=2, canvas_length=8, repeats=1, constraints=True)
    report = run_bench(model, plan, name="x")
    none, *others = report.constraints
    assert (none.name, none.ratio) == ("none", 1.0)
    assert len(others) == 5
    for cost in others:
        assert cost.ratio == cost.seconds / none.seconds
    text = StringIO()
    Console(file=text, width=110).print(as_tables(report))
    assert "│ every second position fixed │" in " ".join(text.getvalue().split())


def test_milliseconds_have_no_exponent():
    assert (milliseconds(0.0123456), milliseconds(12.3456)) == ("12.35", "12346")

"""The script for whoever has a GPU, on a CPU in small shapes: its rows, its JSON, its baselines."""

from __future__ import annotations

import importlib.util
import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_diffgemma.bench import random_model, variants, workbench
from mlx_diffgemma.bench.counting import Cost
from mlx_diffgemma.bench.device import Device
from mlx_diffgemma.bench.timing import alternate
from mlx_diffgemma.bench.variants import Line, Variant, guessed_seconds, measure
from mlx_diffgemma.errors import CheckpointError

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_gpu_step.py"
DEVICE = Device("a device", "m", "float32", operations=1e9, bandwidth=1e9)
PLAN = "--small --profile exact --profile turbo --batch 1 --batch 2 --repeats 1 --burst 2"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("bench_gpu_step", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.measure_device = lambda dtype: DEVICE
    return module


@pytest.fixture
def without_mlx_vlm(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("mlx_diffgemma.bench.rival.version", missing)


@pytest.fixture
def whole(script, without_mlx_vlm, monkeypatch, capsys):
    """What the plan printed on stdout and stderr, for `--json` and for people. The first variant of
    a part takes 1 s, the second 2 s and so on."""
    monkeypatch.setattr(
        variants, "alternate", lambda runs, *_, **__: {n: [k + 1] for k, n in enumerate(runs)}
    )
    assert script.main([*PLAN.split(), "--json"]) == 0
    return capsys.readouterr()


def test_every_part_has_its_rows_and_each_ratio_is_to_the_line_that_it_names(whole, script):
    found = json.loads(whole.out)
    assert set(found) == {
        "device", "mlx", "operations_per_second", "bytes_per_second", "kernels", "shapes",
        "repeats", "burst", "guessed_seconds", "lines",
    }  # fmt: skip
    assert found["kernels"] == "twins" and found["device"] == "a device"
    assert found["shapes"]["batches"] == [1, 2] and found["shapes"]["canvas"] == 16
    first, soft = "chunks of 1024", ("likely tokens", "all tokens", "no soft embeddings")
    forms = (first, "chunks of 2048", "chunks of 4096", "one product", "a CPU's tiles")
    # Whose time is divided by what, beside what each is compared with.
    expected = {
        "step": [
            ("exact, batch 1", None), ("exact, batch 2", "exact, batch 1"),
            ("turbo, batch 1", "exact, batch 1"), ("turbo, batch 2", "turbo, batch 1"),
        ],
        "vocabulary": [
            (
                f"{what}, {form}",
                f"{what}, {first}" if form != first
                else None if what == soft[0] else f"{soft[0]}, {first}",
            )
            for what in soft for form in forms
        ],
        "layers": [("eager", None), ("compiled", "eager")],
        "prefill": [
            ("64 tokens by 16", "64 tokens by 64"), ("64 tokens by 32", "64 tokens by 64"),
            ("64 tokens by 64", None),
        ],
        "experts": [
            ("16 positions", None), ("8 positions (0.5)", "16 positions"),
            ("4 positions (0.25)", "16 positions"),
        ],
        "mlx-vlm": [("mlx-vlm", None)],
    }  # fmt: skip
    shares = {"step": (2, 4, 2, 4), "experts": (2, 2, 2)}  # canvases in two steps; layers
    assert set(expected) == set(script._PARTS)
    for part, rows in expected.items():
        lines = [line for line in found["lines"] if line["part"] == part]
        assert [(line["name"], line["baseline"]) for line in lines] == rows
        if part == "mlx-vlm":
            continue
        seconds = {}
        for place, line in enumerate(lines):
            seconds[line["name"]] = (place + 1) / shares.get(part, [1] * len(lines))[place]
            assert line["beside"] > 0 and line["note"] == ""
        assert {line["name"]: line["seconds"] for line in lines} == seconds
        for line in lines:
            own, base = line["seconds"], line["baseline"]
            assert line["ratio"] == (None if base is None else own / seconds[base])
    assert sum(map(len, expected.values())) == len(found["lines"])


def test_it_says_first_what_it_will_do_and_how_to_get_what_is_missing(whole):
    said = whole.err.splitlines()
    assert said[0].startswith(
        "Random weights in the shapes of small shapes: 2 layers of width 64, "
    )
    assert "  vocabulary: 15 variants" in said
    measuring = [line for line in said if line.startswith("measuring: ")]
    duration = next(place for place, line in enumerate(said) if "may take up to about" in line)
    assert duration < said.index("making the weights") < said.index(measuring[0])
    missing = json.loads(whole.out)["lines"][-1]
    assert (missing["name"], missing["seconds"]) == ("mlx-vlm", None)
    assert 'beside/bin/pip install . "mlx-vlm==0.7.10"' in missing["note"]
    assert len(measuring) == 5


def test_a_table_has_a_row_a_line_and_says_why_some_are_empty(script, without_mlx_vlm, capsys):
    arguments = "--small --part layers --part mlx-vlm --repeats 1"
    assert script.main(arguments.split()) == 0
    shown = capsys.readouterr().out
    cells = [[cell.strip() for cell in row.split("│")] for row in shown.splitlines() if "│" in row]
    assert [row[1:3] for row in cells] == [["layers", "eager"], ["", "compiled"], ["mlx-vlm"] * 2]
    assert float(cells[1][3]) > 0 and float(cells[1][4]) > 0 and cells[1][5] == "eager"
    assert "mlx-vlm, mlx-vlm: not installed; in an environment of its own:" in shown


def test_no_cpu_is_kept_busy_for_hours(script, capsys):
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        assert script.main([]) == 2
    finally:
        mx.set_default_device(before)
    error = "error: these shapes take a CPU hours; run this on a GPU, or add --small.\n"
    assert capsys.readouterr().err == error
    assert script.main(["--small", "--batch", "0"]) == 2
    assert capsys.readouterr().err == "error: --batch must be at least 1, not 0.\n"


def test_mlx_vlm_is_a_baseline_of_ours(script, monkeypatch):
    monkeypatch.setattr(workbench, "rival_version", lambda: "9")
    args = script._arguments(PLAN.split())
    theirs = ("mlx-vlm 9, confidence-threshold", "mlx-vlm 9, entropy-bound")
    planned = script._workbench(args).rivals()
    assert [(each.name, each.baselines, each.share) for each in planned] == [
        (theirs[0], (), 2), (theirs[1], (), 2),
        ("ours, balanced", theirs, 2), ("ours, exact", theirs, 2),
    ]  # fmt: skip


def waiting(name, **more):
    return Variant(name, lambda: lambda: mx.eval(mx.ones((1000, 1000)) + 1), **more)


def test_what_fails_or_would_not_fit_is_a_line(monkeypatch):
    def fails():
        raise RuntimeError("no kernel\nfor this")

    def refuses():
        raise CheckpointError("it is another version.")

    monkeypatch.setattr(variants, "available_memory", lambda: 10**9)
    lines = measure(
        "some",
        [
            waiting("a", needs=10**9),
            waiting("b", needs=2 * 10**9, baselines=("a",)),
            Variant("c", fails, ("a", "b")),
            Variant("d", refuses),
        ],
        repeats=1,
    )
    a, b, c, other, d = lines
    assert a.seconds > 0 and a.beside >= 4_000_000 and a.note == ""
    left_out = "left out: it may take 2.0 GB, and 1.0 GB are free"
    assert b == Line("some", "b", None, "a", None, None, left_out)
    assert c == Line("some", "c", None, "a", None, None, "failed: no kernel")
    assert (other.baseline, other.ratio) == ("b", None)
    assert d.note == "failed: it is another version."


def test_memory_is_what_a_variant_adds_to_what_is_held():
    held = mx.zeros((3000, 1000))
    mx.eval(held)

    def keeping():
        kept = mx.zeros((2000, 1000))
        mx.eval(kept)
        return lambda: mx.eval(kept[:1] + 1)

    (line,) = measure("some", [Variant("a", keeping)], repeats=1)
    assert 8_000_000 <= line.beside < 9_000_000


def test_a_guess_counts_every_run():
    second = Cost(operations=1e9)
    low, high = guessed_seconds([waiting("a", cost=second, setup=second)] * 2, DEVICE, repeats=3)
    assert low == 2 * (3 + 2 + 1)
    assert high > low


def test_a_time_ends_when_the_device_is_done(monkeypatch):
    """Not when the call returns: what it queued is no part of what is timed next."""
    ticks = iter(range(100))
    events = []
    monkeypatch.setattr(mx, "synchronize", lambda: events.append("done"))

    def clock():
        events.append("clock")
        return float(next(ticks))

    alternate({"a": lambda: events.append("a")}, repeats=1, warmup=0, clock=clock)
    assert events == ["clock", "a", "done", "clock"]


def test_a_twin_shares_every_array_and_computes_the_same(script):
    bench = script._workbench(script._arguments(["--small"]))
    model = bench.model
    before = mx.get_active_memory()
    twin = random_model.twin_of(model)
    held = mx.get_active_memory() - before
    assert held < bench.weight_bytes // 10
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(model.embed(tokens), twin.embed(tokens))
    assert random_model.formats_of(twin) == random_model.formats_of(model)
    assert model.layers[0]._compiled is not None and twin.layers[0]._compiled is None

"""Waits, reads and nodes are counted as they are, and a step at real shapes asks for few."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.bench.counted import as_on_a_gpu, counted, nodes
from mlx_diffgemma.bench.presets import RELEASE, SMALL, config_like
from mlx_diffgemma.bench.random_model import blank_model, chosen_recipe, formats_of, random_model
from mlx_diffgemma.bench.step_counts import CONSTRAINTS, count_step
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.profiles import PROFILES, profile_settings
from mlx_diffgemma.kernels import dispatch

SCRIPT = Path(__file__).parents[2] / "scripts" / "count_step.py"

READS: dict[str, Callable[[mx.array], object]] = {
    "np.array": np.array,
    "np.asarray": np.asarray,
    "np.array of another type": lambda x: np.array(x, np.float32),
    "memoryview": memoryview,
    "arithmetic of numpy": lambda x: np.ones(3) + x,
    "dlpack": np.from_dlpack,
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0] > 0),
    "int": lambda x: int(x[0]),
    "float": lambda x: float(x[0]),
    "index": lambda x: [7, 8, 9][x[0]],
    "print": repr,
}


@pytest.mark.parametrize("name", READS)
def test_a_read_is_one_however_it_is_done(name):
    x = mx.arange(3)
    with counted() as counts:
        READS[name](x)
    assert (counts.reads, counts.evals, counts.async_evals, counts.waits) == (1, 0, 0, 1)


def test_what_stays_on_the_device_is_no_read():
    x = mx.arange(6).reshape(2, 3)
    with counted() as counts:
        rows = list(x)
        y = mx.where(x > 2, x[mx.array([1, 0])], rows[0]).astype(mx.bfloat16)
        assert (y.shape, len(x), mx.array(x).dtype) == ((2, 3), 2, mx.int32)
    assert (counts.waits, counts.async_evals) == (0, 0)


def test_a_function_with_known_waits():
    def work():
        x = mx.arange(4)
        mx.async_eval(x + 1)
        mx.eval(x, x * 2)
        mx.synchronize()
        mx.async_eval(x)
        return np.array([np.array(x).sum(), x[1].item()])

    with counted() as counts:
        assert work().tolist() == [6, 1]
    assert (counts.evals, counts.async_evals, counts.reads, counts.waits) == (2, 2, 2, 4)


def test_everything_is_as_before_afterwards():
    names = ("item", "tolist", "__bool__", "__array__")
    before = [getattr(mx.array, name) for name in names], mx.eval, mx.async_eval
    x = mx.arange(3)
    with pytest.raises(KeyError), counted() as counts:
        raise KeyError
    with counted() as outer:
        with counted() as inner:
            np.array(x)
        np.array(x)
    np.array(x)
    mx.eval(x)
    assert ([getattr(mx.array, name) for name in names], mx.eval, mx.async_eval) == before
    assert (counts.waits, inner.waits, outer.waits) == (0, 1, 2)


def test_a_read_that_fails_fails_as_before():
    wide = mx.arange(3).astype(mx.bfloat16)
    with counted() as counts, pytest.raises(ValueError, match="bfloat16"):
        np.array(wide)
    assert counts.reads == 1


def test_nodes_are_operations_that_are_still_to_run():
    x = mx.arange(4, dtype=mx.float32)
    mx.eval(x)
    y = mx.exp(x) + x
    assert nodes(y) == {"Exp": 1, "Add": 1}
    assert nodes(y, y * y).total() == 3
    mx.eval(y)
    assert nodes(y) == {}


KERNEL = dispatch.MetalKernel("some", ("a",), ("b", "c"), "")


def launch(a: mx.array) -> list[mx.array]:
    run = dispatch.launcher_for("auto")
    assert run is not None
    return run(
        KERNEL, inputs=[a], template=[], grid=(1, 1, 1), threadgroup=(1, 1, 1),
        output_shapes=[(2, 3), (4,)], output_dtypes=[mx.bfloat16, mx.int32],
    )  # fmt: skip


def test_a_kernel_is_one_operation_that_waits_for_its_inputs():
    x = mx.zeros((5,))
    mx.eval(x)
    with as_on_a_gpu(fresh=False) as work:
        b, c = launch(x + x)
    assert [(b.shape, b.dtype), (c.shape, c.dtype)] == [((2, 3), mx.bfloat16), ((4,), mx.int32)]
    assert nodes(b, c) == {"Add": 1, "Depends": 1}
    assert c.tolist() == [1, 1, 1, 1]
    assert work.kernels == {"some": 1}


@pytest.mark.parametrize(("mode", "bits"), [("affine", 4), ("affine", 8), ("mxfp4", 4)])
def test_products_have_the_shapes_of_mlx(mode, bits):
    size = {"mxfp4": 32}.get(mode, 64)
    w = mx.random.normal((3, 64, 128), key=mx.random.key(0))
    packed = mx.quantize(w, group_size=size, bits=bits, mode=mode)
    one = [part[0] for part in packed]
    settings = {"group_size": size, "bits": bits, "mode": mode}
    x, p = mx.ones((5, 7, 128)), mx.ones((5, 64))
    pairs, chosen = mx.ones((6, 1, 128)), mx.array([0, 1, 2, 2, 1, 0])

    def products():
        return (
            mx.quantized_matmul(x, *one, transpose=True, **settings),
            mx.quantized_matmul(p, *one, transpose=False, **settings),
            mx.gather_qmm(pairs, *packed, rhs_indices=chosen, transpose=True, **settings),
            mx.gather_mm(pairs, w.swapaxes(1, 2), rhs_indices=chosen),
            pairs[:5] @ w[0].T,
            p @ w[0],
        )

    expected = products()
    with as_on_a_gpu() as work:
        found = products()
    assert work.products == 6
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert products()[0].tolist() == expected[0].tolist()


def test_a_blank_model_has_the_shapes_of_a_random_one():
    raw = config_like(SMALL)
    raw["text_config"] = {**raw["text_config"], "vocab_size": 2048}
    config, recipe = ModelConfig.from_dict(raw), chosen_recipe(None, "4bit")
    before = mx.get_active_memory()
    blank = blank_model(config, recipe, mx.bfloat16)
    assert mx.get_active_memory() - before < 100_000
    drawn = random_model(config, recipe, mx.bfloat16)
    assert formats_of(blank) == formats_of(drawn)
    assert _shapes(blank) == _shapes(drawn)


def _shapes(model):
    from mlx.utils import tree_flatten

    return {name: (a.shape, a.dtype) for name, a in tree_flatten(model.parameters())}


@pytest.fixture(scope="module")
def release():
    """Width 2,816, 262,144 words, canvas 256; two of the layers, one of each kind."""
    return ModelConfig.from_dict(config_like(RELEASE, 2))


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_step_at_the_release_s_shapes_keeps_a_gpu_busy(release, profile, constraint):
    settings = DiffusionConfig().override(**profile_settings(profile))
    counts = count_step(release, chosen_recipe(None, "4bit"), settings, constraint=constraint)
    assert counts.waits <= (3 if constraint == "grammar" else 2)
    assert counts.vocabulary <= 600
    assert counts.beside <= 150_000_000
    assert counts.kernels > 32 and counts.products > 32  # one of each a chunk, at the least


def test_this_machine_s_forms_wait_more(tiny_config):
    config = ModelConfig.from_dict(tiny_config(vocab_size=9000))
    settings = DiffusionConfig(canvas_length=8)
    plain = chosen_recipe(None, None)
    counts = count_step(config, plain, settings, form="cpu", prefix=5, batch=2)
    gpu = count_step(config, plain, settings, prefix=5, batch=2)
    assert counts.waits > gpu.waits == 1
    assert (counts.layers, counts.vocabulary, counts.kernels) == (None, None, None)
    assert gpu.layers > 0 and gpu.vocabulary > 0 and gpu.rest > 0


def test_the_script_prints_a_row_for_each(tmp_path, tiny_config, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("count_step", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    layers = len(tiny_config()["text_config"]["layer_types"])
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(vocab_size=9000)))
    arguments = (
        f"count_step --like {tmp_path} --layers {layers} --recipe none --prefix 5 --profile fast "
        "--constraint none --constraint grammar"
    )
    monkeypatch.setattr("sys.argv", arguments.split())
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[4:]] == [
        ["| fast", "none"],
        ["| fast", "grammar"],
    ]
    assert len({line.count("|") for line in lines[2:]}) == 1
    monkeypatch.setattr("sys.argv", [*arguments.split()[:-2], "--json"])
    script.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["waits"] == 1

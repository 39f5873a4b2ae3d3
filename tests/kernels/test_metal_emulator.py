"""The emulator itself: were it to pass where Metal goes wrong, its results would mean nothing."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from metal_emulator import MetalEmulator

from mlx_diffgemma.kernels.dispatch import MetalKernel

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def run(folder: Path, source: str, x: mx.array, *, threads: int = 64, schedule: int = 0, **kind):
    kernel = MetalKernel("probe", ("x",), ("out",), source)
    return MetalEmulator(folder, schedule)(
        kernel,
        inputs=[x],
        template=[("T", x.dtype)],
        grid=(x.size, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[kind.get("shape", x.shape)],
        output_dtypes=[kind.get("dtype", x.dtype)],
    )[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_floats_convert_as_mlx_does(emulator_folder: Path, dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(0)
    exact = rng.integers(0, 2**32, 4096, dtype=np.uint32).view(np.float32)
    exact = np.where(np.isnan(exact), np.float32(0), exact)
    edges = [0, -0.0, 1e-8, 6e-8, 65504, 65519, 65520, 3.4e38, np.inf, -np.inf, np.nan] * 64
    x = mx.array(np.concatenate([exact, np.array(edges, np.float32)]))
    out = run(
        emulator_folder,
        "out[thread_position_in_grid.x] = Narrow(x[thread_position_in_grid.x]);".replace(
            "Narrow", {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"}[dtype]
        ),
        x,
        dtype=dtype,
    )
    expected = x.astype(dtype).astype(mx.float32)
    np.testing.assert_array_equal(np.array(out.astype(mx.float32)), np.array(expected))


@pytest.mark.parametrize("schedule", [0, 1, 7])
def test_threads_meet_at_barriers_and_in_simdgroups(emulator_folder: Path, schedule: int) -> None:
    source = """
        threadgroup float shared[64];
        uint i = thread_index_in_threadgroup;
        shared[i] = x[thread_position_in_grid.x];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float other = shared[63 - i];
        float total = simd_sum(other);
        float largest = simd_max(other);
        float before = simd_prefix_exclusive_sum(other);
        float first = simd_broadcast(other, 0);
        out[thread_position_in_grid.x] = total + 1000 * largest + before + first;
    """
    values = np.arange(192, dtype=np.float32)
    out = run(emulator_folder, source, mx.array(values), schedule=schedule)
    groups = values.reshape(3, 64)[:, ::-1].reshape(6, 32)
    before = np.cumsum(groups, axis=1) - groups
    expected = groups.sum(1, keepdims=True) + 1000 * groups.max(1, keepdims=True) + before
    np.testing.assert_array_equal(out, (expected + groups[:, :1]).reshape(-1))


def test_a_missing_barrier_shows_in_some_schedule(emulator_folder: Path) -> None:
    source = """
        threadgroup float shared[64];
        shared[thread_index_in_threadgroup] = x[thread_position_in_grid.x];
        out[thread_position_in_grid.x] = shared[63 - thread_index_in_threadgroup];
    """
    x = mx.arange(64, dtype=mx.float32)
    results = [np.array(run(emulator_folder, source, x, schedule=s)) for s in (0, 1, 7)]
    assert all(np.isnan(result).any() for result in results)
    assert not np.array_equal(results[0], results[1], equal_nan=True)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "if (thread_index_in_simdgroup < 7) out[0] = simd_sum(x[0]);",
            "probe: threads wait at different places: thread 0 at line ",
        ),
        (
            "if (simdgroup_index_in_threadgroup == 0) threadgroup_barrier(mem_flags::mem_none);",
            "probe: threads wait at different places: thread 0 at line ",
        ),
        ("out[x_shape[0]] = T(1.0f);", "probe: wrote outside out"),
        ("out[0] = T(1.0f); out[-1] = T(1.0f);", "probe: wrote outside out"),
    ],
)
def test_what_metal_would_not_forgive_fails(
    emulator_folder: Path, source: str, message: str
) -> None:
    with pytest.raises(RuntimeError) as raised:
        run(emulator_folder, source, mx.zeros(64))
    assert str(raised.value).startswith(message)


def test_an_input_cannot_be_written(emulator_folder: Path) -> None:
    with pytest.raises(RuntimeError, match=r"probe: g\+\+ refuses the source"):
        run(emulator_folder, "x[0] = T(1.0f);", mx.zeros(64))


def test_what_is_read_beyond_an_input_is_not_a_number(emulator_folder: Path) -> None:
    out = run(emulator_folder, "out[thread_position_in_grid.x] = x[x_shape[0]];", mx.zeros(64))
    assert np.isnan(np.array(out)).all()

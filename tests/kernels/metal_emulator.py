"""Runs the Metal source of a kernel on the CPU: g++ compiles it behind `metal_shim/metal_shim.h`.

The function around the source is the one that `mx.fast.metal_kernel` writes: inputs and outputs as
pointers of the arrays' types (a reference for an array without dimensions), `_shape`, `_strides`
and `_ndim` of an input where the source names them, and the thread attributes that it names.
Buffers stand between guards: what is read beyond them is NaN, what is written there fails the run.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.kernels.dispatch import MetalKernel

SHIM = Path(__file__).parent / "metal_shim"
GUARD = 256

TYPES = {
    mx.float32: ("float", np.float32),
    mx.float16: ("float16_t", np.float16),
    mx.bfloat16: ("bfloat16_t", np.uint16),
    mx.int32: ("int32_t", np.int32),
    mx.uint32: ("uint32_t", np.uint32),
    mx.uint8: ("uint8_t", np.uint8),
    mx.bool_: ("bool", np.bool_),
}

ATTRIBUTES = {
    "thread_position_in_grid": ("uint3", "metal_shim::self().position_in_grid"),
    "thread_position_in_threadgroup": ("uint3", "metal_shim::self().position_in_threadgroup"),
    "threadgroup_position_in_grid": ("uint3", "metal_shim::group.position"),
    "threads_per_threadgroup": ("uint3", "metal_shim::group.size"),
    "thread_index_in_threadgroup": ("uint", "metal_shim::self().index"),
    "thread_index_in_simdgroup": ("uint", "metal_shim::lane()"),
    "simdgroup_index_in_threadgroup": ("uint", "metal_shim::self().index / metal_shim::kLanes"),
    "simdgroups_per_threadgroup": ("uint", "uint(metal_shim::group.fibers.size()) / 32"),
}


class MetalEmulator:
    """A `Launcher`. `schedule` orders the threads: 0 forward, 1 backward, else shuffled by it."""

    def __init__(self, folder: Path, schedule: int = 0) -> None:
        self.folder, self.schedule = folder, schedule
        self.launches: list[str] = []

    def __call__(
        self,
        kernel: MetalKernel,
        *,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, Any]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        self.launches.append(kernel.name)
        source = write_source(kernel, inputs, template, output_dtypes)
        run = ctypes.CDLL(str(self._compiled(kernel.name, source))).run
        buffers = [_Buffer.holding(x) for x in inputs]
        for shape, dtype in zip(output_shapes, output_dtypes, strict=True):
            buffers.append(_Buffer(int(np.prod(shape)) * dtype.size))
        shapes = [np.array(x.shape, np.int32) for x in inputs]
        strides = [np.array(_strides(x), np.int64) for x in inputs]
        message = ctypes.create_string_buffer(200)
        failed = run(
            (ctypes.c_void_p * len(buffers))(*(b.address for b in buffers)),
            (ctypes.c_void_p * len(shapes))(*(s.ctypes.data for s in shapes)),
            (ctypes.c_void_p * len(strides))(*(s.ctypes.data for s in strides)),
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*threadgroup),
            ctypes.c_uint(self.schedule),
            message,
        )
        if failed:
            raise RuntimeError(f"{kernel.name}: {message.value.decode()}")
        for buffer, name in zip(buffers, [*kernel.inputs, *kernel.outputs], strict=True):
            if not buffer.is_guarded():
                raise RuntimeError(f"{kernel.name}: wrote outside {name}")
        return [
            buffer.array(shape, dtype)
            for buffer, shape, dtype in zip(
                buffers[len(inputs) :], output_shapes, output_dtypes, strict=True
            )
        ]

    def _compiled(self, name: str, source: str) -> Path:
        header = (SHIM / "metal_shim.h").read_bytes()
        digest = hashlib.sha256(source.encode() + header).hexdigest()[:16]
        library = self.folder / f"{name}-{digest}.so"
        if not library.exists():
            code, fresh = library.with_suffix(".cpp"), library.with_suffix(".tmp")
            code.write_text(source)
            command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Werror"]
            command += ["-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-ffp-contract=off"]
            command += ["-fno-gnu-unique"]
            command += ["-I", str(SHIM), "-o", str(fresh), str(code)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name}: g++ refuses the source:\n{done.stderr}")
            fresh.rename(library)
        return library


def write_source(
    kernel: MetalKernel,
    inputs: Sequence[mx.array],
    template: Sequence[tuple[str, Any]],
    output_dtypes: Sequence[mx.Dtype],
) -> str:
    """The C++ around the source of a kernel for arrays of these types."""
    settings, parameters, arguments = [], [], []
    for name, value in template:
        if isinstance(value, mx.Dtype):
            settings.append(f"typedef {TYPES[value][0]} {name};")
        else:
            kind = "bool" if isinstance(value, bool) else "int"
            settings.append(f"constexpr {kind} {name} = {int(value)};")
    for place, (name, array) in enumerate(zip(kernel.inputs, inputs, strict=True)):
        kind = f"const {TYPES[array.dtype][0]}"
        is_scalar = array.ndim == 0
        parameters.append(f"{kind}{'&' if is_scalar else '*'} {name}")
        arguments.append(f"{'*' if is_scalar else ''}({kind}*)buffers[{place}]")
        for suffix, pointee in (("shape", "int"), ("strides", "int64_t")):
            if f"{name}_{suffix}" in kernel.source and not is_scalar:
                parameters.append(f"const {pointee}* {name}_{suffix}")
                arguments.append(f"(const {pointee}*){suffix}[{place}]")
        if f"{name}_ndim" in kernel.source and not is_scalar:
            parameters.append(f"const int& {name}_ndim")
            arguments.append(str(array.ndim))
    for place, (name, dtype) in enumerate(zip(kernel.outputs, output_dtypes, strict=True)):
        kind = TYPES[dtype][0]
        parameters.append(f"{kind}* {name}")
        arguments.append(f"({kind}*)buffers[{place + len(inputs)}]")
    for name, (kind, value) in ATTRIBUTES.items():
        if re.search(rf"\b{name}\b", kernel.source):
            parameters.append(f"{kind} {name}")
            arguments.append(value)
    lines = [
        '#include "metal_shim.h"',
        "using namespace metal;",
        kernel.header,
        *settings,
        f"static void kernel_function({', '.join(parameters)}) {{",
        kernel.source,
        "}",
        'extern "C" int run(void** buffers, void** shape, void** strides, const uint* grid,',
        "                   const uint* threads, uint schedule, char* message) {",
        "  char* memory = __start_threadgroup_memory;",
        "  size_t bytes = memory ? __stop_threadgroup_memory - memory : 0;",
        "  return metal_shim::run(grid, threads, schedule, memory, bytes, message, [&] {",
        f"    kernel_function({', '.join(arguments)});",
        "  });",
        "}",
    ]
    return "\n".join(lines)


class _Buffer:
    """Bytes between two guards; all ones at first, which is NaN in every float type."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.memory = np.full(size + 2 * GUARD, 0xFF, np.uint8)

    @classmethod
    def holding(cls, x: mx.array) -> _Buffer:
        if x.dtype == mx.bfloat16:
            x = x.view(mx.uint16)
        content = np.ascontiguousarray(np.array(x)).reshape(-1).view(np.uint8)
        buffer = cls(content.size)
        buffer.memory[GUARD : GUARD + content.size] = content
        return buffer

    @property
    def address(self) -> int:
        return self.memory.ctypes.data + GUARD

    def is_guarded(self) -> bool:
        before, after = self.memory[:GUARD], self.memory[GUARD + self.size :]
        return bool((before == 0xFF).all() and (after == 0xFF).all())

    def array(self, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        content = self.memory[GUARD : GUARD + self.size].view(TYPES[dtype][1]).reshape(shape)
        result = mx.array(content)
        return result.view(mx.bfloat16) if dtype == mx.bfloat16 else result


def _strides(x: mx.array) -> list[int]:
    """Of a row-contiguous array, in elements."""
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides[: x.ndim]

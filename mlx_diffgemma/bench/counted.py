"""What only a Mac can time but any machine can count: waits, reads, kernels, nodes of a graph.

A wait costs nothing on a CPU and a GPU much, so a step that is fast here may starve there. Inside
`counted`, everything by which a Python program can wait for MLX, or read from an array, is counted.
Inside `as_on_a_gpu`, a model asks for what it asks of a GPU: kernels are launched, and
products, norms, rotations and attention are one operation each. Each of these returns ones of the
right shape and type, which depend on its inputs.
"""

from __future__ import annotations

import ctypes
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.kernels import dispatch

_WAITS = ("eval", "synchronize")
_READS = (
    "item", "tolist", "__array__", "__dlpack__", "__bool__", "__int__", "__float__", "__complex__",
    "__index__", "__repr__", "__str__", "__format__", "__bytes__", "__reduce__", "__reduce_ex__",
    "__getstate__",
)  # fmt: skip


@dataclass
class Counts:
    """What was counted so far.

    Attributes:
        evals: waits for arrays that were asked for: `mx.eval` and `mx.synchronize`.
        async_evals: graphs handed to the device without waiting.
        reads: values of an array taken by the host, which waits for them where they are not there
            yet.
    """

    evals: int = 0
    async_evals: int = 0
    reads: int = 0

    @property
    def waits(self) -> int:
        """How often the host waited or read."""
        return self.evals + self.reads


@contextmanager
def counted() -> Iterator[Counts]:
    """Count waits and reads of the whole process until the context ends.

    Reads through the buffer protocol (`np.array`, `np.asarray`, `memoryview`) are counted where
    CPython asks for the buffer, as no method of an array is called for them.
    """
    counts = Counts()

    def count_eval() -> None:
        counts.evals += 1

    def count_async() -> None:
        counts.async_evals += 1

    def count_read() -> None:
        counts.reads += 1

    with ExitStack() as undo:
        for name in _WAITS:
            undo.enter_context(_before(mx, name, count_eval))
        undo.enter_context(_before(mx, "async_eval", count_async))
        for name in _READS:
            if name in vars(mx.array):
                undo.enter_context(_before(mx.array, name, count_read))
        undo.enter_context(_before_buffers(count_read))
        yield counts


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, `owner.name` is `value`."""
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


@contextmanager
def _before(owner: Any, name: str, note: Callable[[], None]) -> Iterator[None]:
    """Inside, each call of `owner.name` is noted first. What it calls itself is not noted again."""
    own = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        note()
        return own(*args, **kwargs)

    with replaced(owner, name, noted):
        yield


_GET_BUFFER = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
_BUFFER_SLOT = 17  # `tp_as_buffer` is so many pointers behind `tp_name`, in every CPython 3


@contextmanager
def _before_buffers(note: Callable[[], None]) -> Iterator[None]:
    """Inside, each look at the memory of an `mx.array` through the buffer protocol is noted."""
    pointer = ctypes.sizeof(ctypes.c_void_p)
    # The head of a type is that of an object, and a size.
    place = id(mx.array) + object.__basicsize__ + pointer + _BUFFER_SLOT * pointer
    procedures = ctypes.c_void_p.from_address(place).value
    assert procedures is not None
    slot = ctypes.c_void_p.from_address(procedures)  # `bf_getbuffer` is the first of them
    own = slot.value
    assert own is not None
    get_buffer = _GET_BUFFER(own)

    def noted(array: int, view: int, flags: int) -> int:
        note()
        return get_buffer(array, view, flags)

    hook = _GET_BUFFER(noted)
    slot.value = ctypes.cast(hook, ctypes.c_void_p).value
    try:
        yield
    finally:
        slot.value = own


@dataclass
class GpuWork:
    """What a GPU would have been asked for.

    Attributes:
        kernels: launches of each kernel of ours, by its name. A launch inside a compiled function
            is noted once, when the function is traced.
        products: products of matrices, noted in the same way.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    products: int = 0


@contextmanager
def as_on_a_gpu(*, fresh: bool = True) -> Iterator[GpuWork]:
    """Inside, every operation that a GPU has kernels for returns ones without computing anything,
    so a model is certain of token 1 at every position. Attention also takes the memory of its
    scores, as it does for heads of a size that Metal has no fused kernel for.

    Compiled functions that are traced inside keep the stand-ins, so a model that is compiled is to
    be used nowhere else.

    Args:
        fresh: whether results take memory of their own, as they do on a device. Where it is false,
            results of one shape share one array, which is a single node of a graph.
    """
    work = GpuWork()
    made: dict[tuple[tuple[int, ...], mx.Dtype], mx.array] = {}

    def ones(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        if fresh:
            return mx.ones(tuple(shape), dtype)
        key = tuple(shape), dtype
        if key not in made:
            made[key] = mx.ones(key[0], dtype)
            mx.eval(made[key])
        return made[key]

    def launch(
        kernel: dispatch.MetalKernel,
        *,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, Any]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        work.kernels[kernel.name] += 1
        results = [ones(*each) for each in zip(output_shapes, output_dtypes, strict=True)]
        return _once_there(results, _arrays(*inputs))

    def quantized_matmul(
        x: mx.array,
        w: mx.array,
        /,
        scales: mx.array,
        biases: mx.array | None = None,
        transpose: bool = True,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        **_: Any,
    ) -> mx.array:
        work.products += 1
        columns = w.shape[-2] if transpose else w.shape[-1] * 32 // _bits(bits, mode)
        (result,) = _once_there(
            [ones((*x.shape[:-1], columns), x.dtype)], _arrays(x, w, scales, biases)
        )
        return result

    def gather_qmm(
        x: mx.array,
        w: mx.array,
        /,
        scales: mx.array,
        biases: mx.array | None = None,
        lhs_indices: mx.array | None = None,
        rhs_indices: mx.array | None = None,
        transpose: bool = True,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        **_: Any,
    ) -> mx.array:
        work.products += 1
        columns = w.shape[-2] if transpose else w.shape[-1] * 32 // _bits(bits, mode)
        chosen = [each.shape for each in (lhs_indices, rhs_indices) if each is not None]
        batch = chosen[0] if chosen else x.shape[:-2]
        (result,) = _once_there(
            [ones((*batch, x.shape[-2], columns), x.dtype)],
            _arrays(x, w, scales, biases, lhs_indices, rhs_indices),
        )
        return result

    def matmul(x: mx.array, y: mx.array) -> mx.array:
        work.products += 1
        batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        shape = (*batch, x.shape[-2], y.shape[-1])
        (result,) = _once_there([ones(shape, x.dtype)], [x, y])
        return result

    def gather_mm(
        a: mx.array,
        b: mx.array,
        /,
        lhs_indices: mx.array | None = None,
        rhs_indices: mx.array | None = None,
        **_: Any,
    ) -> mx.array:
        work.products += 1
        chosen = [each.shape for each in (lhs_indices, rhs_indices) if each is not None]
        batch = chosen[0] if chosen else a.shape[:-2]
        (result,) = _once_there(
            [ones((*batch, a.shape[-2], b.shape[-1]), a.dtype)],
            _arrays(a, b, lhs_indices, rhs_indices),
        )
        return result

    def like(x: mx.array, *others: Any, **named: Any) -> mx.array:
        (result,) = _once_there([ones(x.shape, x.dtype)], _arrays(x, *others, *named.values()))
        return result

    def attention(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **_: Any
    ) -> mx.array:
        scores = ones((*q.shape[:-1], k.shape[-2]), q.dtype)
        shape = (*q.shape[:-1], v.shape[-1])
        (result,) = _once_there([ones(shape, q.dtype)], _arrays(q, k, v, scores, mask))
        return result

    with (
        dispatch.override(launch),
        replaced(mx.fast, "rms_norm", like),
        replaced(mx.fast, "rope", like),
        replaced(mx.fast, "scaled_dot_product_attention", attention),
        replaced(mx, "quantized_matmul", quantized_matmul),
        replaced(mx, "gather_qmm", gather_qmm),
        replaced(mx, "gather_mm", gather_mm),
        replaced(mx.array, "__matmul__", matmul),
    ):
        yield work


def _bits(bits: int | None, mode: str) -> int:
    if bits is not None:
        return bits
    return 8 if mode == "mxfp8" else 4


def _arrays(*given: Any) -> list[mx.array]:
    return [each for each in given if isinstance(each, mx.array)]


def _once_there(results: list[mx.array], inputs: Sequence[mx.array]) -> list[mx.array]:
    """`results` as arrays that MLX makes after `inputs`."""
    return list(mx.depends(results, list(inputs)))


def nodes(*arrays: mx.array) -> Counter[str]:
    """Operations that MLX will run for `arrays`, by name, those behind evaluated arrays left out.

    A wait ends a graph, so what is counted must not be evaluated in parts.
    """
    dot = io.StringIO()
    mx.export_to_dot(dot, *arrays)
    labels = (line.partition('[label ="')[2] for line in dot.getvalue().splitlines())
    return Counter(label.partition('"')[0] for label in labels if label)

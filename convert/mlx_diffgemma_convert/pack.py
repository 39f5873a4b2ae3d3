"""How one block of rows becomes the bytes that are stored, and how much is lost by it.

A block is small enough (a few MB) that several in flight stay far below the memory promised, and
holds whole rows, so that blocks are packed independently and give what the whole would give.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma import cpu
from mlx_diffgemma.checkpoint.quantization import Format
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma_convert.plan import Target
from mlx_diffgemma_convert.source import ITEM_BYTES

MX_DTYPES = {
    "BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U32": mx.uint32, "U8": mx.uint8,
}  # fmt: skip
_BLOCK_BYTES = 4 << 20  # fits the caches, so a block is read, hashed and packed in them
_CPU_CHECK_EVERY = 32  # rows; dequantizing on a CPU takes five times as long as quantizing
_SIGNED = {"BF16": (np.int16, 0x7F80), "F16": (np.int16, 0x7C00), "F32": (np.int32, 0x7F800000)}
_DAMAGED = "tensor {} holds NaN or infinity; fetch the weights again."
_local = threading.local()


@dataclass(frozen=True)
class Block:
    """Rows `start` to `stop` of a target."""

    target: Target
    start: int
    stop: int


@dataclass
class Loss:
    """What storing cost, over the weights that were compared.

    Attributes:
        squared: sum of squared differences.
        norm: sum of squared weights.
        worst: largest difference as a share of what the format allows.
        compared: weights compared.
    """

    squared: float = 0.0
    norm: float = 0.0
    worst: float = 0.0
    compared: int = 0

    def add(self, other: Loss) -> None:
        self.squared += other.squared
        self.norm += other.norm
        self.worst = max(self.worst, other.worst)
        self.compared += other.compared

    @property
    def relative(self) -> float:
        """Root of the mean squared difference, relative to that of the weights."""
        return (self.squared / self.norm) ** 0.5 if self.norm else 0.0


@dataclass(frozen=True)
class Packed:
    """The bytes of a block by part ("weight", "scales", "biases"), and what storing them lost."""

    block: Block
    parts: Mapping[str, np.ndarray]
    loss: Loss = field(default_factory=Loss)


def blocks(target: Target) -> Iterator[Block]:
    """The blocks of a target; the last one may be smaller than the others."""
    row_bytes = max(1, target.source_bytes // max(target.rows, 1))
    step = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, target.rows, step):
        yield Block(target, start, min(start + step, target.rows))


def pack(block: Block, raw: Mapping[str, np.ndarray]) -> Packed:
    """Turn the bytes of a block into what is stored. Any thread may call it; each has its own
    stream.

    Raises:
        CheckpointError: a weight is not finite, in the source or after conversion, or does not
            come back from its format as it should.
    """
    target = block.target
    with mx.stream(_stream()):
        if target.source_format is None:
            source = target.parts["weight"][0].tensor
            check_finite(raw["weight"], source.dtype, target.name)
            if not target.format.quantized and source.dtype == target.dtype:
                return Packed(block, {"weight": raw["weight"]})
            weight = to_mx(raw["weight"], source.dtype, target.columns)
        elif target.format == target.source_format:
            return Packed(block, _kept(block, raw))
        else:
            weight = _dequantize(block, raw)
        weight = _in_dtype(weight, target.dtype, target.name)
        if not target.format.quantized:
            return Packed(block, {"weight": to_bytes(weight)})
        arrays = mx.quantize(weight, **target.format.parameters)
        mx.eval(arrays)
        every = _CPU_CHECK_EVERY if cpu.is_device() else 1
        loss = compare(weight, arrays, target.format, target.name, every)
        parts = zip(("weight", "scales", "biases"), arrays, strict=False)
        return Packed(block, {part: to_bytes(array) for part, array in parts}, loss)


def compare(
    weight: mx.array, arrays: tuple[mx.array, ...], fmt: Format, name: str, every: int = 1
) -> Loss:
    """Dequantize every `every`-th row and compare it with `weight` (rows x columns).

    Raises:
        CheckpointError: a difference is larger than the format allows.
    """
    some = slice(None, None, every)
    scales = arrays[1][some]
    biases = arrays[2][some] if len(arrays) > 2 else None
    back = mx.dequantize(
        arrays[0][some], scales, biases, **fmt.parameters, dtype=weight.dtype
    ).astype(mx.float32)
    before = weight[some].astype(mx.float32)
    error = mx.abs(back - before)
    shape = (*before.shape[:-1], -1, fmt.group_size)
    allowed = _allowed(fmt, scales, mx.abs(before).reshape(shape).max(-1), weight.dtype)
    worst = (error.reshape(shape).max(-1) / allowed).max()
    sums: Any = mx.stack([mx.square(error).sum(), mx.square(before).sum(), worst]).tolist()
    squared, norm, worst_of_all = sums
    loss = Loss(squared, norm, worst_of_all, before.size)
    if not loss.worst <= 1.0:
        raise CheckpointError(
            f"{name} does not come back from {fmt.name} as it should (off by {loss.worst:.3g} "
            "times what the format allows); report this with the versions of mlx and macOS."
        )
    return loss


def _allowed(fmt: Format, scales: mx.array, largest: mx.array, dtype: mx.Dtype) -> mx.array:
    """The largest difference that a group can have, from its scale and its largest weight."""
    rounding = 2.0**-7 if dtype == mx.bfloat16 else 2.0**-9
    floor = 2.0**-16 if dtype == mx.float16 else 1e-30  # scales of fp16 run out of exponents
    if fmt.mode == "affine":
        # Half a step for the nearest level, up to one more where the grid was shifted to hit the
        # larger end exactly, and the rounding of scale, bias and result.
        return mx.abs(scales.astype(mx.float32)) * 1.5 + largest * 2 * rounding + floor
    # Half the widest gap between levels, as a share of the largest weight; and nvfp4's scales are
    # 8-bit floats that end at 2^-9, so weights below six halves of that may vanish.
    gap = {"mxfp4": 0.21, "nvfp4": 0.2, "mxfp8": 0.06}[fmt.mode]
    return largest * (gap + rounding) + (6 * 2.0**-10 if fmt.mode == "nvfp4" else 0.0) + floor


def _dequantize(block: Block, raw: Mapping[str, np.ndarray]) -> mx.array:
    target, fmt = block.target, block.target.source_format
    assert fmt is not None  # the caller looked
    arrays = {}
    for part, data in raw.items():
        tensor = target.parts[part][0].tensor
        if tensor.dtype in _SIGNED:
            check_finite(data, tensor.dtype, tensor.name)
        arrays[part] = to_mx(data, tensor.dtype, tensor.columns)
        if part != "weight" and fmt.mode == "affine":  # mlx computes in the type of the scales
            arrays[part] = _in_dtype(arrays[part], target.dtype, tensor.name)
    weight = mx.dequantize(
        arrays["weight"], arrays["scales"], arrays.get("biases"), **fmt.parameters,
        dtype=MX_DTYPES[target.dtype],
    )  # fmt: skip
    _check_fits(weight, target.dtype, target.name)
    return weight


def _kept(block: Block, raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parts of a block whose format stays: only the type of scales and biases may change."""
    target, kept = block.target, {}
    for part, data in raw.items():
        tensor = target.parts[part][0].tensor
        if tensor.dtype in _SIGNED:
            check_finite(data, tensor.dtype, tensor.name)
            if tensor.dtype != target.dtype:
                values = to_mx(data, tensor.dtype, tensor.columns)
                data = to_bytes(_in_dtype(values, target.dtype, tensor.name))
        kept[part] = data
    return kept


def _in_dtype(values: mx.array, dtype: str, name: str) -> mx.array:
    """Finite values as `dtype`.

    Raises:
        CheckpointError: a value does not fit the type.
    """
    if values.dtype == MX_DTYPES[dtype]:
        return values
    values = values.astype(MX_DTYPES[dtype])
    _check_fits(values, dtype, name)
    return values


def _check_fits(values: mx.array, dtype: str, name: str) -> None:
    """Raise CheckpointError if values made from finite ones are not finite in `dtype`."""
    if mx.isfinite(values).all().item():
        return
    if mx.isnan(values).any().item():
        raise CheckpointError(_DAMAGED.format(name))
    kind, mend = {"F16": ("float16 (at most 65,504)", "bf16"), "BF16": ("bfloat16", "fp32")}.get(
        dtype, ("float32", "another type")
    )
    raise CheckpointError(
        f"tensor {name} holds a value that does not fit {kind}; convert to {mend}."
    )


def to_mx(data: np.ndarray, dtype: str, columns: int) -> mx.array:
    """Bytes of the type `dtype` as a matrix, rows x `columns`."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[ITEM_BYTES[dtype]]
    array = mx.array(data.view(unsigned).reshape(-1, columns))
    return array if MX_DTYPES[dtype] == array.dtype else array.view(MX_DTYPES[dtype])


def to_bytes(array: mx.array) -> np.ndarray:
    """The bytes of an array, row by row."""
    return np.array(array.view(mx.uint8) if array.dtype != mx.uint8 else array).reshape(-1)


def check_finite(data: np.ndarray, dtype: str, name: str) -> None:
    """Raise CheckpointError if bytes of a float type hold NaN or infinity.

    Compares them as integers: what is not finite lies above every finite number of its sign.
    """
    if dtype not in _SIGNED or not data.size:
        return
    signed, limit = _SIGNED[dtype]
    view = data.view(signed)
    top = 1 << (8 * view.itemsize - 1)
    if view.max() >= limit or view.view(f"u{view.itemsize}").max() >= top + limit:
        raise CheckpointError(_DAMAGED.format(name))


def _stream() -> mx.Stream:
    if not hasattr(_local, "stream"):
        _local.stream = mx.new_stream(mx.default_device())
    return _local.stream

"""What the pass over the vocabulary for a GPU asks of the device, at the sizes of the release."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.kernels.dispatch import MetalKernel
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.vocabulary import CHUNK, Row, vocabulary_pass

VOCAB, WIDTH, CANVAS = 262_144, 2816, 256
MOST_NODES = 600


def faked(kernel: MetalKernel, *, inputs: Sequence[mx.array], **launch: Any) -> list[mx.array]:
    """A launcher whose kernels are one node of the graph, as those of Metal are, and depend on all
    of their inputs. Nothing is ever computed."""

    def forward(*arrays: mx.array) -> list[mx.array]:
        outputs = zip(launch["output_shapes"], launch["output_dtypes"], strict=True)
        return [PLACEHOLDERS[tuple(shape), dtype] for shape, dtype in outputs]

    function: Any = mx.custom_function(forward)
    function.vjp(lambda primals, cotangents, outputs: primals)
    return list(function(*inputs))


class Placeholders(dict):
    """Arrays without a node, by shape and type."""

    def __missing__(self, key: tuple[tuple[int, ...], mx.Dtype]) -> mx.array:
        shape, dtype = key
        name = {mx.bfloat16: np.float16, mx.float32: np.float32, mx.int32: np.int32}[dtype]
        self[key] = mx.array(np.zeros(shape, name), dtype)
        return self[key]


PLACEHOLDERS = Placeholders()


def table_of(bits: int | None) -> EmbeddingTable:
    """Packed weights of nothing but zeros; no array of this size is ever computed."""
    if bits is None:
        return EmbeddingTable(mx.zeros((VOCAB, WIDTH), mx.bfloat16), mx.bfloat16)
    packed = mx.zeros((VOCAB, WIDTH * bits // 32), mx.uint32)
    scales = mx.zeros((VOCAB, WIDTH // 64), mx.bfloat16)
    return EmbeddingTable(packed, mx.bfloat16, scales, scales, 64, bits)


def some_allowed() -> dict[int, np.ndarray]:
    allowed = np.full((CANVAS, VOCAB // 32), 0xFFFFFFFF, np.uint32)
    allowed[::3, 1000:] = 0
    return dict(enumerate(allowed))


def bound() -> np.ndarray:
    return np.where(np.arange(CANVAS) % 5 == 0, 9, -1).astype(np.int32)


KEY = mx.array([1, 2], mx.uint32)
MODES = {
    "statistics": [Row(CANVAS, 0.6, need_soft=False)],
    "draw": [Row(CANVAS, 0.6, KEY, need_soft=False)],
    "all tokens": [Row(CANVAS, 0.6, KEY)],
    "likely tokens": [Row(CANVAS, 0.6, KEY, soft_cutoff=10.0, likely=True)],
    "masks": [Row(CANVAS, 0.6, KEY, fixed=bound(), allowed=some_allowed())],
    "mixed": [
        Row(CANVAS, 0.6, KEY, soft_cutoff=10.0, likely=np.arange(CANVAS) % 3 > 0),
        Row(CANVAS, 0.8, KEY, fixed=bound(), allowed=some_allowed(), soft_cutoff=10.0),
        Row(100, 0.4, need_soft=False),
        Row(40, 0.4, KEY),
    ],
}


def nodes(*arrays: mx.array) -> int:
    """Primitives of the graph behind arrays: 0 once they are computed."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    labels = re.findall(r'label ="(\w+)", shape=rectangle', text.getvalue())
    return sum(label != "StopGradient" for label in labels)  # which are of the fake


@pytest.mark.parametrize("read", [np.array, mx.eval, mx.async_eval, float])
def test_a_read_shows_in_the_graph(read: Callable[[mx.array], Any]) -> None:
    x = mx.zeros((1,))
    y = x[0] + 1
    assert nodes(x) > 0
    read(y)
    assert nodes(x) == 0


@pytest.mark.parametrize("bits", [4, 8, None])
@pytest.mark.parametrize("mode", MODES)
def test_a_pass_is_a_small_graph_that_the_host_does_not_wait_for(
    mode: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued: list[int] = []
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: queued.append(len(arrays)))
    rows = MODES[mode]
    count = sum(row.length for row in rows)
    hidden = mx.zeros((count, WIDTH), mx.bfloat16)
    standing = mx.zeros((count,), mx.int32)
    table = table_of(bits)
    result = vocabulary_pass(
        hidden, table, rows, softcap=30.0, standing=standing, implementation=faked
    )
    counted = nodes(*(value for value in vars(result).values() if value is not None))
    print(f"{mode}, {bits} bits: {counted} nodes")
    assert counted <= MOST_NODES
    assert len(queued) == -(-VOCAB // CHUNK)  # each chunk is handed over by itself
    # Had the host read anything that depends on one of them, it would have been computed.
    assert all(nodes(array) > 0 for array in (hidden, standing, table.weight))
    assert result.entropy.shape == (count,)
    if any(row.need_soft for row in rows):
        assert result.soft_embeddings is not None
        assert result.soft_embeddings.shape == (count, WIDTH)
        assert result.soft_embeddings.dtype == mx.bfloat16

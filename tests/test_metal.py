"""What only a Metal GPU can show beside single kernels: `pytest -m metal`.

The demo model solves sudokus in bfloat16, under every profile, with its own pass over the
vocabulary and with that of a large one. `kernels/test_metal_kernels.py` compares the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

from mlx_diffgemma.kernels.dispatch import launch_on_metal
from mlx_diffgemma.survey.pieces import Piece, Pieces
from mlx_diffgemma.survey.subject import FULL, Subject

SUBJECT = Subject(FULL, launch_on_metal, "")
SUDOKUS = [piece for piece in Pieces(SUBJECT) if piece.part == "demo"]


@pytest.fixture
def on_the_gpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.gpu)
    yield
    mx.set_default_device(before)


@pytest.mark.metal
@pytest.mark.parametrize("piece", SUDOKUS, ids=lambda piece: piece.what)
def test_the_demo_model_solves_sudokus_in_bfloat16(on_the_gpu: None, piece: Piece) -> None:
    assert SUBJECT.demo.model.dtype == mx.bfloat16
    (row,) = piece.run()
    assert row.ok, row

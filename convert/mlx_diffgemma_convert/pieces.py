"""Which source tensors fill a parameter of the output, and which of its rows.

A parameter is a matrix or a stack of them, seen as rows x columns. Whole tensors, stacks of gates
and ups, and one tensor per expert all become pieces that tile those rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlx_diffgemma.checkpoint.names import canonical_name, expert_piece
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma_convert.source import SourceTensor


@dataclass(frozen=True)
class Piece:
    """`rows` rows of a tensor, from `source_row` on, that go to `target_row`."""

    tensor: SourceTensor
    source_row: int
    target_row: int
    rows: int


def gather(tensors: Iterable[SourceTensor]) -> dict[str, list[SourceTensor]]:
    """Source tensors by the parameter that they fill, whole or in part."""
    gathered: dict[str, list[SourceTensor]] = {}
    for tensor in tensors:
        name = canonical_name(tensor.name)
        if name is not None:
            gathered.setdefault(name, []).append(tensor)
    return gathered


def pieces_of(name: str, shape: tuple[int, ...], found: list[SourceTensor]) -> tuple[Piece, ...]:
    """How the tensors found for a parameter tile its rows.

    Raises:
        CheckpointError: one is missing, doubled or of the wrong shape.
    """
    if len(found) == 1 and expert_piece(found[0].name) is None:
        _check_shape(found[0], shape)
        return (Piece(found[0], 0, 0, found[0].rows),)
    experts, rows, _ = shape
    half = rows // 2
    pieces: list[Piece] = []
    for tensor in found:
        piece = expert_piece(tensor.name)
        if piece is None:
            raise CheckpointError(
                f"{name} is stored twice, as {tensor.name} and in pieces; delete one of them."
            )
        first, size = {"gate": (0, half), "up": (half, half), "all": (0, rows)}[piece.part]
        if piece.expert is not None:
            _check_shape(tensor, (size, shape[-1]))
            pieces.append(Piece(tensor, 0, piece.expert * rows + first, size))
        else:
            _check_shape(tensor, (experts, size, shape[-1]))
            pieces += [Piece(tensor, e * size, e * rows + first, size) for e in range(experts)]
    pieces.sort(key=lambda p: p.target_row)
    position = 0
    for part in pieces:
        if part.target_row != position:
            which = f"expert {position // rows}" + (" (gate or up)" if position % rows else "")
            problem = "is missing" if part.target_row > position else "is stored twice"
            raise CheckpointError(f"{name}: {which} {problem}; fetch the weights again.")
        position += part.rows
    if position != experts * rows:
        raise CheckpointError(
            f"{name}: expert {position // rows} is missing; fetch the weights again."
        )
    return tuple(pieces)


def _check_shape(tensor: SourceTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"tensor {tensor.name} in {tensor.shard} has shape {list(tensor.shape)}, config.json "
            f"asks for {list(shape)}; they are of different models."
        )

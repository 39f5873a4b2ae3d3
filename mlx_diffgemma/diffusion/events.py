"""What a run reports, in the order in which it happens. A `row` is the number of a sequence, from
0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlx_diffgemma.diffusion.canvas import Canvas
from mlx_diffgemma.errors import NumericalError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Looking:
    """How many pictures the vision tower has read, and the seconds that it took."""

    pictures: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class PrefillProgress:
    """`done` of `total` prompt tokens of a sequence are encoded, pictures among them."""

    row: int
    done: int
    total: int
    looking: Looking = Looking()


@dataclass(frozen=True)
class DenoisingStep:
    """One forward pass over the canvas of a sequence, which is as the pass left it."""

    row: int
    canvas: Canvas


@dataclass(frozen=True)
class CanvasCommitted:
    """The canvas of a sequence became text.

    Attributes:
        canvas_index: which canvas of the sequence, from 0.
        tokens: what the sequence gained, cut at the first eos and at max_tokens; the eos itself is
            left out.
        passes: forward passes that it took, the encoder's checks left out.
        converged: whether the canvas was done before its steps were used up.
        finish_reason: why the sequence ended here; None if it goes on.
        stop_token: the eos that ended it, or None.
    """

    row: int
    canvas_index: int
    tokens: tuple[int, ...]
    passes: int
    converged: bool
    finish_reason: FinishReason | None = None
    stop_token: int | None = None


@dataclass(frozen=True)
class SequenceFailed:
    """A sequence ended because the model returned values that are not finite for its canvas, which
    is not committed."""

    row: int
    error: NumericalError


@dataclass(frozen=True)
class Finished:
    """Every sequence has ended.

    Attributes:
        tokens: the tokens of each sequence, the eos left out.
        finish_reasons: why each sequence ended.
        stop_tokens: the eos that ended each sequence, or None.
        steps: the forward passes over each canvas that became text, for each sequence.
        encodings: how many times a canvas of each sequence went through the encoder, to go on
            behind it or to check it.
    """

    tokens: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[FinishReason | Literal["error"], ...]
    stop_tokens: tuple[int | None, ...]
    steps: tuple[tuple[int, ...], ...]
    encodings: tuple[int, ...] = ()


Event = PrefillProgress | DenoisingStep | CanvasCommitted | SequenceFailed | Finished

"""What the denoising loop reports while it runs, in the order in which it happens.

R rows are the sequences of the batch that are still being written, C the canvas length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class PrefillProgress:
    """`done` of `total` prompt positions are in the cache (the padding of a batch included)."""

    done: int
    total: int


@dataclass(frozen=True)
class DenoisingStep:
    """One forward pass over the canvas of every row.

    Attributes:
        canvas_index: which canvas of the answer this is, from 0.
        step: how many passes over this canvas have been run, from 1.
        rows: [R] the place of each row in the batch that was asked for.
        draft: [R, C] the model's best guess, what would be committed now.
        canvas: [R, C] what the next step starts from: accepted draws and fresh noise.
        entropy: [R, C] nats, after the temperature.
        accepted: [R, C] which positions of `canvas` hold a draw of the model.
        done: [R] whether the canvas of this row needs no further step.
    """

    canvas_index: int
    step: int
    max_steps: int
    temperature: float
    rows: tuple[int, ...]
    draft: np.ndarray
    canvas: np.ndarray
    entropy: np.ndarray
    accepted: np.ndarray
    done: np.ndarray


@dataclass(frozen=True)
class CanvasCommitted:
    """A canvas became text. `tokens[r]` is what row `rows[r]` gained (cut at eos and max_tokens,
    eos itself left out), `steps[r]` the forward passes it took, `finish_reasons[r]` why the row
    ended here, or None if it goes on."""

    canvas_index: int
    rows: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    steps: tuple[int, ...]
    finish_reasons: tuple[FinishReason | None, ...]


@dataclass(frozen=True)
class Finished:
    """Every sequence of the batch has ended: its tokens (eos left out), why, and the denoising
    steps of each of its canvases."""

    tokens: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[FinishReason, ...]
    steps: tuple[tuple[int, ...], ...]


Event = PrefillProgress | DenoisingStep | CanvasCommitted | Finished

"""One pass over one sequence, without any of the loop: what tests compare with."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_diffgemma.model.cache import Prefix
from mlx_diffgemma.model.diffusion_gemma import CanvasView, DiffusionGemma


def encoded(model: DiffusionGemma, prompt: Sequence[int]) -> tuple[mx.array, Prefix]:
    """The hidden states [L, D] of a prompt, and its prefix."""
    hidden, (prefix,) = model.encode([prompt], [model.empty_prefix()])
    return hidden, prefix


def decoded(
    model: DiffusionGemma,
    canvas: Sequence[int] | np.ndarray | mx.array,
    prefix: Prefix,
    soft: mx.array | None = None,
) -> mx.array:
    """The hidden states [C, D] of a canvas behind a prefix; `soft` [C, D]."""
    tokens = canvas if isinstance(canvas, mx.array) else mx.array(np.array(canvas, np.int32))
    return model.decode([CanvasView(tokens, prefix, soft)])

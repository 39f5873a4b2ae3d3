"""Encoding the prompt into the prefix cache, a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from mlx_diffgemma.diffusion.events import PrefillProgress
from mlx_diffgemma.model.cache import PrefixCache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

DEFAULT_STEP_SIZE = 512


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[mx.array, list[int]]:
    """Prompts of different lengths as one array [B, L] that ends where they all end, and the left
    padding of each."""
    longest = max(len(prompt) for prompt in prompts)
    pads = [longest - len(prompt) for prompt in prompts]
    rows = [[pad] * count + list(prompt) for count, prompt in zip(pads, prompts, strict=True)]
    return mx.array(rows, mx.int32), pads


def prefill(
    model: DiffusionGemma,
    ids: mx.array,
    cache: PrefixCache,
    *,
    step_size: int = DEFAULT_STEP_SIZE,
) -> Iterator[PrefillProgress]:
    """Append `ids` [B, L] to the prefix, `step_size` positions at a time, so that memory does not
    grow with the square of the prompt. Yields before the first chunk and after each."""
    total = ids.shape[1]
    cache.reserve(total + model.config.canvas_length)
    yield PrefillProgress(0, total)
    for start in range(0, total, step_size):
        model.encode(ids[:, start : start + step_size], cache)
        mx.eval(cache.arrays())
        mx.clear_cache()
        yield PrefillProgress(min(start + step_size, total), total)

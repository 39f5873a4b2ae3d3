"""Fixed inputs to compare models on: (prompt, corrupted canvas, noise level) triples.

Letters: P prompts, C canvas, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.encode import encode
from mlx_diffgemma.diffusion.events import Finished
from mlx_diffgemma.diffusion.generate import generate_canvases
from mlx_diffgemma.diffusion.noise import seeded
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.model.cache import Prefix
from mlx_diffgemma.model.diffusion_gemma import CanvasView, DiffusionGemma
from mlx_diffgemma.reading import os_reason
from mlx_diffgemma.text.prompt import encode_prompt

PROMPTS = (
    "Why is the sky blue? Answer in three sentences.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Name the planets of the solar system, one on each line.",
    "Translate into German: The train to the coast leaves at a quarter past nine.",
    "A shop sells pens at 3 for 2 euros. What do 12 pens cost? Explain step by step.",
    "Write a short poem about rain on a tin roof.",
    "List five causes of the French Revolution, most important first.",
    "Give the JSON of a user with a name, an e-mail address and three hobbies.",
)
LEVELS = (0.9, 0.6, 0.3)
_LOGITS = 1 << 25  # most logits of one batch, P x C x V


@dataclass(frozen=True)
class Task:
    """A prompt, and its answer where that is known."""

    prompt: str
    answer: str | None = None


def read_tasks(path: Path | None, count: int) -> list[Task]:
    """The first `count` prompts of a file of JSON lines (`prompt`, and `answer` if there is one),
    or of a built-in list.

    Raises:
        UsageError: the file is missing or holds something else.
    """
    if path is None:
        return [Task(prompt) for prompt in PROMPTS[:count]]
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        tasks = [Task(row["prompt"], row.get("answer")) for row in rows[:count]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{path} is no file of prompts ({os_reason(error)}); write one JSON object with a "
            "'prompt' on each line."
        ) from None
    if not tasks:
        raise UsageError(f"{path} holds no prompts.")
    return tasks


@dataclass(frozen=True)
class Probe:
    """Prompts that are run together, and their canvases [P, C] at each noise level."""

    prompts: tuple[tuple[int, ...], ...]
    canvases: tuple[np.ndarray, ...]


def make_probes(
    model: DiffusionGemma, tokenizer: Any, tasks: Sequence[Task], config: DiffusionConfig, seed: int
) -> list[Probe]:
    """Corrupt the first canvas of each answer (the model's own where none is known): a token is
    replaced by a random one with the probability of the noise level."""
    length, vocab = model.config.canvas_length, model.config.text.vocab_size
    eos = (config.eos_token_ids or (config.pad_token_id,))[0]
    per_batch = max(1, _LOGITS // (length * vocab))
    probes = []
    for start in range(0, len(tasks), per_batch):
        batch = tasks[start : start + per_batch]
        prompts = [encode_prompt(tokenizer, task.prompt) for task in batch]
        known = [
            None if t.answer is None else tokenizer.encode(t.answer, add_special_tokens=False)
            for t in batch
        ]
        if None in known:
            finished = _generate(model, prompts, config, seed)
            known = [
                list(own) if answer is None else answer
                for answer, own in zip(known, finished.tokens, strict=True)
            ]
        clean = np.array([(list(ids or []) + [eos] * length)[:length] for ids in known])
        canvases = []
        for level in LEVELS:
            dice = np.random.default_rng([seed, start, int(100 * level)])
            noise = dice.integers(0, vocab, clean.shape)
            canvases.append(np.where(dice.random(clean.shape) < level, noise, clean))
        probes.append(Probe(tuple(map(tuple, prompts)), tuple(canvases)))
    return probes


def log_probabilities(
    model: DiffusionGemma, probe: Probe, config: DiffusionConfig
) -> Iterator[mx.array]:
    """Log probabilities [P, C, V] of a model for the canvases of a probe, at the temperature of the
    noise level: for each level without self-conditioning, then with the model's own soft
    embeddings of the pass before."""
    prefixes = [_prefix(model, prompt) for prompt in probe.prompts]
    for level, canvas in zip(LEVELS, probe.canvases, strict=True):
        temperature = config.t_min + (config.t_max - config.t_min) * level
        soft: Sequence[mx.array | None] = [None] * len(prefixes)
        for _ in ("without", "with"):
            hidden = model.decode(
                [
                    CanvasView(mx.array(tokens, mx.int32), prefix, expected)
                    for tokens, prefix, expected in zip(canvas, prefixes, soft, strict=True)
                ]
            )
            processed = (model.logits(hidden) / temperature).reshape(*canvas.shape, -1)
            yield processed - mx.logsumexp(processed, axis=-1, keepdims=True)
            soft = list(model.soft_embeddings(processed))


def _prefix(model: DiffusionGemma, prompt: Sequence[int]) -> Prefix:
    cache = model.make_cache()
    for _ in encode(model, cache, prompt):
        pass
    return cache.prefix


@dataclass(frozen=True)
class Generated:
    """How generation went.

    Attributes:
        steps_per_canvas: mean number of denoising steps.
        exact: share of answers equal to the known ones; None where none is known.
    """

    steps_per_canvas: float
    exact: float | None


def generate_tasks(
    model: DiffusionGemma, tokenizer: Any, tasks: Sequence[Task], config: DiffusionConfig, seed: int
) -> Generated:
    """Generate an answer to every task, with the same draws for every model."""
    length, vocab = model.config.canvas_length, model.config.text.vocab_size
    per_batch = max(1, _LOGITS // (length * vocab))
    steps: list[int] = []
    right: list[bool] = []
    for start in range(0, len(tasks), per_batch):
        batch = tasks[start : start + per_batch]
        prompts = [encode_prompt(tokenizer, task.prompt) for task in batch]
        finished = _generate(model, prompts, config, seed + start)
        for task, tokens, counts in zip(batch, finished.tokens, finished.steps, strict=True):
            steps += counts
            if task.answer is not None:
                right.append(tokenizer.decode(list(tokens)) == task.answer)
    exact = sum(right) / len(right) if right else None
    return Generated(sum(steps) / len(steps), exact)


def _generate(
    model: DiffusionGemma, prompts: Sequence[Sequence[int]], config: DiffusionConfig, seed: int
) -> Finished:
    *_, finished = generate_canvases(model, prompts, config, seeded(seed))
    assert isinstance(finished, Finished)  # the last event, always
    return finished

"""How far converted models are from their source: divergence, flipped tokens, denoising steps."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.checkpoint.locate import locate
from mlx_diffgemma.checkpoint.names import expected_shapes, is_vision
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.fitting import diffusion_config
from mlx_diffgemma.generation import load
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma_convert.probes import (
    LEVELS,
    Probe,
    Task,
    generate_tasks,
    log_probabilities,
    make_probes,
)
from mlx_diffgemma_convert.source import FolderSource


@dataclass(frozen=True)
class Divergence:
    """A model against its source, mean over canvas positions.

    Attributes:
        kl: Kullback-Leibler divergence in nats at each noise level, without self-conditioning.
        kl_conditioned: this divergence in nats at each noise level, with self-conditioning.
        flips: share of positions whose likeliest token is not the source's.
    """

    kl: tuple[float, ...]
    kl_conditioned: tuple[float, ...]
    flips: float

    @property
    def mean(self) -> float:
        values = self.kl + self.kl_conditioned
        return sum(values) / len(values)


@dataclass(frozen=True)
class Measured:
    """What was measured of one model.

    Attributes:
        name: the model as the user named it.
        nbytes: bytes of its weights.
        bits_per_weight: mean over the weights of text, without those of the vision tower.
        divergence: from the source; None for the source itself.
        steps_per_canvas: mean number of denoising steps.
        exact: share of answers equal to the known ones; None where none is known.
    """

    name: str
    nbytes: int
    bits_per_weight: float
    divergence: Divergence | None
    steps_per_canvas: float
    exact: float | None

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        if self.divergence is not None:
            found["divergence"]["mean"] = self.divergence.mean
        return found


class Reference:
    """The source's log probabilities for every probe, kept on the disk: with a large vocabulary
    they do not fit into memory, and source and converted model need not be loaded at the same
    time."""

    def __init__(self, folder: Path, probes: Sequence[Probe], config: DiffusionConfig) -> None:
        self._folder, self.probes, self.config = folder, probes, config

    def record(self, model: DiffusionGemma) -> None:
        for number, probe in enumerate(self.probes):
            for view, log_p in enumerate(log_probabilities(model, probe, self.config)):
                np.save(self._file(number, view), np.array(log_p))

    def compare(self, model: DiffusionGemma) -> Divergence:
        """Divergence of `model` from the model that was recorded."""
        views = 2 * len(LEVELS)
        kl, flips, count = np.zeros(views), 0.0, 0
        for number, probe in enumerate(self.probes):
            positions = probe.canvases[0].size
            count += positions
            for view, log_q in enumerate(log_probabilities(model, probe, self.config)):
                log_p = mx.array(np.load(self._file(number, view)))
                divergence = (mx.exp(log_p) * (log_p - log_q)).sum(-1).mean()
                other = (log_p.argmax(-1) != log_q.argmax(-1)).mean()
                mx.eval(divergence, other)
                kl[view] += float(np.array(divergence)) * positions
                flips += float(np.array(other)) * positions / views
        kl /= count
        return Divergence(tuple(kl[0::2].tolist()), tuple(kl[1::2].tolist()), flips / count)

    def _file(self, probe: int, view: int) -> Path:
        return self._folder / f"{probe}-{view}.npy"


@contextmanager
def reference_of(
    model: DiffusionGemma, tokenizer: Any, tasks: Sequence[Task], seed: int
) -> Iterator[Reference]:
    """Probe the source; its log probabilities stay on the disk while the context is open."""
    config = diffusion_config(model)
    with tempfile.TemporaryDirectory() as folder:
        reference = Reference(
            Path(folder), make_probes(model, tokenizer, tasks, config, seed), config
        )
        reference.record(model)
        yield reference


def measure(
    source: str,
    others: Sequence[str],
    tasks: Sequence[Task],
    to_generate: Sequence[Task],
    seed: int,
) -> Iterator[Measured]:
    """Measure the source, then each of the others, one model in memory at a time.

    Raises:
        UsageError: a model has another vocabulary or canvas than the source.
    """
    model, tokenizer = load(source)
    shape = model.config.text.vocab_size, model.config.canvas_length
    config = diffusion_config(model)
    with reference_of(model, tokenizer, tasks, seed) as reference:
        yield _line(source, model, None, tokenizer, to_generate, config, seed)
        del model
        for name in others:
            mx.clear_cache()
            other, _ = load_model(name)
            if (other.config.text.vocab_size, other.config.canvas_length) != shape:
                raise UsageError(
                    f"{name} has another vocabulary or canvas than {source}; name its own source."
                )
            divergence = reference.compare(other)
            yield _line(name, other, divergence, tokenizer, to_generate, config, seed)
            del other


def _line(
    name: str,
    model: DiffusionGemma,
    divergence: Divergence | None,
    tokenizer: Any,
    tasks: Sequence[Task],
    config: DiffusionConfig,
    seed: int,
) -> Measured:
    stored = FolderSource(locate(name)).tensors.values()
    text = sum(tensor.nbytes for tensor in stored if not is_vision(tensor.name))
    weights = sum(prod(shape) for shape in expected_shapes(model.config).values())
    generated = generate_tasks(model, tokenizer, tasks, config, seed)
    return Measured(
        name=name,
        nbytes=sum(tensor.nbytes for tensor in stored),
        bits_per_weight=8 * text / weights,
        divergence=divergence,
        steps_per_canvas=generated.steps_per_canvas,
        exact=generated.exact,
    )

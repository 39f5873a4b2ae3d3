"""From examples to batches, as a pure function of the examples, the settings and the number of the
batch, so that a run that was stopped goes on with the batches that it would have had.

Letters: B examples, S sequence positions, C canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.train.config import TrainConfig
from mlx_diffgemma.train.examples import Batch, Example, Stream, Supply
from mlx_diffgemma.train.noising import corrupt

# Purposes of random draws: a generator is seeded with the run's seed, a purpose and a number.
_ORDER, _CANVAS, _NOISE = range(3)

_LEAST_GRAIN = 16  # positions; a sequence is padded to a multiple of this or of more


@dataclass(frozen=True)
class Drawn:
    """An example, and the number from 0 of the canvas of its response that is to be predicted."""

    example: Example
    canvas: int

    def prefix(self, canvas_length: int) -> int:
        """Number of positions before the canvas."""
        return self.example.prompt + self.canvas * canvas_length


@dataclass(frozen=True)
class Sizes:
    """What batches need to know of a model.

    Attributes:
        canvas: tokens of a canvas.
        vocabulary: number of token ids.
        eos: ids that end a response. The last canvas of a response is filled up with the eos that
            ends the response, or with the first of these ids where none ends it.
        context: most positions of the model.
    """

    canvas: int
    vocabulary: int
    eos: tuple[int, ...]
    context: int


class Batches:
    """`batches[n]` is the batch number n of an endless order.

    Examples come shuffled (a stream comes as it is). They are taken in windows of
    `config.sorted_batches` batches and sorted by length within each, so that batches hold
    sequences of like length. The batches of a window are then shuffled in groups of `together`
    neighbours, since that many processes compute a group at the same time and wait for each other.

    Raises:
        UsageError: there are no examples; or, of `batches[n]`, an example cannot be trained on.
    """

    def __init__(
        self, supply: Supply, config: TrainConfig, sizes: Sizes, *, together: int = 1
    ) -> None:
        self._stream = supply if callable(supply) else _shuffled(supply, config.seed)
        self._config, self._sizes, self._together = config, sizes, together
        self._window = lru_cache(maxsize=1)(self._make_window)

    def __getitem__(self, number: int) -> Batch:
        window, place = divmod(number, self._config.sorted_batches)
        drawn = self._window(window)[place]
        return make_batch(drawn, self._config, self._sizes, self._rng(_NOISE, number))

    def _make_window(self, window: int) -> list[list[Drawn]]:
        config, size = self._config, self._config.batch_size
        count = config.sorted_batches * size
        rng = self._rng(_CANVAS, window)
        drawn = [
            draw_canvas(check(example, config, self._sizes), rng, self._sizes.canvas)
            for example in self._stream(window * count, count)
        ]
        drawn.sort(key=lambda one: _needed(one, config, self._sizes.canvas))
        batches = [drawn[at : at + size] for at in range(0, count, size)]
        groups = [
            batches[at : at + self._together] for at in range(0, len(batches), self._together)
        ]
        return [batch for place in rng.permutation(len(groups)) for batch in groups[place]]

    def _rng(self, purpose: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self._config.seed, purpose, number])


def draw_canvas(example: Example, rng: np.random.Generator, canvas_length: int) -> Drawn:
    """Choose a canvas of the response at random."""
    return Drawn(example, int(rng.integers(-(-len(example.response) // canvas_length))))


def check(example: Example, config: TrainConfig, sizes: Sizes) -> Example:
    """The example, if it can be trained on.

    Raises:
        UsageError: it is too long, or has ids outside the vocabulary.
    """
    length = len(example.tokens)
    limit = min(config.max_seq_length, sizes.context - sizes.canvas)
    if length > limit:
        raise UsageError(
            f"an example has {length} tokens, more than the {limit} allowed; shorten it or raise "
            "max_seq_length."
        )
    if not (min(example.tokens) >= 0 and max(example.tokens) < sizes.vocabulary):
        raise UsageError(
            f"an example holds token ids outside 0 to {sizes.vocabulary - 1}; it was made with "
            "another tokenizer."
        )
    return example


def make_batch(
    drawn: Sequence[Drawn], config: TrainConfig, sizes: Sizes, rng: np.random.Generator
) -> Batch:
    """Lay out and corrupt a batch, its rows shuffled, since self-conditioning is for the first.

    Raises:
        UsageError: the pictures of the batch differ in size.
    """
    drawn = [drawn[row] for row in rng.permutation(len(drawn))]
    clean = clean_canvases(drawn, sizes)
    corrupted, noise = corrupt(
        clean,
        sizes.vocabulary,
        rng,
        min_noise=config.min_noise,
        span_fraction=config.span_fraction,
    )
    # The expected number of rows, rounded up or down at random.
    conditioned = int(config.self_conditioning * len(drawn) + rng.random())
    return lay_out(drawn, config, sizes, corrupted, noise, min(conditioned, len(drawn)))


def clean_canvases(drawn: Sequence[Drawn], sizes: Sizes) -> np.ndarray:
    """The clean token ids [B, C] of the canvases, filled up with eos."""
    clean = np.empty((len(drawn), sizes.canvas), int)
    for row, one in enumerate(drawn):
        last = one.example.tokens[-1]
        clean[row] = last if last in sizes.eos else sizes.eos[0]
        start = one.prefix(sizes.canvas)
        tokens = one.example.tokens[start : start + sizes.canvas]
        clean[row, : len(tokens)] = tokens
    return clean


def lay_out(
    drawn: Sequence[Drawn],
    config: TrainConfig,
    sizes: Sizes,
    corrupted: np.ndarray,
    noise: np.ndarray,
    conditioned: int,
) -> Batch:
    """A batch of canvases that were `corrupted` [B, C] at `noise` [B].

    Args:
        conditioned: of how many examples, from the first, the decoder sees its own guess.

    Raises:
        UsageError: the pictures of the batch differ in size.
    """
    length = _padded(max(_needed(one, config, sizes.canvas) for one in drawn))
    with_loss = config.encoder_loss_weight > 0
    sequence = np.zeros((len(drawn), length), int)
    counted = np.zeros((len(drawn), length - 1 if with_loss else 0), bool)
    for row, one in enumerate(drawn):
        tokens = one.example.tokens[:length]
        sequence[row, : len(tokens)] = tokens
        first = one.example.prompt if config.mask_prompt else 1
        if with_loss:
            counted[row, first - 1 : len(tokens) - 1] = True
    return Batch(
        sequence=mx.array(sequence, mx.int32),
        prefix=mx.array([one.prefix(sizes.canvas) for one in drawn], mx.int32),
        canvas=mx.array(clean_canvases(drawn, sizes), mx.int32),
        corrupted=mx.array(corrupted, mx.int32),
        noise=mx.array(noise, mx.float32),
        counted=mx.array(counted),
        conditioned=conditioned,
        tokens=sum(_needed(one, config, sizes.canvas) for one in drawn) + corrupted.size,
        **_pictures(drawn, length),
    )


def _pictures(drawn: Sequence[Drawn], length: int) -> dict[str, Any]:
    """The fields of a `Batch` about pictures, for sequences of `length`; none without pictures.

    Raises:
        UsageError: the pictures differ in size.
    """
    spans = [(row, span) for row, one in enumerate(drawn) for span in one.example.pictures]
    if not spans:
        return {}
    read = [span.patches for _, span in spans if span.patches is not None]
    assert len(read) == len(spans), "an example's pictures have their patches"
    sizes = {
        (span.columns, len(span), patches.shape)
        for (_, span), patches in zip(spans, read, strict=True)
    }
    if len(sizes) > 1:
        raise UsageError(
            "the pictures of a batch differ in size; bring all to one, or lower batch_size to 1."
        )
    ((columns, count, _),) = sizes
    places = np.full((len(drawn), length), -1, np.int32)
    for number, (row, span) in enumerate(spans):
        places[row, span.start : span.stop] = number * count + np.arange(count)
    return {
        "patches": mx.array(np.stack(read)).astype(mx.float32) / 255,
        "soft_places": mx.array(places),
        "columns": columns,
    }


def _needed(one: Drawn, config: TrainConfig, canvas_length: int) -> int:
    """Number of positions that the encoder has to read."""
    if config.encoder_loss_weight > 0:
        return len(one.example.tokens)
    return one.prefix(canvas_length)


def _padded(length: int) -> int:
    """`length` rounded up so that few lengths occur: 8 from one power of two to the next."""
    grain = max(_LEAST_GRAIN, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // grain) * grain


def _shuffled(examples: Sequence[Example], seed: int) -> Stream:
    """An endless stream of the examples, in another order each time they come round.

    Raises:
        UsageError: there are none.
    """
    if not examples:
        raise UsageError("there is nothing to train on: the data is empty.")
    order = lru_cache(maxsize=2)(
        lambda epoch: np.random.default_rng([seed, _ORDER, epoch]).permutation(len(examples))
    )

    def stream(first: int, count: int) -> list[Example]:
        places = (divmod(number, len(examples)) for number in range(first, first + count))
        return [examples[order(epoch)[place]] for epoch, place in places]

    return stream

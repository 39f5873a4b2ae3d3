"""What is trained on: prompts and responses as token ids, and batches of them on the device.

Letters: B examples, S sequence positions, C canvas, M pictures of P patches and N soft tokens each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.pictured import PictureSpan


@dataclass(frozen=True)
class Example:
    """A prompt and its response.

    Attributes:
        tokens: ids of the prompt followed by those of the response, which ends with an eos.
        prompt: how many of the tokens are the prompt.
        pictures: those whose image tokens are in the prompt; all examples of a batch have pictures
            of one size.

    Raises:
        UsageError: the prompt or the response is empty.
    """

    tokens: tuple[int, ...]
    prompt: int
    pictures: tuple[PictureSpan, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.prompt < len(self.tokens):
            raise UsageError(
                "an example needs at least one token of prompt and one of response, and has "
                f"{self.prompt} and {len(self.tokens) - self.prompt}."
            )

    @property
    def response(self) -> tuple[int, ...]:
        return self.tokens[self.prompt :]


Stream = Callable[[int, int], Sequence[Example]]
"""`stream(first, count)` gives `count` examples of an endless supply, from number `first` on. What
it returns may depend on these numbers only, so that a run that was stopped sees the same."""

Supply = Sequence[Example] | Stream


@dataclass(frozen=True)
class Batch:
    """One random canvas of each of B responses, with all before it as its prefix.

    Attributes:
        sequence: [B, S] clean ids, padded on the right: what the encoder reads.
        prefix: [B] where in `sequence` the canvas starts.
        canvas: [B, C] clean ids, filled up with eos: what the decoder is to predict.
        corrupted: [B, C] what the decoder sees.
        noise: [B] t, the share of tokens that were to be replaced.
        counted: [B, S - 1] whether the encoder's loss counts its guess at the next token; empty
            where that loss has no weight, for then the sequence ends with the prefix.
        conditioned: of how many examples, from the first, the decoder sees its own guess.
        tokens: how many ids the sequences and canvases hold, padding left out.
        patches: [M, P, 3 · side²] numbers from 0 to 1, the pictures of all sequences in patches of
            side · side pixels.
        soft_places: [B, S] which of the M · N soft tokens stands at a position; −1 for none. Empty
            where there are no pictures.
        columns: patches in a row of each picture.
    """

    sequence: mx.array
    prefix: mx.array
    canvas: mx.array
    corrupted: mx.array
    noise: mx.array
    counted: mx.array
    conditioned: int
    tokens: int = 0
    patches: mx.array = field(default_factory=lambda: mx.zeros((0, 0, 0)))
    soft_places: mx.array = field(default_factory=lambda: mx.zeros((0, 0), mx.int32))
    columns: int = 0

    @property
    def size(self) -> int:
        return self.sequence.shape[0]

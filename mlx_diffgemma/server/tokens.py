"""The tokens of an answer as clients are told of them, with probabilities and entropies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mlx_diffgemma.diffusion.generate import cut
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.generation_response import GenerationResponse
from mlx_diffgemma.server.pieces import TokenInfo

_LEAST = 1e-30  # least probability that a logarithm is taken of


class Committed:
    """The tokens of an answer, each as a `TokenInfo` of the moment when it was committed, or as
    None where it is no part of the text."""

    def __init__(self, words: Vocabulary) -> None:
        self._words = words
        self._infos: list[TokenInfo | None] = []
        self._given = 0
        self._canvas = -1

    def take(self, response: GenerationResponse) -> None:
        """Take in a canvas as its last step left it; a canvas that was taken in before is left
        out."""
        if response.canvas_index == self._canvas or response.parts is None:
            return
        self._canvas = response.canvas_index
        tokens = cut(response.canvas, self._words.eos, len(response.canvas))[0]
        pieces = response.parts.pieces(tokens)[1:]
        for place, (token, piece) in enumerate(zip(tokens, pieces, strict=True)):
            spelled = self._words.pieces[token]
            info = _info(token, spelled, response.probability[place], response.entropy[place])
            # A part of a character belongs to the text; markers and names of channels do not.
            says = piece.kind == "text" and bool(piece.text or info.text == "\ufffd" * len(spelled))
            self._infos.append(info if says and spelled else None)

    def up_to(self, count: int) -> tuple[TokenInfo, ...]:
        """The text tokens among the first `count` that no earlier call has returned."""
        start, self._given = self._given, max(self._given, count)
        return tuple(info for info in self._infos[start:count] if info is not None)


def thinking(response: GenerationResponse | None, eos: Sequence[int]) -> int:
    """Tokens of a canvas that say what was thought, as its last step left it."""
    if response is None or response.parts is None:
        return 0
    tokens = cut(response.canvas, eos, len(response.canvas))[0]
    pieces = response.parts.pieces(tokens)[1:]
    return sum(piece.kind == "thought" for piece in pieces)


def infos_of(words: Vocabulary, found: Any) -> list[TokenInfo]:
    """The tokens of what was written, with their entropies and, where they are known,
    probabilities."""
    likely = getattr(found, "probability", None) or [1.0] * len(found.tokens)
    return [
        _info(token, words.pieces[token], p, entropy)
        for token, p, entropy in zip(found.tokens, likely, found.entropy, strict=True)
    ]


def _info(token: int, spelled: bytes, probability: float, entropy: float) -> TokenInfo:
    text = spelled.decode(errors="replace")
    log_p = min(0.0, math.log(max(probability, _LEAST)))
    return TokenInfo(token, text, spelled, log_p, max(0.0, entropy))


def within(infos: Sequence[TokenInfo], length: int) -> list[TokenInfo]:
    """The tokens that hold the first `length` bytes of what they spell."""
    kept: list[TokenInfo] = []
    end = 0
    for info in infos:
        if end >= length:
            break
        kept.append(info)
        end += len(info.spelled)
    return kept

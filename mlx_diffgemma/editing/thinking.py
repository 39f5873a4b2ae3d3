"""The thought before an answer under a constraint, which is written freely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_diffgemma.diffusion.constraints import FREE, Layout
from mlx_diffgemma.diffusion.generate import cut
from mlx_diffgemma.editing.session import Session
from mlx_diffgemma.pictured import followed_by
from mlx_diffgemma.text.markers import Markers, markers_of
from mlx_diffgemma.text.parts import Parts, Thought


@dataclass(frozen=True)
class Thinking:
    """A thought that a model wrote before its answer.

    Attributes:
        tokens: tokens of the thought, its markers among them; none where the model did not think.
        text: what was thought.
        steps: denoising steps of each canvas, also of one that opened no thought.
        cut: whether the thought took more tokens than it may.
        converged: whether each of these canvases was done before its steps were used up.
    """

    tokens: tuple[int, ...] = ()
    text: str = ""
    steps: tuple[int, ...] = ()
    cut: bool = False
    converged: bool = True


def think(session: Session, tokenizer: Any, most: int) -> Thinking:
    """Let the model think behind the prompt, which is encoded, and encode the thought up to its
    closing marker. What a canvas holds behind that is dropped, and so is a first canvas that does
    not begin with a thought. A thought that the model ends with its turn is closed.

    Args:
        most: tokens that the thought may take.
    """
    markers, ends = markers_of(tokenizer), session.config.eos_token_ids
    if markers.closed is None or markers.spelled:  # marks of several tokens can be cut apart
        return Thinking()
    free = Layout((FREE,) * session.length)
    tokens: list[int] = []
    steps: list[int] = []
    thinks, done, converged = _within(session.prompt, markers, ends), False, True
    while not done:
        denoised = session.denoise(session.cache.prefix, free)
        steps.append(denoised.steps)
        converged &= denoised.converged
        # One token more tells a thought that fits exactly from one that goes on.
        kept, reason = cut(denoised.tokens, ends, most - len(tokens) + 1)
        thinks = thinks or _begins(kept, tokenizer, markers)
        if not thinks:
            return Thinking(steps=tuple(steps))
        if markers.closed in kept:
            kept, done = kept[: kept.index(markers.closed) + 1], True
        elif reason == "stop":
            kept, done = [*kept, markers.closed], True
        tokens += kept
        if len(tokens) > most:
            return Thinking((), _text(tokenizer, session.prompt, tokens), tuple(steps), cut=True)
        session.encoded(followed_by(session.prompt, tokens))
    text = _text(tokenizer, session.prompt, tokens)
    return Thinking(tuple(tokens), text, tuple(steps), converged=converged)


def _within(prompt: Sequence[int], markers: Markers, ends: Sequence[int]) -> bool:
    """Whether the prompt ends within a thought."""
    for token in reversed(prompt):
        if token == markers.opened:
            return True
        if token == markers.closed or token in ends:
            return False
    return False


def _begins(tokens: Sequence[int], tokenizer: Any, markers: Markers) -> bool:
    """Whether an answer begins with a thought: with its marker, behind white space at most, or
    with a thought that is closed and was never opened."""
    for place, token in enumerate(tokens):
        if token == markers.opened:
            return not tokenizer.decode(list(tokens[:place])).strip()
        if token == markers.closed:
            return True
    return False


def _text(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    parts = Parts(tokenizer, thinking=True, prompt=prompt)
    found = parts.add(tokens) + parts.finish("length")
    return "".join(part.text for part in found if isinstance(part, Thought))

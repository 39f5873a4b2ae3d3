"""Answers that are valid by construction: JSON of a schema, a regular expression, a choice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.checks import check_text, check_texts
from mlx_diffgemma.diffusion.events import CanvasCommitted
from mlx_diffgemma.diffusion.matching import BrokenOffError, MatchingSettings, generate_matching
from mlx_diffgemma.editing.grammar import (
    GrammarMatcher,
    choices_matcher,
    closer,
    json_schema_matcher,
    regex_matcher,
)
from mlx_diffgemma.editing.session import OnStep, Session
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.errors import DiffGemmaError, UsageError
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.reading import shown
from mlx_diffgemma.text.prompt import Prompt


class UnmetConstraintError(DiffGemmaError):
    """The constraint could not be followed to its end; `partial` is what was written by then."""

    def __init__(self, message: str, partial: str) -> None:
        super().__init__(message)
        self.partial = partial


@dataclass(frozen=True)
class Structured:
    """An answer that satisfies its constraint.

    Attributes:
        text: the answer.
        tokens: its tokens.
        entropy: nats of uncertainty of each token when it was decided; 0 where there was no choice.
        denoising_steps: steps of each canvas.
        passes: forward passes over a canvas, all in all.
        seed: the seed of every random draw.
    """

    text: str
    tokens: tuple[int, ...]
    entropy: tuple[float, ...]
    denoising_steps: tuple[int, ...]
    passes: int
    seed: int

    @property
    def value(self) -> Any:
        """The answer read as JSON."""
        return json.loads(self.text)


@memory.wired()
def generate_structured(
    model: DiffusionGemma,
    tokenizer: Any,
    prompt: Prompt,
    max_tokens: int | None = None,
    *,
    json_schema: Mapping[str, Any] | bool | None = None,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    seed: int | None = None,
    system_prompt: str | None = None,
    raw: bool = False,
    on_step: OnStep | None = None,
    **settings: Any,
) -> Structured:
    """Answer a prompt with text that satisfies one constraint, always.

    Args:
        json_schema: a parsed JSON schema; the answer is JSON on one line that validates.
        regex: a regular expression in Rust's syntax that the whole answer matches.
        choices: the answers allowed.
        prompt, max_tokens, seed, system_prompt, raw, settings: as for `stream_generate`.
        on_step: called with the `DenoisingStep` after each step.

    Raises:
        UsageError: the constraint is malformed or impossible, or max_tokens is too small for it.
        UnmetConstraintError: the constraint grew too complex on the way, or the model failed; it
            keeps the partial answer.
    """
    given = [constraint for constraint in (json_schema, regex, choices) if constraint is not None]
    if len(given) != 1:
        raise UsageError("give one of json_schema, regex and choices.")
    if json_schema is not None and not isinstance(json_schema, (Mapping, bool)):
        raise UsageError(f"json_schema must be an object, not {shown(json_schema)}.")
    if regex is not None:
        check_text("regex", regex)
    if choices is not None:
        check_texts("choices", choices)
    session = Session(
        model,
        tokenizer,
        prompt,
        seed=seed,
        system_prompt=system_prompt,
        raw=raw,
        on_step=on_step,
        max_tokens=max_tokens,
        **settings,
    )
    vocabulary = session.vocabulary
    if json_schema is not None:
        matcher = json_schema_matcher(vocabulary, json_schema)
    elif regex is not None:
        matcher = regex_matcher(vocabulary, regex)
    else:
        matcher = choices_matcher(vocabulary, choices or ())
    return _run(session, vocabulary, matcher)


def _run(session: Session, vocabulary: Vocabulary, matcher: GrammarMatcher) -> Structured:
    end = MatchingSettings(vocabulary.eos, vocabulary.end, vocabulary.text)
    session.prefix()
    events = generate_matching(
        session.model,
        session.denoiser,
        session.cache,
        session.fitted(),
        session.noise,
        matcher,
        closer(vocabulary),
        end,
    )
    tokens: list[int] = []
    entropy: list[float] = []
    steps: list[int] = []
    latest = np.zeros(session.length)
    try:
        for event in events:
            if isinstance(event, CanvasCommitted):
                tokens += event.tokens
                entropy += latest[: len(event.tokens)].tolist()
                steps.append(event.passes)
                latest = np.zeros(session.length)
            else:
                # A token that is pinned has no entropy left: what it had before is what counts.
                now = event.canvas.entropy
                latest[: len(now)] = np.where(now > 0, now, latest[: len(now)])
                session.stepped(event)
    except BrokenOffError as error:
        raise UnmetConstraintError(str(error), vocabulary.decode(error.tokens)) from error
    return Structured(
        text=vocabulary.decode(tokens),
        tokens=tuple(tokens),
        entropy=tuple(entropy),
        denoising_steps=tuple(steps),
        passes=session.passes,
        seed=session.seed,
    )

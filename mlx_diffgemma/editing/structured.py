"""Answers that are valid by construction: JSON of a schema, a regular expression, a choice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.checks import check_text, check_texts
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import FREE
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
from mlx_diffgemma.editing.thinking import Thinking, think
from mlx_diffgemma.editing.validated import Lenient, UnmetConstraintError, first_valid
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.fitting import fit_to_context
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.pictured import followed_by
from mlx_diffgemma.reading import shown
from mlx_diffgemma.text.prompt import Prompt


@dataclass(frozen=True)
class Structured:
    """An answer that satisfies its constraint.

    Attributes:
        text: the answer.
        tokens: its tokens.
        entropy: nats of uncertainty of each token when it was decided; 0 where there was no choice.
        probability: probability of each token when it was decided; 1 where there was no choice.
        denoising_steps: steps of each canvas, those of the thought first.
        passes: forward passes over a canvas, all in all.
        seed: the seed of every random draw.
        thought: what was thought before the answer; "" for nothing.
        thought_tokens: the tokens of the thought, its markers among them.
        converged: whether the model was sure of every canvas before it had to be decided for want
            of steps, and every canvas of the thought was done before its steps were used up.
    """

    text: str
    tokens: tuple[int, ...]
    entropy: tuple[float, ...]
    probability: tuple[float, ...]
    denoising_steps: tuple[int, ...]
    passes: int
    seed: int
    thought: str = ""
    thought_tokens: tuple[int, ...] = ()
    converged: bool = True

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
    json_schema: Mapping[str, Any] | bool | Lenient | None = None,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    validate: int | None = None,
    seed: int | None = None,
    config: DiffusionConfig | None = None,
    on_step: OnStep | None = None,
    **settings: Any,
) -> Structured:
    """Answer a prompt with text that satisfies one constraint, always.

    Args:
        prompt: as for `stream_generate`.
        max_tokens: as for `stream_generate`.
        json_schema: a parsed JSON schema; the answer is JSON on one line that validates.
        regex: a regular expression in Rust's syntax that the whole answer matches.
        choices: the answers allowed.
        validate: how often to try for an answer under a schema that says more than is enforced: the
            rest is checked in the answer, and each further try takes the next seed. Without it such
            a schema is refused.
        seed: as for `stream_generate`.
        config: as for `stream_generate`.
        on_step: called with the `DenoisingStep` after each step.
        settings: fields of `DiffusionConfig` and `PromptSettings`, as for `stream_generate`. Where
            `thinking` is asked for and the model opens a thought, the thought is written freely,
            and the constraint holds from its end on.

    Raises:
        UsageError: the constraint is malformed or impossible, or max_tokens is too small for it.
        PromptError: the prompt is empty, malformed or longer than the context.
        MemoryShortageError: the request takes more memory than the machine offers.
        NumericalError: the model returned values that are not finite while it thought.
        UnmetConstraintError: the constraint grew too complex on the way, the thought took the
            tokens that the answer needs, the model failed, or no answer validates; it keeps the
            partial or last answer.
    """
    given = [constraint for constraint in (json_schema, regex, choices) if constraint is not None]
    if len(given) != 1:
        raise UsageError("give one of json_schema, regex and choices.")
    if json_schema is not None and not isinstance(json_schema, (Mapping, bool, Lenient)):
        raise UsageError(f"json_schema must be an object, not {shown(json_schema)}.")
    if regex is not None:
        check_text("regex", regex)
    if choices is not None:
        check_texts("choices", choices)
    if validate is not None:
        if json_schema is None or isinstance(json_schema, Lenient):
            raise UsageError("validate is for a json_schema: give both, or neither.")
        again = partial(generate_structured, model, tokenizer, prompt, max_tokens, on_step=on_step)
        again = partial(again, config=config, **settings)
        return first_valid(
            lambda schema, number: again(json_schema=schema, seed=number),
            json_schema,
            validate,
            seed,
        )
    session = Session(
        model,
        tokenizer,
        prompt,
        seed=seed,
        config=config,
        on_step=on_step,
        max_tokens=max_tokens,
        **settings,
    )
    vocabulary = session.vocabulary
    if isinstance(json_schema, Lenient):
        matcher = json_schema_matcher(vocabulary, json_schema.schema, lenient=True)
    elif json_schema is not None:
        matcher = json_schema_matcher(vocabulary, json_schema)
    elif regex is not None:
        matcher = regex_matcher(vocabulary, regex)
    else:
        matcher = choices_matcher(vocabulary, choices or ())
    return _run(session, matcher, tokenizer if session.prompt_settings.thinking else None)


def _run(session: Session, matcher: GrammarMatcher, thinks: Any) -> Structured:
    """The answer; `thinks` is the tokenizer whose markers tell a thought, None for no thinking."""
    vocabulary, ends = session.vocabulary, closer(session.vocabulary)
    config, thought = session.fitted(), Thinking()
    ends.require(matcher, config.max_tokens)
    end = MatchingSettings(vocabulary.eos, vocabulary.end, vocabulary.text)
    session.prefix()
    if thinks is not None:
        most = config.max_tokens
        thought = think(session, thinks, most - ends.shortest(matcher, most))
        if thought.cut:
            raise UnmetConstraintError(
                f"the thought took the {most} tokens of max_tokens and left too few for an answer "
                "that matches; raise max_tokens.",
                thought.text,
            )
        config = replace(config, max_tokens=most - len(thought.tokens))
        (config,) = fit_to_context(
            session.model, [followed_by(session.prompt, thought.tokens)], config
        )
    events = generate_matching(
        session.model,
        session.denoiser,
        session.cache,
        config,
        session.noise,
        matcher,
        ends,
        end,
        session.canvases,
    )
    tokens: list[int] = []
    entropy: list[float] = []
    probability: list[float] = []
    steps = list(thought.steps)
    latest, converged = np.zeros(session.length), thought.converged
    draft, likely = np.full(session.length, FREE), np.ones(session.length)
    try:
        for event in events:
            if isinstance(event, CanvasCommitted):
                tokens += event.tokens
                entropy += latest[: len(event.tokens)].tolist()
                chosen = draft[: len(event.tokens)] == event.tokens
                probability += np.where(chosen, likely[: len(event.tokens)], 1.0).tolist()
                steps.append(event.passes)
                converged &= event.converged
                latest = np.zeros(session.length)
                draft, likely = np.full(session.length, FREE), np.ones(session.length)
            else:
                # A token that is pinned has no entropy left: what it had before is what counts.
                now = event.canvas
                undecided = np.flatnonzero(now.entropy > 0)
                latest[undecided] = now.entropy[undecided]
                draft[undecided] = now.draft[undecided]
                likely[undecided] = now.probability[undecided]
                session.stepped(event)
    except BrokenOffError as error:
        raise UnmetConstraintError(str(error), vocabulary.decode(error.tokens)) from error
    return Structured(
        text=vocabulary.decode(tokens),
        tokens=tuple(tokens),
        entropy=tuple(entropy),
        probability=tuple(probability),
        denoising_steps=tuple(steps),
        passes=session.passes,
        seed=session.seed,
        thought=thought.text,
        thought_tokens=thought.tokens,
        converged=converged,
    )

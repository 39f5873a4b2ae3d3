"""Answer questions by choosing: how probable is each answer, in one look at a canvas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.checks import check_flag, check_integer, check_text, check_texts
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.editing.scoring import Option, comparable, option_log_probs, softmax
from mlx_diffgemma.editing.session import Session
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.generation import fit_to_context
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

SLOT = "{}"

_PROMPT = """\
{question}
Answer with one of these, and nothing else: {choices}."""


@dataclass(frozen=True)
class Chosen:
    """How probable the model finds each choice. The probabilities sum to 1; no claim is made that
    they are calibrated.

    Attributes:
        question: what was asked.
        probabilities: by choice, the mean over the draws.
        spread: by choice, the standard deviation over the draws; 0 for one draw.
        tokens: by choice, the token ids that stand in the answer's place.
        passes: forward passes over a canvas, for all questions together.
        seed: the seed of every random draw.
    """

    question: str
    probabilities: dict[str, float]
    spread: dict[str, float]
    tokens: dict[str, tuple[int, ...]]
    passes: int
    seed: int

    @property
    def best(self) -> str:
        """The most probable choice."""
        return max(self.probabilities, key=lambda choice: self.probabilities[choice])


@memory.wired()
def choose(
    model: DiffusionGemma,
    tokenizer: Any,
    questions: str | Sequence[str],
    choices: Sequence[str],
    *,
    frame: str = SLOT,
    draws: int = 1,
    bare: bool = False,
    seed: int | None = None,
    system_prompt: str | None = None,
    raw: bool = False,
    config: DiffusionConfig | None = None,
    **settings: Any,
) -> list[Chosen]:
    """The probability of each choice as the answer to each question.

    The answer stands in a canvas whose rest is pinned, so choices of one token take one forward
    pass together. Longer ones are seen token by token, each with those before it pinned, and where
    their lengths differ, with the token behind them.

    Args:
        frame: the answer's text, with `{}` where the choice stands.
        draws: how many canvases of noise to average over.
        bare: ask the question as it is, without listing the choices.
        seed, system_prompt, raw, config, settings: as for `stream_generate`.

    Raises:
        UsageError: fewer than two choices, two that are the same, one that the vocabulary cannot
            write, or a frame without its `{}` or too long for a canvas.
    """
    if not isinstance(questions, str):
        check_texts("questions", questions)
    check_texts("choices", choices)
    check_text("frame", frame)
    check_flag("bare", bare)
    asked = [questions] if isinstance(questions, str) else list(questions)
    if not asked:
        raise UsageError("no question: give at least one.")
    check_integer("draws", draws, 1)
    before, after = _frame(frame)
    prompts = [_prompt(question, choices, bare=bare) for question in asked]
    session = Session(
        model,
        tokenizer,
        prompts[0],
        seed=seed,
        system_prompt=system_prompt,
        raw=raw,
        config=config,
        **settings,
    )
    answers = _answers(session.vocabulary, choices)
    options = comparable(
        [
            _option(session, row, before, answer, after)
            for row in range(len(asked))
            for answer in answers
        ]
    )
    ids = [session.encode(prompt) for prompt in prompts]
    fit_to_context(model, ids, session.config)
    prefixes = [session.encoded(row) for row in ids]
    found = [option_log_probs(session, prefixes, options, draw) for draw in range(draws)]
    probabilities = np.stack(
        [[softmax(row) for row in log_probs.reshape(len(asked), -1)] for log_probs in found]
    )  # [draws, questions, choices]
    return [
        Chosen(
            question=question,
            probabilities=dict(zip(choices, each.mean(axis=0).tolist(), strict=True)),
            spread=dict(zip(choices, each.std(axis=0).tolist(), strict=True)),
            tokens=dict(zip(choices, map(tuple, answers), strict=True)),
            passes=session.passes,
            seed=session.seed,
        )
        for question, each in zip(asked, probabilities.swapaxes(0, 1), strict=True)
    ]


def _prompt(question: str, choices: Sequence[str], *, bare: bool) -> str:
    return question if bare else _PROMPT.format(question=question, choices=", ".join(choices))


def _frame(frame: str) -> tuple[str, str]:
    if frame.count(SLOT) != 1:
        raise UsageError(f"the frame {frame!r} must hold {SLOT} once, where the choice stands.")
    before, after = frame.split(SLOT)
    return before, after


def _answers(vocabulary: Vocabulary, choices: Sequence[str]) -> list[list[int]]:
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise UsageError("give at least two choices, all of them different.")
    answers = []
    for choice in choices:
        tokens = vocabulary.encode(choice)
        if not tokens or vocabulary.decode(tokens) != choice:
            raise UsageError(
                f"the model's vocabulary cannot write the choice {choice!r}; choose another word."
            )
        answers.append(tokens)
    return answers


def _option(session: Session, row: int, before: str, answer: list[int], after: str) -> Option:
    """The canvas of an answer in its frame, the end behind it."""
    start = len(session.vocabulary.encode(before))
    tokens = [*session.vocabulary.encode(before), *answer, *session.vocabulary.encode(after)]
    if len(tokens) >= session.length:
        raise UsageError(
            f"the frame with its choice takes {len(tokens)} tokens, and the canvas holds "
            f"{session.length}; shorten it."
        )
    tail = [session.vocabulary.end] * (session.length - len(tokens))
    return Option(row, (*tokens, *tail), start, start + len(answer))

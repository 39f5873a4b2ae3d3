"""Fill the holes of a text; what surrounds them comes back byte for byte."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.checks import check_lengths, check_sequence, check_text
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.editing.gaps import Filled, FilledText, fill_gaps
from mlx_diffgemma.editing.session import OnStep, Session
from mlx_diffgemma.editing.window import Gap
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.reading import shown
from mlx_diffgemma.text.prompt import Prompt

HOLE = "[[?]]"
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

_PROMPT = """\
In the text below, {hole} stands for something that is missing. Write the whole text with the \
missing part in its place, and nothing else.

{text}"""


@dataclass(frozen=True)
class Infilled:
    """A text with its holes filled.

    Attributes:
        text: the whole text.
        holes: what became of each hole, from left to right.
        cut: most tokens behind a hole that did not fit in its canvas and went unseen.
        passes: forward passes over a canvas.
        seed: the seed of every random draw.
    """

    text: str
    holes: tuple[Filled, ...]
    cut: int
    passes: int
    seed: int

    @property
    def converged(self) -> bool:
        """Whether every canvas was done before its steps were used up."""
        return all(hole.converged for hole in self.holes)


@memory.wired()
def infill(
    model: DiffusionGemma,
    tokenizer: Any,
    text: str,
    *,
    hole: str = HOLE,
    lengths: Sequence[int] | Sequence[Sequence[int]] = LENGTHS,
    prompt: Prompt | None = None,
    seed: int | None = None,
    config: DiffusionConfig | None = None,
    on_step: OnStep | None = None,
    **settings: Any,
) -> Infilled:
    """Fill every occurrence of `hole` in `text`.

    Args:
        hole: what marks a hole.
        lengths: how many tokens a hole may take, as candidates for every hole, or as one sequence
            of candidates for each hole. Where a hole has several, the model chooses.
        prompt: what to tell the model; by default, to write the text without its holes.
        seed: as for `stream_generate`.
        config: as for `stream_generate`.
        on_step: called with the `DenoisingStep` after each step.
        settings: fields of `DiffusionConfig` and `PromptSettings`, as for `stream_generate`.

    Raises:
        UsageError: the text has no hole, or the lengths do not fit the text or the canvas.
        PromptError: the prompt is empty or malformed, or the text is longer than the context.
        MemoryShortageError: the request takes more memory than the machine offers.
        NumericalError: the model returned values that are not finite.
    """
    check_text("text", text)
    check_text("hole", hole)
    literals = split_at_holes(text, hole)
    candidates = lengths_of_holes(lengths, len(literals) - 1)
    if prompt is None:
        prompt = _PROMPT.format(hole=hole, text=text)
    session = Session(
        model,
        tokenizer,
        prompt,
        seed=seed,
        config=config,
        on_step=on_step,
        **settings,
    )
    filled: FilledText = fill_gaps(session, literals, [Gap(each) for each in candidates])
    return Infilled(filled.text, filled.gaps, filled.cut, session.passes, session.seed)


def split_at_holes(text: str, hole: str) -> list[str]:
    """The text around the holes: one piece more than there are holes.

    Raises:
        UsageError: there is no hole, or its mark is empty.
    """
    if not hole:
        raise UsageError("the mark of a hole is empty; give some characters, such as [[?]].")
    literals = re.split(re.escape(hole), text)
    if len(literals) == 1:
        raise UsageError(
            f"the text has no hole; mark one with {hole if hole.isprintable() else shown(hole)}."
        )
    return literals


def unused_hole(text: str) -> str:
    """A mark for a hole that does not occur in `text`."""
    hole, number = HOLE, 0
    while hole in text:
        number += 1
        hole = f"[[?{number}]]"
    return hole


def lengths_of_holes(
    lengths: Sequence[int] | Sequence[Sequence[int]], holes: int
) -> list[tuple[int, ...]]:
    """The candidate lengths of each hole.

    Raises:
        UsageError: a hole has no lengths or one below 1, or there are lengths for more or fewer
            holes than the text has.
    """
    check_sequence("lengths", lengths)
    each = [item for item in lengths if not isinstance(item, int)]
    if each and len(each) != holes:
        raise UsageError(
            f"lengths for {len(each)} holes were given, and the text has {holes}; give as many."
        )
    same = tuple(item for item in lengths if isinstance(item, int))
    for item in each:
        check_sequence("lengths of a hole", item)
    candidates = [tuple(item) for item in each] or [same] * holes
    for found in candidates:
        check_lengths("lengths", found)
        if not found or min(found) < 1:
            raise UsageError(f"a hole takes at least 1 token; its lengths are {list(found)}.")
    return candidates

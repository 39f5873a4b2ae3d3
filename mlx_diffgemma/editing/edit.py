"""Rewrite some lines of a text; everything else stays byte for byte."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.checks import check_lengths, check_share, check_text
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import FREE
from mlx_diffgemma.editing.files import split_lines, unified_diff
from mlx_diffgemma.editing.gaps import Filled, choose_lengths, read
from mlx_diffgemma.editing.session import OnStep, Session
from mlx_diffgemma.editing.window import Gap, Window, lay_out
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.reading import shown
from mlx_diffgemma.text.prompt import Prompt

_SCALES = (0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5, 2.0)  # multiples of the present length
_FROM_NOTHING = (1, 2, 4, 8, 12, 16, 24, 32)

_PROMPT = """\
Rewrite {which} of the text below: {instruction}
Write the whole text with the rewriting done and all else as it is, and nothing else.

{text}"""


@dataclass(frozen=True)
class Edited:
    """A text with some lines rewritten.

    Attributes:
        text: the whole text.
        before: the whole text as it was.
        lines: the first and the last line that were rewritten, from 1.
        filled: what stands in the place of these lines.
        cut: tokens behind the lines that did not fit in the canvas and went unseen.
        passes: forward passes over a canvas.
        seed: the seed of every random draw.
    """

    text: str
    before: str
    lines: tuple[int, int]
    filled: Filled
    cut: int
    passes: int
    seed: int

    @property
    def converged(self) -> bool:
        """Whether the canvas was done before its steps were used up."""
        return self.filled.converged

    def diff(self, name: str) -> str:
        """What changed, as a unified diff of the file `name`."""
        return unified_diff(self.before, self.text, name)


@memory.wired()
def edit(
    model: DiffusionGemma,
    tokenizer: Any,
    text: str,
    instruction: str,
    lines: tuple[int, int],
    *,
    strength: float = 1.0,
    lengths: Sequence[int] | None = None,
    prompt: Prompt | None = None,
    seed: int | None = None,
    config: DiffusionConfig | None = None,
    on_step: OnStep | None = None,
    **settings: Any,
) -> Edited:
    """Rewrite the lines from `lines[0]` to `lines[1]`, counted from 1, both included.

    The line end behind the last of these lines stays. In a text whose lines all end in CRLF, the
    new lines do too.

    Args:
        strength: how much of the present text is noise at the start, from 0 to 1. 1 starts from
            noise alone; below 1, the canvas starts late in the schedule, and as many tokens as the
            lines have now are written; 0 changes nothing.
        lengths: how many tokens the new lines may take; the model chooses among them.
        prompt: what to tell the model, in place of the instruction and the text.
        seed: as for `stream_generate`.
        config: as for `stream_generate`.
        on_step: called with the `DenoisingStep` after each step.
        settings: fields of `DiffusionConfig` and `PromptSettings`, as for `stream_generate`.

    Raises:
        UsageError: the lines are not in the text, do not fit in a canvas, or strength is out of
            range.
        PromptError: the prompt is empty or malformed, or the text is longer than the context.
        MemoryShortageError: the request takes more memory than the machine offers.
        NumericalError: the model returned values that are not finite.
    """
    check_text("text", text)
    check_text("instruction", instruction)
    check_share("strength", strength)
    check_lengths("lines", lines)
    if len(lines) != 2:
        raise UsageError(f"lines must be the first and the last line, not {shown(lines)}.")
    if lengths is not None:
        check_lengths("lengths", lengths)
    left, present, right = around_lines(text, lines)
    if prompt is None:
        which = f"line {lines[0]}" if lines[0] == lines[1] else f"lines {lines[0]} to {lines[1]}"
        prompt = _PROMPT.format(which=which, instruction=instruction, text=text)
    session = Session(
        model,
        tokenizer,
        prompt,
        seed=seed,
        config=config,
        on_step=on_step,
        **settings,
    )
    tokens = session.vocabulary.encode(present)
    steps = math.ceil(strength * session.config.max_denoising_steps)
    if steps == 0:
        unchanged = Filled(present, tuple(tokens), (0.0,) * len(tokens))
        return Edited(text, text, lines, unchanged, 0, 0, session.seed)
    gaps = [Gap(tuple(lengths or candidate_lengths(len(tokens), strength, session.length)))]
    scores: dict[int, float] = {}
    if len(gaps[0].lengths) > 1:
        (scores,) = choose_lengths(session, [left, right], gaps)
    window = lay_out(session.vocabulary, [left, right], gaps, [gaps[0].lengths], session.length)[0]
    done = session.denoise(
        session.prefix(window.prefix),
        window.layout,
        initial=None if strength == 1.0 else _partly_noised(session, window, tokens, strength),
        first_step=session.config.max_denoising_steps - steps + 1,
    )
    filled = read(session, window.spans[0], done)
    if "\r\n" in text and not re.search(r"(?<!\r)\n", text):
        filled = replace(filled, text=re.sub(r"(?<!\r)\n", "\r\n", filled.text))
    return Edited(
        text=left + filled.text + right,
        before=text,
        lines=lines,
        filled=replace(filled, scores=scores),
        cut=window.cut,
        passes=session.passes,
        seed=session.seed,
    )


def around_lines(text: str, lines: tuple[int, int]) -> tuple[str, str, str]:
    """The text before some lines, these lines without the end of the last, and the rest.

    Raises:
        UsageError: the text has no such lines.
    """
    first, last = lines
    all_lines = split_lines(text)
    if not 1 <= first <= last <= len(all_lines):
        raise UsageError(
            f"the range {first}:{last} is not in the text, which has {len(all_lines)} "
            f"{'line' if len(all_lines) == 1 else 'lines'}; ranges count from 1."
        )
    marked = "".join(all_lines[first - 1 : last])
    present = re.sub(r"\r?\n\Z", "", marked)
    end = marked[len(present) :]
    return "".join(all_lines[: first - 1]), present, end + "".join(all_lines[last:])


def candidate_lengths(present: int, strength: float, canvas_length: int) -> list[int]:
    """How many tokens the new lines may take in the place of `present` ones, in order."""
    if strength < 1.0 and present:
        return [present]
    lengths = {round(present * scale) for scale in _SCALES} if present else set(_FROM_NOTHING)
    fitting = sorted(length for length in lengths if 1 <= length <= canvas_length - 2)
    return fitting or [present]


def _partly_noised(
    session: Session, window: Window, present: Sequence[int], strength: float
) -> list[int]:
    """A canvas that holds the present text with a share of `strength` of it replaced by noise."""
    index, size = session.canvases, session.vocabulary.size
    canvas = np.array(session.noise.initial(index, session.length, size))
    coins = np.array(session.noise.uniform(index, 0, session.length))
    span = window.spans[0]
    start = span.start + bool(span.before)
    for place, token in enumerate(present, start):
        if place < span.stop - bool(span.after) and coins[place] >= strength:
            canvas[place] = token
    for place, edge in ((span.start, span.before), (span.stop - 1, span.after)):
        if edge:
            canvas[place] = session.vocabulary.token_of(edge)
    assert all(window.layout.tokens[place] == FREE for place in range(span.start, span.stop))
    return [int(token) for token in canvas]

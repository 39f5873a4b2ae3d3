"""The encoder's opinion of a draft. The encoder is run over a finished canvas anyhow, to go on
behind it.

The denoiser judges each position given all others as they stood; the encoder says how probable each
token is given all before it, so it sees what passes as certain and does not fit, such as two
spellings mixed at neighbouring positions. Letters: C canvas.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diffusion.canvas import Canvas, renoised
from mlx_diffgemma.diffusion.stopping import unsure
from mlx_diffgemma.kernels.vocabulary import Row
from mlx_diffgemma.model.cache import Prefix
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma


def worth_checking(canvas: Canvas) -> bool:
    """Whether the encoder is to be asked about the draft of a canvas: it is nearly certain, not
    done yet, not the draft that the encoder refused last, and not the end of an answer. Behind an
    end nothing is encoded, so that a check would cost what it saves."""
    settings = canvas.settings
    if settings.encoder_check is None or canvas.done or len(canvas) == 1:
        return False
    if unsure(canvas) >= settings.check_below:
        return False
    if np.isin(canvas.draft, settings.eos_token_ids).any():
        return False
    return canvas.checked is None or not np.array_equal(canvas.checked, canvas.shown)


def check(model: DiffusionGemma, canvas: Canvas, prefix: Prefix) -> tuple[Canvas, Prefix | None]:
    """Run the encoder once over the draft of a canvas, behind `prefix`.

    Where every token is probable enough, returns the canvas as done, and the prefix with the draft
    at its end. Elsewhere returns the canvas with noise from the first improbable token on, which is
    denoised further, and None. The first token is taken for right: only the pass over the prompt
    knows how probable it is.
    """
    least = canvas.settings.encoder_check
    assert least is not None
    draft = canvas.draft.tolist()
    hidden, (longer,) = model.encode([draft], [prefix])
    standing = mx.array(draft[1:], mx.int32)
    asked = [Row(length=len(draft) - 1, temperature=1.0, need_soft=False)]
    found = model.predict(hidden[:-1], asked, standing).standing_log_probability
    assert found is not None
    mx.async_eval(longer.arrays())
    place = first_improbable(np.array(found), least, canvas.counts())
    if place is None:
        return replace(canvas, done=True, converged=True), longer
    return replace(renoised(canvas, place), checked=canvas.shown), None


def first_improbable(
    log_probabilities: np.ndarray, least: float, counted: np.ndarray
) -> int | None:
    """The first position of a draft [C] whose token has less than the probability `least`, given
    the log-probabilities [C - 1] of all tokens but the first; None where there is none. Those that
    are not `counted` [C] are not looked at."""
    with np.errstate(divide="ignore"):
        doubtful = ~(log_probabilities >= np.log(least)) & counted[1:]  # NaN confirms nothing
    return int(doubtful.argmax()) + 1 if doubtful.any() else None

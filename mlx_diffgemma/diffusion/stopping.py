"""When a canvas is done, and how far it moves on if not: functions of it after a pass. Letters: C
canvas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mlx_diffgemma.diffusion.canvas import Canvas, Descent
from mlx_diffgemma.diffusion.config import DiffusionConfig

_STUCK = 0.9  # share of its entropy that a pass leaves a canvas which it hardly brought on
_LEAP = 3  # steps of the schedule that such a canvas moves on
_EARLY = 6  # a canvas may start again in the first of so many parts of its steps
_FULL = 0.9  # share of a canvas that is accepted where it holds hardly any noise


def as_shown(
    settings: DiffusionConfig, draft: np.ndarray, entropy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A draft [C] and its entropies [C] in nats as the stop rule sees them.

    With `stop_at_eos` the rule looks no further than the first eos of the draft, where that is
    certain: positions behind it are cut off at commit, and count as settled, with no entropy. (To
    leave them out of the mean entropy would delay the stop.)
    """
    if not settings.stop_at_eos or not settings.eos_token_ids:
        return draft, entropy
    is_eos = np.isin(draft, settings.eos_token_ids)
    # An eos that follows an earlier, uncertain one would be cut off with it.
    ends = is_eos & (is_eos.cumsum() == 1) & (entropy < settings.eos_certainty)
    behind = np.cumsum(ends) - ends > 0
    return (
        np.where(behind, settings.eos_token_ids[0], draft),
        np.where(behind, 0.0, entropy),
    )


def unsure(canvas: Canvas) -> float:
    """Nats of entropy of the draft, summed over the positions that decide when the canvas is
    done."""
    _, entropy = as_shown(canvas.settings, canvas.draft, canvas.entropy)
    return float(np.where(canvas.counts(), entropy, 0.0).sum(dtype=entropy.dtype))


def brought_on(before: Canvas, after: Canvas) -> bool:
    """Whether a pass took a tenth and more off the entropy of a canvas. The first pass did, and so
    did every pass where no setting asks for it."""
    settings = before.settings
    nobody_asks = settings.leap_until is None and settings.bound_share is None
    if nobody_asks or before.passes == before.begun:
        return True
    return unsure(after) <= _STUCK * unsure(before)


def steps_on(before: Canvas, after: Canvas) -> int:
    """Steps of the schedule that a pass took a canvas on: one, or more by the rule of `leap_until`.
    A leap ends at the last step at the latest.

    While nothing is decided, a step changes little but the temperature, and while much is, each
    counts; so the schedule is crossed quickly where the canvas waits for a lower temperature."""
    settings = before.settings
    if settings.leap_until is None or before.step >= settings.leap_until or after.moved:
        return 1
    return max(1, min(_LEAP, settings.max_denoising_steps - before.step))


def descended(canvas: Canvas) -> Descent | None:
    """The descent of a canvas with its last pass."""
    descent = canvas.descent
    if descent is None:
        return None
    total = unsure(canvas)
    if total <= _STUCK * descent.lowest:
        return replace(descent, lowest=total, idle=0)
    return replace(descent, idle=descent.idle + 1)


def is_stuck(canvas: Canvas) -> bool:
    """Whether `restart_after` passes in a row have brought a canvas no further that holds hardly
    any noise. What it took for right contradicts itself then, and is mostly wrong."""
    most, descent = canvas.settings.restart_after, canvas.descent
    if most is None or descent is None or descent.idle < most:
        return False
    return bool(canvas.accepted.mean() >= _FULL)


def starts_again(canvas: Canvas) -> bool:
    """Whether a canvas is to be put back to noise: it is stuck for the first time, and early. Later
    a restart would cost more than it mends."""
    return _is_early(canvas) and not canvas.begun and is_stuck(canvas)


def _is_lost(canvas: Canvas) -> bool:
    """Whether a canvas is stuck for good: for the second time, or too late to start again and yet
    in the first half of the schedule. In the second half the temperature may still decide."""
    warm = 2 * canvas.steps_left >= canvas.settings.max_denoising_steps
    return (canvas.begun > 0 or (warm and not _is_early(canvas))) and is_stuck(canvas)


def _is_early(canvas: Canvas) -> bool:
    """Whether a canvas took no more passes than a sixth of the steps."""
    return _EARLY * canvas.passes <= canvas.settings.max_denoising_steps


def has_converged(canvas: Canvas) -> bool:
    """Whether the draft equals that of the previous `stability_threshold` passes and its mean
    entropy is below `confidence_threshold` (the reference's `StableAndConfidentStoppingCriteria`).
    One of them is enough in three cases: entropy that sums to less than `certain_below` over the
    number of passes (what is certain late was hard, and less sure to be right), a draft that equals
    that of the previous `stable_after` passes, and a mean entropy below the threshold from pass
    `confident_after` on. So is being stuck for good."""
    settings, counted, total = canvas.settings, canvas.counts(), unsure(canvas)

    def same_for(threshold: int) -> bool:
        stable = canvas.unchanged >= threshold
        return canvas.passes > threshold and bool((stable | ~counted).all())

    certain = settings.certain_below or 0.0
    if total * (canvas.passes - canvas.begun) < certain or _is_lost(canvas):
        return True
    if settings.stable_after is not None and same_for(settings.stable_after):
        return True
    if not total / max(1, int(counted.sum())) < settings.confidence_threshold:
        return False
    if settings.confident_after is not None and canvas.passes >= settings.confident_after:
        return True
    return same_for(settings.stability_threshold)

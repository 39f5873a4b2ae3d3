"""From a prediction to the canvas of the next step: which positions take the model's draw, and
what the others get.

A sampler is a function of a prediction and the canvas that it is of. Letters: C canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_diffgemma.diffusion.canvas import Canvas, Prediction
from mlx_diffgemma.diffusion.stopping import unsure
from mlx_diffgemma.kernels.accept_renoise import accept_renoise

_MOST = 1.0  # nats that `bound_share` lets a pass accept at most


@dataclass(frozen=True)
class Proposal:
    """What a sampler makes of a prediction.

    Attributes:
        tokens: [C] what the next step starts from.
        accepted: [C] which of them are draws of the model.
        draft: [C] what would be committed now.
    """

    tokens: mx.array
    accepted: mx.array
    draft: mx.array


Sampler = Callable[[Prediction, Canvas], Proposal]


def probability(prediction: Prediction, proposal: Proposal) -> mx.array:
    """[C] the probability of a draft; NaN where it keeps a token that this pass did not give."""
    if proposal.draft is prediction.argmax:
        return prediction.probability
    drawn = mx.where(proposal.draft == prediction.draw, prediction.confidence, mx.nan)
    return mx.where(proposal.draft == prediction.argmax, prediction.probability, drawn)


def propose(prediction: Prediction, canvas: Canvas) -> Proposal:
    """What the canvas's own sampler makes of a prediction.

    A fixed position has no entropy, so it takes nothing of the entropy bound; where a sampler goes
    by confidence, it takes no share of what is accepted either.
    """
    sampler, layout = SAMPLERS[canvas.settings.sampler], canvas.layout
    if layout is None or not layout.pins:
        return sampler(prediction, canvas)
    is_open = mx.array(layout.open)
    confidence = mx.where(is_open, prediction.confidence, 0.0)
    proposal = sampler(replace(prediction, confidence=confidence), canvas)
    return replace(
        proposal, tokens=layout.pin(proposal.tokens), accepted=proposal.accepted | ~is_open
    )


def entropy_bound(prediction: Prediction, canvas: Canvas) -> Proposal:
    """The reference's sampler: accept what is nearly independent, renoise the rest, decide anew at
    every step. Nothing is ever frozen; the draft is the argmax. Settings that the reference does
    not have move its bound (`bound_of`), leave what is behind an eos out of it and lengthen runs of
    what is accepted."""
    settings, entropy, noise = canvas.settings, prediction.entropy, _fresh(canvas)
    if settings.free_behind_eos:
        behind = behind_end(
            prediction.argmax, entropy, settings.eos_token_ids, settings.eos_certainty
        )
        entropy = mx.where(behind, 0.0, entropy)
    tokens, accepted = accept_renoise(
        entropy[None], prediction.draw[None], noise[None], bound_of(canvas)
    )
    if settings.run_entropy is None:
        return Proposal(tokens[0], accepted[0], prediction.argmax)
    lengthened = along_runs(accepted[0], entropy < settings.run_entropy)
    return Proposal(mx.where(lengthened, prediction.draw, noise), lengthened, prediction.argmax)


def bound_of(canvas: Canvas) -> float:
    """Nats of entropy that the next pass may accept: `entropy_bound`, moved towards `late_bound` by
    the share of the schedule that has passed, and then, from step `settled_from` on, towards
    `settled_bound` by the share of the canvas that the last pass accepted. No less than the share
    `bound_share` of what the canvas still has where the last pass brought it on, up to 1 nat."""
    settings = canvas.settings
    bound = settings.entropy_bound
    if settings.late_bound is not None:
        bound += (settings.late_bound - bound) * (1.0 - settings.warmth(canvas.step))
    if settings.settled_bound is not None and canvas.step >= (settings.settled_from or 1):
        bound += (settings.settled_bound - bound) * float(canvas.accepted.mean())
    if settings.bound_share is not None and canvas.moved and canvas.passes > canvas.begun:
        bound = max(bound, min(settings.bound_share * unsure(canvas), _MOST))
    return bound


def behind_end(
    draft: mx.array, entropy: mx.array, eos_token_ids: Sequence[int], certainty: float
) -> mx.array:
    """[C] which positions of a draft [C] stand behind its first eos, where the entropy [C] of that
    eos is below `certainty`, both in nats."""
    is_eos = mx.zeros(draft.shape, mx.bool_)
    for token in eos_token_ids:
        is_eos = is_eos | (draft == token)
    ends = is_eos & (mx.cumsum(is_eos.astype(mx.int32)) == 1) & (entropy < certainty)
    return mx.cumsum(ends.astype(mx.int32)) - ends.astype(mx.int32) > 0


def along_runs(accepted: mx.array, sure: mx.array) -> mx.array:
    """[C] the accepted positions, and the `sure` ones [C] that only sure positions part from an
    accepted one."""
    places = mx.arange(accepted.shape[0])
    open_to_runs = sure | accepted

    def reached(accepted: mx.array, passable: mx.array) -> mx.array:
        """Positions whose last accepted one to the left lies behind their last barrier."""
        return mx.cummax(mx.where(accepted, places, -1)) > mx.cummax(mx.where(passable, -1, places))

    return open_to_runs & (
        reached(accepted, open_to_runs) | reached(accepted[::-1], open_to_runs[::-1])[::-1]
    )


def confidence_threshold(prediction: Prediction, canvas: Canvas) -> Proposal:
    """Accept every draw that has at least the probability `accept_threshold`, and the most probable
    one always; decide anew at every step."""
    confidence = prediction.confidence
    accepted = (confidence >= canvas.settings.accept_threshold) | (confidence == confidence.max())
    tokens = mx.where(accepted, prediction.draw, _fresh(canvas))
    return Proposal(tokens, accepted, prediction.argmax)


def block_refinement(prediction: Prediction, canvas: Canvas) -> Proposal:
    """Keep the most probable draws for good: at every step an equal share of the canvas, and all of
    at least the probability `accept_threshold` (as diffusers' `BlockRefinementScheduler` does in
    its uniform mode, without its editing)."""
    kept = mx.array(canvas.accepted)
    if (
        canvas.layout is not None and canvas.layout.pins
    ):  # fixed positions are accepted too, but take no share
        kept = kept & mx.array(canvas.layout.open)
    confidence = mx.where(kept, -1.0, prediction.confidence)
    rank = mx.argsort(mx.argsort(-confidence))
    share = -(-len(canvas) // canvas.settings.max_denoising_steps)
    fresh = ~kept & ((rank < share) | (confidence >= canvas.settings.accept_threshold))
    tokens = mx.where(fresh, prediction.draw, canvas.tokens)
    kept = kept | fresh
    return Proposal(
        tokens=mx.where(kept, tokens, _fresh(canvas)),
        accepted=kept,
        draft=mx.where(kept, tokens, prediction.argmax),
    )


def discrete_ddim(prediction: Prediction, canvas: Canvas) -> Proposal:
    """Draw the next canvas from the posterior of uniform corruption, given this canvas and the
    model's draw of the clean one (D3PM, https://arxiv.org/abs/2107.03006): at each position the
    draw, the token that stands there, or a random one."""
    draw, steps = prediction.draw, canvas.settings.max_denoising_steps
    step = min(canvas.step, steps)
    to_draw, to_stay = ddim_posterior(step, steps, canvas.vocab)
    same = canvas.tokens == draw
    # Where canvas and draw agree, staying and taking the draw are one.
    u = canvas.noise.uniform(canvas.index, canvas.turn, len(canvas))
    agree_draw, _ = ddim_posterior(step, steps, canvas.vocab, agree=True)
    take = u < mx.where(same, agree_draw, to_draw)
    stay = ~take & ~same & (u < to_draw + to_stay)
    tokens = mx.where(take, draw, mx.where(stay, canvas.tokens, _fresh(canvas)))
    return Proposal(tokens, tokens == draw, prediction.argmax)


def ddim_posterior(
    step: int, steps: int, vocab: int, *, agree: bool = False
) -> tuple[float, float]:
    """Probability of the draw and of the standing token after step `step` (from 1) of `steps`,
    where the two differ or `agree`; the rest is spread evenly over the whole vocabulary."""
    before = (step - 1) / steps  # share of clean tokens, rising
    after = step / steps
    kept = before / after
    uniform_kept, uniform_clean = (1 - kept) / vocab, (1 - after) / vocab
    # Weight of token k: (kept·[k stands] + uniform_kept) · (after·[k drawn] + uniform_clean).
    spread = uniform_kept * uniform_clean * vocab
    if agree:
        both = (kept + uniform_kept) * (after + uniform_clean) - uniform_kept * uniform_clean
        return both / (both + spread), 0.0
    drawn, stands = uniform_kept * after, kept * uniform_clean
    total = drawn + stands + spread
    return drawn / total, stands / total


SAMPLERS: dict[str, Sampler] = {
    "entropy-bound": entropy_bound,
    "confidence-threshold": confidence_threshold,
    "block-refinement": block_refinement,
    "ddim": discrete_ddim,
}


def _fresh(canvas: Canvas) -> mx.array:
    """[C] noise for the positions that the next pass does not accept."""
    return canvas.noise.renoise(canvas.index, canvas.turn, len(canvas), canvas.vocab)

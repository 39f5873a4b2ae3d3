"""One canvas, denoised step by step for a client who pins positions, changes others and looks at
further tokens that the model finds likely.

Everything follows from the request: the same request with other changes behind a step gives the
same canvas up to that step. So a canvas can be forked at any of its steps, and nothing is kept for
a client.

Letters: C canvas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diffusion.canvas import Canvas
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import FREE, Layout
from mlx_diffgemma.diffusion.denoiser import InFlight, denoise
from mlx_diffgemma.diffusion.encode import encode as encode_prefix
from mlx_diffgemma.diffusion.generate import cut
from mlx_diffgemma.diffusion.noise import SeededNoise
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.model.cache import Prefix
from mlx_diffgemma.model.diffusion_gemma import CanvasView
from mlx_diffgemma.server.jobs import Seat
from mlx_diffgemma.text.prompt import Encoded

_AT_ONCE = 16  # positions whose logits are held at a time
_BEHIND = 16  # frames that a client has not read, from which some are left out


@dataclass(frozen=True)
class Change:
    """What is changed on a canvas behind one of its steps.

    Attributes:
        after: steps run before it; 0 is the start.
        pins: by position, the token that it holds from then on, or None to let it go.
        start, stop: first position that may become noise, and the one behind the last.
        strength: probability from 0 to 1 that such a position becomes noise.
        seed: seed of the noise from then on, or None to keep it.
        step: the step of the schedule to go on with, or None to go on as before.
    """

    after: int
    pins: Mapping[int, int | None] = field(default_factory=dict)
    start: int = 0
    stop: int = 0
    strength: float = 1.0
    seed: int | None = None
    step: int | None = None


@dataclass(frozen=True)
class CanvasAsked:
    """One canvas behind a prompt.

    Attributes:
        encoded: the prompt.
        config: how it is denoised; its canvas has `length` positions.
        length: positions of the canvas, C.
        seed: what every random draw follows from.
        index: number of the canvas, which its draws also follow from.
        initial: the tokens [C] that it starts from; None starts from noise.
        allowed: the tokens that free positions may hold; empty for all.
        changes: in the order of their steps.
        frames: whether the client gets a frame after every step.
        reads: whether the last step gives the probabilities at temperature 1 of all positions.
        look: positions whose likeliest tokens at step `at` are the whole result; empty for none.
        at: the step that `look` is about, from 1.
        top: how many of the likeliest tokens are given for a position.
        wanted: tokens that are given for a position whether they are likely or not.
    """

    encoded: Encoded
    config: DiffusionConfig
    length: int
    seed: int
    index: int = 0
    initial: tuple[int, ...] | None = None
    allowed: tuple[int, ...] = ()
    changes: tuple[Change, ...] = ()
    frames: bool = False
    reads: bool = False
    look: tuple[int, ...] = ()
    at: int = 0
    top: int = 8
    wanted: tuple[int, ...] = ()


def canvas_work(seat: Seat, asked: CanvasAsked) -> Iterator[dict[str, Any]]:
    """The frames of a canvas and what it came to, or the alternatives at one of its steps."""
    yield from _Run(seat, asked).told()


class _Run:
    def __init__(self, seat: Seat, asked: CanvasAsked) -> None:
        self.seat, self.asked = seat, asked
        self.vocab = seat.model.config.text.vocab_size
        self.words = Vocabulary(seat.tokenizer, self.vocab, asked.config.eos_token_ids)

    def told(self) -> Iterator[dict[str, Any]]:
        asked = self.asked
        for _ in encode_prefix(self.seat.model, self.seat.cache, asked.encoded.ids, room=0):
            pass
        prefix = self.seat.cache.prefix
        canvas = self._changed(self._started())
        most = None
        if asked.look:
            most = max(1, asked.at) - 1
        elif asked.reads:
            most = asked.config.max_denoising_steps - 1
        if most is None or most > 0:
            for stepped in self._stepped(canvas, prefix, most):
                canvas = stepped
                if asked.frames and self.seat.backlog < _BEHIND:
                    yield {"type": "diffusion_frame", **self._frame(canvas)}
        if asked.look:
            found = self._alternatives(canvas, prefix, asked.look, canvas.temperature)
            yield {"object": "canvas.alternatives", "step": canvas.passes + 1, "positions": found}
        elif asked.reads:
            found = self._alternatives(canvas, prefix, range(asked.length), 1.0)
            ids = [each["alternatives"][0]["id"] for each in found]
            yield {
                "object": "canvas",
                "step": canvas.passes + 1,
                "ids": ids,
                **self._texts(ids),
                "positions": found,
                **self._usage(),
            }
        else:
            yield {"object": "canvas", **self._frame(canvas), **self._usage()}

    def _started(self) -> Canvas:
        asked = self.asked
        return Canvas.start(
            asked.config,
            SeededNoise(asked.seed),
            asked.index,
            asked.length,
            self.vocab,
            layout=self._layout([FREE] * asked.length),
            initial=asked.initial,
        )

    def _layout(self, tokens: Sequence[int]) -> Layout:
        allowed = self.asked.allowed
        free = [place for place, token in enumerate(tokens) if token == FREE]
        return Layout(tuple(tokens), {}, dict.fromkeys(free, allowed) if allowed else {})

    def _stepped(self, canvas: Canvas, prefix: Prefix, most: int | None) -> Iterator[Canvas]:
        """The canvas after each step, until `most` steps are run or it is done."""

        def following(name: object, stepped: Canvas) -> InFlight | None:
            if most is not None and stepped.passes >= most:
                return None
            changed = self._changed(stepped)
            return None if changed.done else InFlight(changed, prefix)

        for stepped in denoise(self.seat.denoiser, {0: InFlight(canvas, prefix)}, following):
            yield self._changed(stepped[0]) if stepped[0].passes == most else stepped[0]

    def _changed(self, canvas: Canvas) -> Canvas:
        """The canvas with the changes that come behind as many steps as it has run."""
        for change in self.asked.changes:
            if change.after == canvas.passes:
                canvas = self._change(canvas, change)
        return canvas

    def _change(self, canvas: Canvas, change: Change) -> Canvas:
        if change.seed is not None:
            canvas = replace(canvas, noise=SeededNoise(change.seed))
        if change.step is not None:
            canvas = replace(canvas, first_step=change.step - canvas.passes)
        if change.stop > change.start:
            coins = np.array(canvas.noise.uniform(canvas.index, canvas.passes, len(canvas)))
            places = np.arange(len(canvas))
            noisy = (places >= change.start) & (places < change.stop) & (coins < change.strength)
            fresh = canvas.noise.initial(canvas.index + 1, len(canvas), self.vocab)
            canvas = replace(canvas, tokens=mx.where(mx.array(noisy), fresh, canvas.tokens))
            if canvas.soft_embeddings is not None:
                # The soft embeddings of these positions would bring the old text back.
                soft = mx.where(mx.array(noisy)[:, None], 0.0, canvas.soft_embeddings)
                canvas = replace(canvas, soft_embeddings=soft.astype(canvas.soft_embeddings.dtype))
        assert canvas.layout is not None
        tokens = list(canvas.layout.tokens)
        for place, token in change.pins.items():
            tokens[place] = FREE if token is None else token
        return replace(
            canvas.under(self._layout(tokens)), done=False, converged=False, descent=None
        )

    def _frame(self, canvas: Canvas) -> dict[str, Any]:
        known = canvas.passes > 0
        ids = np.array(canvas.draft if known else canvas.tokens).tolist()
        return {
            "step": canvas.passes,
            "total": canvas.settings.max_denoising_steps,
            "ids": ids,
            **self._texts(ids),
            "entropy": canvas.entropy.tolist() if known else None,
            "probability": canvas.probability.tolist() if known else None,
            "accepted": canvas.accepted.tolist(),
            "next": canvas.tokens.tolist(),
            "done": canvas.done,
            "converged": canvas.converged,
        }

    def _texts(self, ids: Sequence[int]) -> dict[str, Any]:
        kept = cut(ids, self.asked.config.eos_token_ids, len(ids))[0]
        names = self.words
        return {
            "texts": [names.pieces[token].decode(errors="replace") for token in ids],
            "text": names.decode(kept),
        }

    def _alternatives(
        self, canvas: Canvas, prefix: Prefix, places: Sequence[int], temperature: float
    ) -> list[dict[str, Any]]:
        """What the next step over a canvas finds likeliest at some positions."""
        self.seat.cache.rest()  # waits for a turn on the engine's thread
        model, asked = self.seat.model, self.asked
        view = CanvasView(canvas.tokens, prefix, canvas.soft_embeddings)
        hidden = model.decode([view])
        allowed = mx.array(asked.allowed, mx.int32) if asked.allowed else None
        found: list[dict[str, Any]] = []
        for first in range(0, len(places), _AT_ONCE):
            some = list(places[first : first + _AT_ONCE])
            rows = hidden[mx.array(some)]
            logits = model.logits(rows) if allowed is None else model.logits_of(rows, allowed)
            logits = logits / temperature
            log_p = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            found += [self._position(place, row) for place, row in zip(some, log_p, strict=True)]
        return found

    def _position(self, place: int, log_p: np.ndarray) -> dict[str, Any]:
        allowed = self.asked.allowed
        best = np.argsort(-log_p, kind="stable")[: self.asked.top].tolist()
        ids = [allowed[n] for n in best] if allowed else best
        told = [self._likely(token, float(log_p[n])) for token, n in zip(ids, best, strict=True)]
        entropy = float(-(np.exp(log_p) * log_p).sum())
        position = {"position": place, "entropy": max(0.0, entropy), "alternatives": told}
        if self.asked.wanted:
            at = {token: n for n, token in enumerate(allowed)} if allowed else None
            position["wanted"] = [
                self._likely(token, float(log_p[token if at is None else at[token]]))
                for token in self.asked.wanted
                if at is None or token in at
            ]
        return position

    def _likely(self, token: int, log_p: float) -> dict[str, Any]:
        text = self.words.pieces[token].decode(errors="replace")
        return {"id": token, "text": text, "probability": float(np.exp(log_p)), "logprob": log_p}

    def _usage(self) -> dict[str, Any]:
        count, known = len(self.asked.encoded.ids), self.seat.cached_tokens
        return {
            "seed": self.asked.seed,
            "usage": {
                "prompt_tokens": count,
                "completion_tokens": self.asked.length,
                "total_tokens": count + self.asked.length,
                "prompt_tokens_details": {"cached_tokens": min(known, count)},
            },
        }

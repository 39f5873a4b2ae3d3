"""A mock model whose logits follow from what the loop hands over, and a naive loop beside it.

The mock's prediction depends on the prefix that was encoded, the canvas, the soft embeddings of the
step before and the temperature, so that handing over the wrong one changes the result. Everything
is computed row by row in numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diffusion.canvas import Canvas, Passed, Prediction
from mlx_diffgemma.diffusion.noise import SeededNoise
from mlx_diffgemma.model.cache import LayerPrefix, Prefix, PrefixCache

VOCAB, LENGTH, HIDDEN = 37, 9, 5


class MockModel:
    """Keeps the encoded token ids themselves in the prefix: one layer of one head of size one."""

    def __init__(self) -> None:
        text = SimpleNamespace(vocab_size=VOCAB)
        self.config = SimpleNamespace(text=text, canvas_length=LENGTH)
        self.dtype, self.adapted, self.adaptations = mx.float32, False, 0
        self.prefill_step_size, self.never_drawn = 512, ()
        self.encoded: list[list[int]] = []

    def make_cache(self) -> PrefixCache:
        return PrefixCache(Prefix((), (LayerPrefix(),)), self.identity)

    def identity(self) -> str:
        return "mock"

    def encode(self, ids: Sequence[Sequence[int]], prefixes: Sequence[Prefix]):
        longer = []
        for row, prefix in zip(ids, prefixes, strict=True):
            self.encoded.append(list(row))
            states = mx.array(row, mx.float32)[None, None, :, None]
            layer, _, _ = prefix.layers[0].extended(states, states, prefix.room)
            longer.append(replace(prefix, ids=(*prefix.ids, *row), layers=(layer,)))
        return None, tuple(longer)


def states_of(prefix: Prefix) -> list[int]:
    """The token ids that a `MockModel` encoded into a prefix, read from its states."""
    if not prefix.layers[0].length:
        return []
    keys, values = prefix.layers[0].held()
    assert mx.array_equal(keys, values)
    return np.array(keys)[0, 0, :, 0].astype(int).tolist()


class MockPredict:
    """Counts its calls; `peak` makes it more certain with every step, 0 never."""

    def __init__(self, seed: int = 0, peak: float = 1.0, nan_at: int | None = None) -> None:
        self.seed, self.peak, self.nan_at = seed, peak, nan_at
        self.calls = 0
        self.canvases: list[list[list[int]]] = []

    def __call__(self, canvases: Sequence[Canvas], prefixes: Sequence[Prefix]) -> list[Passed]:
        self.calls += 1
        self.canvases.append([canvas.tokens.tolist() for canvas in canvases])
        found = []
        for canvas, prefix in zip(canvases, prefixes, strict=True):
            assert canvas.layout is None
            soft = canvas.soft_embeddings
            argmax, draw, entropy, soft = self.row(
                states_of(prefix),
                np.array(canvas.tokens),
                None if soft is None else np.array(soft),
                canvas.temperature,
                np.array(canvas.noise.draw_key(canvas.index, canvas.turn)),
            )
            if self.calls == self.nan_at and canvas is canvases[-1]:
                entropy[3] = np.nan
            prediction = Prediction(
                argmax=mx.array(argmax),
                probability=mx.array(np.exp(-entropy / 2)),
                draw=mx.array(draw),
                entropy=mx.array(entropy),
                confidence=mx.array(np.exp(-entropy)),
                soft_embeddings=None if canvas.is_last_step else mx.array(soft),
                dropped_mass=mx.zeros_like(mx.array(entropy)),
            )
            found.append(Passed(prediction))
        return found

    def row(self, prefix, canvas, soft, temperature, key):
        """argmax [C], draw [C], entropy [C], soft embeddings [C, D] of one row."""
        rng = np.random.default_rng([self.seed, *prefix])
        logits = rng.normal(0, 2.0, (LENGTH, VOCAB))  # what this prefix calls for
        coupling = np.random.default_rng(self.seed).normal(0, 0.6, (VOCAB, VOCAB))
        table = np.random.default_rng(self.seed + 1).normal(0, 1.0, (VOCAB, HIDDEN))
        logits += coupling[canvas] + coupling.T[np.roll(canvas, 1)]
        if soft is not None:
            # How sure the model was grows with the memory of the last step.
            logits = logits * (1 + self.peak * np.linalg.norm(soft, axis=-1)[:, None])
            logits += 0.5 * self.peak * soft @ table.T
        logits = logits / temperature
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        u = np.random.default_rng(key.tolist()).random((LENGTH, 1))
        draw = (p.cumsum(-1) < u).sum(-1).clip(max=VOCAB - 1)
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
        return (
            logits.argmax(-1).astype(np.int32),
            draw.astype(np.int32),
            entropy.astype(np.float32),
            (p @ table).astype(np.float32),
        )


class Told:
    """Predicts what it is told to: for each canvas a draft and its entropies a pass."""

    def __init__(self, rows) -> None:
        self.rows = rows

    def __call__(self, canvases, prefixes):
        return [
            Passed(
                Prediction(
                    argmax=mx.array(steps[canvas.passes][0].astype(np.int32)),
                    probability=mx.ones((len(canvas),)),
                    draw=canvas.tokens,
                    entropy=mx.array(steps[canvas.passes][1].astype(np.float32)),
                    confidence=mx.ones((len(canvas),)),
                    soft_embeddings=mx.zeros((len(canvas), 2)),
                    dropped_mass=mx.zeros((len(canvas),)),
                )
            )
            for canvas, steps in zip(canvases, self.rows, strict=True)
        ]


def naive_generate(predict: MockPredict, prompt: list[int], settings, seed: int, row: int):
    """One sequence by the book, a position at a time, without any code of the loop but its noise.

    Returns the tokens, the finish reason, and for each canvas its steps as (draft, accepted, next
    canvas) lists.
    """
    noise = SeededNoise(seed, row)
    prefix, tokens, history = list(prompt), [], []
    total = settings.max_denoising_steps
    while True:
        index = len(history)
        canvas = noise.initial(index, LENGTH, VOCAB).tolist()
        soft, drafts, steps = None, [], []
        for n in range(total, 0, -1):
            step = total - n + 1
            temperature = settings.t_min + (settings.t_max - settings.t_min) * n / total
            key = np.array(noise.draw_key(index, step))
            argmax, draw, entropy, soft = predict.row(
                prefix, np.array(canvas), soft, temperature, key
            )
            random = np.array(noise.renoise(index, step, LENGTH, VOCAB))
            accepted, spent = [False] * LENGTH, 0.0
            for place in sorted(range(LENGTH), key=lambda i: entropy[i]):
                if spent > settings.entropy_bound:
                    break
                accepted[place] = True
                spent += float(entropy[place])
            canvas = [int(draw[i] if accepted[i] else random[i]) for i in range(LENGTH)]
            drafts.append(argmax.tolist())
            steps.append((drafts[-1], accepted, canvas))
            needed = settings.stability_threshold
            stable = len(drafts) > needed and all(
                drafts[-1 - back] == drafts[-1] for back in range(1, needed + 1)
            )
            if stable and sum(map(float, entropy)) / LENGTH < settings.confidence_threshold:
                break
        history.append(steps)
        for token in drafts[-1]:
            if token in settings.eos_token_ids:
                return tokens, "stop", history
            tokens.append(token)
            if len(tokens) == settings.max_tokens:
                return tokens, "length", history
        prefix += drafts[-1]

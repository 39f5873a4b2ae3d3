"""What one model over several processes must do as in one; `ranks.py` runs these on rank 0."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from ranks import Pair
from text.gemma_like import build

from mlx_diffgemma.diffusion.canvas import Canvas
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.denoiser import Denoiser, InFlight, denoise
from mlx_diffgemma.diffusion.encode import encode
from mlx_diffgemma.diffusion.events import Finished
from mlx_diffgemma.diffusion.generate import generate_canvases
from mlx_diffgemma.diffusion.noise import SeededNoise, seeded
from mlx_diffgemma.distributed.traffic import Traffic, step_traffic
from mlx_diffgemma.editing.decide import decide
from mlx_diffgemma.editing.edit import edit
from mlx_diffgemma.editing.infill import infill
from mlx_diffgemma.editing.structured import generate_structured
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.kernels.rows import Row
from mlx_diffgemma.model.cache import PrefixCache
from mlx_diffgemma.model.diffusion_gemma import CanvasView, DiffusionGemma
from mlx_diffgemma.pictured import PicturedIds, PictureSpan

IMAGE = 6
SEEDS = 20
CONFIG = DiffusionConfig(max_tokens=24, max_denoising_steps=4, eos_token_ids=(1,))

APART: list[float] = []  # the differences that a check has met


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(7, 400, length).tolist()


def cached(model: DiffusionGemma, ids: list[int], **settings: Any) -> PrefixCache:
    cache = model.make_cache()
    for _ in encode(model, cache, ids, **settings):
        pass
    return cache


def close(pair: tuple[Any, Any], share: float = 1e-5) -> None:
    """Two results are apart by no more than a share of the largest number in them."""
    expected, found = (np.array(each, np.float64) for each in pair)
    largest = np.abs(expected).max()
    assert largest > 1e-2
    APART.append(float(np.abs(found - expected).max() / largest))
    np.testing.assert_allclose(found, expected, rtol=0, atol=share * largest)


def view(model: DiffusionGemma, cache: PrefixCache, length: int, seed: int) -> CanvasView:
    tokens = mx.array(prompt(length, seed + 90), mx.int32)
    width = model.config.text.hidden_size
    values = np.random.default_rng(seed).normal(size=(length, width)).astype(np.float32)
    return CanvasView(tokens, cache.prefix, mx.array(values) if seed % 2 else None)


def logits(pair: Pair) -> None:
    """Prompts beyond the window and in pieces, canvases of several lengths together, and a part of
    a canvas whose other positions are seen as they were."""
    places = np.array([1, 2, 5])

    def seen(model: DiffusionGemma) -> mx.array:
        caches = [cached(model, prompt(length), step_size=11) for length in (50, 3)]
        views = [view(model, cache, 9 + n, n) for n, cache in enumerate(caches)]
        hidden, kept = model.decode_keeping(views)
        some = [replace(views[1], places=places, layers=kept[1], tokens=views[1].tokens + 1)]
        return model.logits(mx.concatenate([hidden, model.decode([*some, views[0]])]))

    close(pair.both(seen))


def predictions(pair: Pair) -> None:
    """Everything that a pass over the vocabulary answers, with masks, bound tokens and both ways
    to sum soft embeddings."""
    words = np.random.default_rng(1).integers(0, 2**32, 13, dtype=np.uint32)
    few = np.random.default_rng(2).random(9) < 0.5
    key = mx.array([3, 4], mx.uint32)
    rows = [
        Row(9, 0.7, key, allowed={2: words, 5: words}, soft_cutoff=3.0, likely=few),
        Row(10, 0.5, fixed=np.where(np.arange(10) == 4, 17, -1).astype(np.int32)),
        Row(3, 0.6, key, need_soft=False),
    ]
    standing = mx.array(prompt(22), mx.int32)

    def seen(model: DiffusionGemma) -> Any:
        cache = cached(model, prompt(20))
        views = [view(model, cache, row.length, n) for n, row in enumerate(rows)]
        hidden = model.decode(views)
        return model.predict(hidden, rows, standing), model.predict(hidden[:9], rows[:1])

    for expected, found in zip(*pair.both(seen), strict=True):
        assert found.argmax.tolist() == expected.argmax.tolist()
        assert found.draw.tolist() == expected.draw.tolist()
        assert len(set(expected.draw.tolist())) > 3
        for name in ("entropy", "log_sum", "draw_log_probability", "soft_embeddings"):
            close((getattr(expected, name), getattr(found, name)))


def trajectories(pair: Pair) -> None:
    """Token for token in every step, of canvases of 20 seeds behind two prefixes together."""

    def drafts(model: DiffusionGemma) -> list[Any]:
        behind = [cached(model, prompt(length)).prefix for length in (30, 5)]
        vocab = model.config.text.vocab_size
        flight = {
            seed: InFlight(Canvas.start(CONFIG, SeededNoise(seed), 0, 24, vocab), behind[seed % 2])
            for seed in range(SEEDS)
        }

        def following(seed: int, canvas: Canvas) -> InFlight | None:
            return None if canvas.done else InFlight(canvas, behind[seed % 2])

        return [
            {seed: (c.draft.tolist(), c.tokens.tolist()) for seed, c in stepped.items()}
            for stepped in denoise(Denoiser(model), flight, following)
        ]

    expected, found = pair.both(drafts)
    assert found == expected and len(expected) > 3
    assert len({str(draft) for draft, _ in expected[-1].values()}) == len(expected[-1]) > 3


def generations(pair: Pair) -> None:
    """Canvases that are committed one behind the other, in a batch and alone: with soft embeddings
    that are cut short, and with drafts that the encoder confirms."""
    for each in (
        {"max_tokens": 40},
        {"soft_cutoff": 4.0},
        {"encoder_check": 0.01, "check_below": 1e4},
    ):
        config = CONFIG.override(**each)

        def written(model: DiffusionGemma, config: DiffusionConfig = config) -> Any:
            *_, last = generate_canvases(model, [prompt(12), prompt(3)], config, seeded(5))
            assert isinstance(last, Finished)
            return last.tokens, last.steps, last.encodings

        expected, found = pair.both(written)
        assert found == expected


def prefixes(pair: Pair) -> None:
    """A prefix that is marked, cut back, continued, and continued otherwise; and one that two hold
    while it grows."""
    ids = prompt(60)

    def seen(model: DiffusionGemma) -> mx.array:
        cache = model.make_cache()
        states = []

        def look(some: PrefixCache, seed: int) -> None:
            hidden = model.decode([view(model, some, 7, seed)])
            states.append(hidden)

        for step, tokens in enumerate([
            ids[:40],  # marked at 8 and 25
            ids[:25] + prompt(20, 3),  # back to the mark at 25
            ids[:8] + prompt(5, 4),  # and to that at 8, whose windows are whole
            ids[:6] + prompt(4, 5),  # and before it
            ids[:3],
            ids[:50],
        ]):  # fmt: skip
            for _ in encode(model, cache, tokens, step_size=9, marks=(8, 25), room=64):
                pass
            look(cache, step)
        other = cache.snapshot()
        for some, more in ((cache, prompt(13, 6)), (other, prompt(11, 7)), (cache, prompt(3, 8))):
            for _ in encode(model, some, [*ids[:50], *more]):
                pass
            look(some, 1)
        look(other, 1)
        cache.clear()
        for _ in encode(model, cache, ids[:5]):
            pass
        look(cache, 1)
        return mx.concatenate(states)

    close(pair.both(seen))


def pictures(pair: Pair) -> None:
    """What stands for a picture comes from rank 0."""
    shown = PictureSpan(4, 9, "a"), PictureSpan(30, 35, "b")
    plain = prompt(45)
    ids = PicturedIds(
        [IMAGE if any(s.start <= n < s.stop for s in shown) else t for n, t in enumerate(plain)],
        shown,
    )
    width = pair.whole.config.text.hidden_size
    values = {
        span.key: mx.array(np.random.default_rng(n).normal(size=(5, width)).astype(np.float32))
        for n, span in enumerate(shown)
    }

    def seen(model: DiffusionGemma) -> mx.array:
        model.embed_picture = lambda span: values[span.key]  # type: ignore[method-assign]
        cache = cached(model, ids, step_size=20)
        first = model.decode([view(model, cache, 6, 1)])
        other = PicturedIds(
            [*ids[:20], *ids[4:9], *ids[9:15]], [shown[0], PictureSpan(20, 25, "b")]
        )
        for _ in encode(model, cache, other):
            pass
        return mx.concatenate([first, model.decode([view(model, cache, 6, 1)])])

    close(pair.both(seen))


def editing(pair: Pair) -> None:
    settings = {"raw": True, "seed": 3, "max_denoising_steps": 5}

    def edited(model: DiffusionGemma) -> Any:
        filled = infill(model, build(), "a[[?]]b", lengths=[2, 3], prompt="x", **settings)
        rewritten = edit(model, build(), "ab\nab a\nb", "change it", (2, 2), **settings)
        return filled.text, rewritten.text

    expected, found = pair.both(edited)
    assert found == expected


def structured(pair: Pair) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}}

    def written(model: DiffusionGemma) -> Any:
        done = generate_structured(
            model, build(), "x", 60, raw=True, json_schema=schema, seed=2,
            max_denoising_steps=4,
        )  # fmt: skip
        return done.tokens

    expected, found = pair.both(written)
    assert found == expected and len(expected) > 5


QUESTIONS = {
    "spam": {"type": "noul", "instructions": "It is spam."},
    "tone": {"type": "choice", "criteria": {"angry": None, "calm": None, "glad": None}},
}


def decisions(pair: Pair) -> None:
    def decided(model: DiffusionGemma) -> Any:
        asked = partial(decide, model, build(), "x", QUESTIONS, seed=7, raw=True)
        return [
            answer.probabilities
            for found in (asked(draws=2), asked(steps=3), asked(separate=True))
            for answer in found.answers.values()
        ]

    for expected, found in zip(*pair.both(decided), strict=True):
        close((expected, found))


def refusals(pair: Pair) -> None:
    """A prefix that several ranks hold is not saved, and one that they do not hold not used."""
    cache = cached(pair.ours, prompt(5))
    with tempfile.TemporaryDirectory() as folder:
        refused(partial(cache.save, Path(folder) / "x.safetensors"), "several Macs hold")
    foreign = cached(pair.whole, prompt(5)).prefix
    refused(partial(pair.ours.encode, [[7]], [foreign]), "not encoded by all the Macs")
    refused(partial(pair.ours.encode, [[]], [cache.prefix]), "empty row")
    span = PictureSpan(5, 9, "a")
    seen = {span: mx.zeros((3, pair.ours.config.text.hidden_size))}
    refused(partial(pair.ours.encode, [[7] * 9], [cache.prefix], [seen]), "has 4 places")


def refused(use: Callable[[], Any], why: str) -> None:
    try:
        use()
    except UsageError as error:
        assert why in str(error), error
    else:
        raise AssertionError(f"it was not refused: {why}")


def counted(pair: Pair) -> None:
    """Messages and bytes of a step are those of the formula."""
    exchange, model = pair.exchange, pair.ours
    cache = cached(model, prompt(10))
    row = Row(24, 0.8, mx.array([1, 2], mx.uint32))
    for seed in (0, 1):
        before = exchange.messages, exchange.bytes
        one = view(model, cache, 24, seed)
        mx.eval(model.predict(model.decode([one]), [row], one.tokens).draw)
        found = Traffic(exchange.messages - before[0], exchange.bytes - before[1])
        expected = step_traffic(pair.share, 24, 4, is_first=seed == 0)
        assert found == expected, (found, expected)

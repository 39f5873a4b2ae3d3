"""A race among rules with a real model, and what is made of its outcome."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_diffgemma.bench.counting import Weights, layers_cost, vocabulary_cost
from mlx_diffgemma.bench.device import measure_device
from mlx_diffgemma.bench.random_model import formats_of
from mlx_diffgemma.chart import Chart, linear_axis
from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.diffusion.events import CanvasCommitted, Finished, PrefillProgress
from mlx_diffgemma.diffusion.generate import generate_canvases
from mlx_diffgemma.diffusion.noise import seeded
from mlx_diffgemma.fitting import configured, fit_to_context
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.text.answer import Answer
from mlx_diffgemma.text.prompt import encode
from mlx_diffgemma.tune.asks import Ask
from mlx_diffgemma.tune.candidates import REFERENCE, Settings
from mlx_diffgemma.tune.ledger import Trial
from mlx_diffgemma.tune.race import Outcome

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_COLOURS = ("#26a", "#e90", "#084", "#848", "#c44", "#555")
_PREFIX = 512  # tokens before the canvas whose floor is given


class ModelAnswers:
    """Answers prompts with a model under any settings, one prompt at a time, as a user would wait
    for them."""

    def __init__(
        self, model: DiffusionGemma, tokenizer: TokenizerWrapper, max_tokens: int | None
    ) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens

    def __call__(self, settings: Settings, ask: Ask, seed: int) -> Trial:
        asked = encode(self.tokenizer, ask.prompt)
        given: dict[str, Any] = {**settings, "max_tokens": self.max_tokens}
        config = configured(self.model, self.tokenizer, REFERENCE, **given)
        configs = fit_to_context(self.model, [asked.ids], config)
        answer = Answer(self.tokenizer, thinking=asked.thinking, prompt=asked.ids)
        text, started, finished = asked.prefill, time.perf_counter(), None
        with memory.wired():
            for event in generate_canvases(self.model, [asked.ids], configs, seeded(seed)):
                if isinstance(event, PrefillProgress):
                    started = time.perf_counter()
                elif isinstance(event, CanvasCommitted):
                    text += answer.add(event.tokens, event.finish_reason, event.stop_token).text
                elif isinstance(event, Finished):
                    finished = event
        assert finished is not None
        passes = sum(finished.steps[0]) + finished.encodings[0]
        return Trial(text, passes, len(finished.steps[0]), time.perf_counter() - started)


def floor_seconds(model: DiffusionGemma) -> float:
    """Seconds that a pass over one canvas takes at least here, at the device's measured peaks."""
    weights = Weights(model.config, formats_of(model), model.dtype.size)
    canvas = model.config.canvas_length
    cost = layers_cost(weights, canvas, _PREFIX) + vocabulary_cost(weights, canvas)
    seconds = measure_device(model.dtype).floor(cost)
    mx.clear_cache()
    return seconds


def measured(outcome: Outcome) -> dict[str, Any]:
    """What a profile's file says of how it was found."""
    return {
        "rule": outcome.chosen,
        "chosen": asdict(outcome.of(outcome.chosen)),
        "reference": asdict(outcome.of(REFERENCE)),
    }


def chart(outcome: Outcome, way: str) -> Chart:
    """The mark of each rule over the passes that it takes, with two standard errors of its
    difference from the reference; a grey line is the reference's mark."""
    standings = outcome.standings
    own = outcome.of(REFERENCE)
    low = min(0.0, *(each.mark - 2 * each.error for each in standings))
    drawn = Chart(
        linear_axis("passes an answer", 0.0, max(each.passes for each in standings)),
        linear_axis(f"mark by {way}", low, 1.0),
    )
    drawn.line([(0.0, own.mark), (max(each.passes for each in standings), own.mark)], "#bbb")
    for each, colour in zip(standings, cycle(_COLOURS), strict=False):
        low, high = each.mark - 2 * each.error, each.mark + 2 * each.error
        drawn.line([(each.passes, low), (each.passes, min(high, 1.0))], colour)
        drawn.dot(each.passes, each.mark, colour)
        name = f"{each.name} (chosen)" if each.name == outcome.chosen else each.name
        drawn.text(drawn.x(each.passes) + 7, drawn.y(each.mark) - 6, name, colour=colour)
    return drawn


def rows(outcome: Outcome, asks: Sequence[Ask]) -> list[tuple[str, ...]]:
    """The row of a table for each rule: name, prompts, mark, difference ± error, passes an answer,
    passes a canvas, seconds an answer, milliseconds a pass, verdict."""
    own = outcome.of(REFERENCE)
    found: list[tuple[str, ...]] = []
    for each in outcome.standings:
        if each.name == outcome.chosen:
            verdict = "chosen"
        elif each.name == REFERENCE:
            verdict = "the reference"
        elif each.broken or (each.count == len(asks) and not each.holds):
            verdict = "breaks answers"
        elif each.passes >= own.passes:
            verdict = "takes no fewer passes"
        else:
            verdict = "more passes than others" if each.count < len(asks) else "holds"
        found.append(
            (
                each.name,
                f"{each.count}",
                f"{each.mark:.3f}",
                f"{each.difference:+.3f} ± {each.error:.3f}",
                f"{each.passes:.1f}",
                f"{each.passes / each.canvases:.2f}",
                f"{each.seconds:.2f}",
                f"{1e3 * each.seconds / each.passes:.0f}",
                verdict,
            )
        )
    return found

"""A request in company is the request alone: whoever joins or leaves, whenever, however unlike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
from demo_checkpoint import demo_config, demo_weights, two_puzzles
from tiny_models import make_config, make_model, make_weights

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.cpu.vocabulary import tiled_pass
from mlx_diffgemma.diffusion.canvas import Canvas
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import FREE, Layout, token_mask
from mlx_diffgemma.diffusion.denoiser import Denoiser, InFlight, denoise
from mlx_diffgemma.diffusion.events import Finished
from mlx_diffgemma.diffusion.generate import generate_canvases
from mlx_diffgemma.diffusion.noise import SeededNoise
from mlx_diffgemma.diffusion.profiles import profile_settings
from mlx_diffgemma.errors import NumericalError
from mlx_diffgemma.kernels.materialized import whole_pass
from mlx_diffgemma.kernels.vocabulary import vocabulary_pass
from mlx_diffgemma.model.cache import LayerPrefix, Prefix


@dataclass(frozen=True)
class Request:
    """One request: what it asks, and the step of the others at which it joins them."""

    prompt: list[int]
    settings: DiffusionConfig
    noise: SeededNoise
    length: int
    layout: Layout | None
    joins: int
    canvases: int


def requests(config: ModelConfig, prompts: list[list[int]], eos: tuple[int, ...]) -> list[Request]:
    """Eight that differ in everything that a request may differ in."""
    vocab = config.text.vocab_size
    own = config.canvas_length
    changes = [
        {},
        {"sampler": "confidence-threshold", "accept_threshold": 0.7, "t_max": 1.1},
        {**profile_settings("turbo"), "confident_after": 6},
        {"sampler": "block-refinement", "max_denoising_steps": 7},
        {"sampler": "ddim", "max_denoising_steps": 9, "t_min": 0.1, "t_max": 0.5},
        {**profile_settings("balanced"), "entropy_bound": 2.0, "stability_threshold": 0},
        {**profile_settings("fast"), "confident_after": 3, "t_min": 0.9, "t_max": 0.9},
        {"entropy_bound": 0.4, "confidence_threshold": 0.3, "soft_cutoff": 4.0},
    ]
    lengths = [own, own - 3, own, own, own // 2, own + 5, 5, own]
    made = []
    for n, (prompt, change, length) in enumerate(zip(prompts, changes, lengths, strict=True)):
        layout = None
        if n in (3, 5, 7):
            allowed = {3: token_mask(range(7, 30), vocab), 4: token_mask([9, 12], vocab)}
            layout = Layout((7, FREE, 8, *[FREE] * (length - 3)), allowed if n != 3 else {})
        settings = DiffusionConfig(max_denoising_steps=12, eos_token_ids=eos).override(**change)
        made.append(
            Request(prompt, settings, SeededNoise(n % 3, n // 2), length, layout, 2 * n, 1 + n % 2)
        )
    return made


def started(request: Request, index: int, vocab: int) -> Canvas:
    return Canvas.start(
        request.settings, request.noise, index, request.length, vocab, layout=request.layout
    )


class Company:
    """Runs requests together, each from its own moment on: `following` brings in those whose time
    has come, and puts the next canvas of a request in the place of one that is done."""

    def __init__(self, model, requests: list[Request]) -> None:
        self.model, self.requests = model, requests
        self.vocab = model.config.text.vocab_size
        self.prefixes: dict[int, Prefix] = {}
        self.steps: dict[int, list[Canvas]] = {n: [] for n in range(len(requests))}
        self.together: list[int] = []

    def join(self, n: int) -> InFlight:
        request = self.requests[n]
        (self.prefixes[n],) = self.model.encode([request.prompt], [self.model.empty_prefix()])[1]
        return InFlight(started(request, 0, self.vocab), self.prefixes[n])

    def run(self) -> dict[int, list[Canvas]]:
        """By `Denoiser.step`, as a server would: whoever is there is stepped."""
        denoiser, flight, time = Denoiser(self.model), {}, 0
        while flight or any(request.joins >= time for request in self.requests):
            for n, request in enumerate(self.requests):
                if request.joins == time:
                    flight[n] = self.join(n)
            time += 1
            if not flight:
                continue
            self.together.append(len(flight))
            stepped = denoiser.step(
                [each.canvas for each in flight.values()],
                [each.prefix for each in flight.values()],
            )
            for n, canvas in zip(list(flight), stepped, strict=True):
                self.steps[n].append(canvas)
                following = self.following(n, canvas)
                if following is None:
                    del flight[n]
                else:
                    flight[n] = following
        return self.steps

    def following(self, n: int, canvas: Canvas) -> InFlight | None:
        if not canvas.done:
            return InFlight(canvas, self.prefixes[n])
        if canvas.index + 1 == self.requests[n].canvases:
            return None
        row = canvas.draft.tolist()
        (self.prefixes[n],) = self.model.encode([row], [self.prefixes[n]])[1]
        return InFlight(started(self.requests[n], canvas.index + 1, self.vocab), self.prefixes[n])


def alone(model, request: Request) -> list[Canvas]:
    """By `denoise`, the loop of every driver, in no company at all."""
    company = Company(model, [replace(request, joins=0)])
    steps: list[Canvas] = []
    flight = {0: company.join(0)}
    for stepped in denoise(Denoiser(model), flight, company.following):
        steps.append(stepped[0])
    return steps


def same_tokens(one: Canvas, other: Canvas) -> bool:
    return (
        one.tokens.tolist() == other.tokens.tolist()
        and one.draft.tolist() == other.draft.tolist()
        and one.accepted.tolist() == other.accepted.tolist()
        and (one.passes, one.done, one.converged) == (other.passes, other.done, other.converged)
    )


@pytest.fixture(scope="module")
def demo():
    return make_model(ModelConfig.from_dict(demo_config()), demo_weights())


def demo_prompts() -> list[list[int]]:
    long = [two_puzzles(seed) for seed in range(8)]
    cuts = [0, 30, 0, 45, 5, 0, 60, 17]  # some with the beginning left out
    return [[prompt[0], *prompt[1 + cut :]] for prompt, cut in zip(long, cuts, strict=True)]


def test_each_of_eight_requests_equals_itself_alone_on_the_demo_model(demo):
    """Token for token: every step of every canvas."""
    asked = requests(demo.config, demo_prompts(), (1, 5))
    company = Company(demo, asked)
    steps = company.run()
    assert max(company.together) >= 4 and len(set(company.together)) > 3
    assert len({len(request.prompt) for request in asked}) > 3
    for n, request in enumerate(asked):
        expected = alone(demo, request)
        assert len(steps[n]) == len(expected)
        for step, (found, own) in enumerate(zip(steps[n], expected, strict=True)):
            assert same_tokens(found, own), (n, step)
        if request.layout is not None:
            fixed = request.layout.fixed
            assert (steps[n][-1].draft[fixed != FREE] == fixed[fixed != FREE]).all()


@pytest.mark.parametrize("seed", range(3))
def test_each_of_eight_requests_equals_itself_alone_to_rounding(seed):
    """On random models, whose draws rounding may tip. Compared is what a step predicts of canvases
    that start it alike."""
    raw = make_config(seed, sliding_window=9)
    config = ModelConfig.from_dict(raw)
    model = make_model(config, make_weights(config, seed, gain=2.0, feedback=0.05))
    rng = np.random.default_rng(seed)
    prompts = [
        rng.integers(7, config.text.vocab_size, length).tolist()
        for length in (3, 40, 1, 17, 9, 25, 8, 60)
    ]
    asked = requests(config, prompts, ())
    found = Company(model, asked).run()
    compared = 0
    for n, request in enumerate(asked):
        for one, other in zip(found[n], alone(model, request), strict=False):
            np.testing.assert_allclose(one.entropy, other.entropy, rtol=2e-3, atol=2e-4)
            if one.soft_embeddings is not None and other.soft_embeddings is not None:
                scale = np.abs(np.array(other.soft_embeddings)).max() + 1e-6
                difference = np.array(one.soft_embeddings - other.soft_embeddings)
                assert np.abs(difference).max() < 2e-3 * scale
            compared += 1
            if not same_tokens(one, other):
                break
    assert compared >= 60


def test_who_is_in_the_batch_changes_nothing_in_any_order(demo):
    """The same canvas as the first, in the middle and as the last of a batch, and twice in it."""
    asked = requests(demo.config, demo_prompts(), (1, 5))
    company = Company(demo, asked)
    flights = [company.join(n) for n in range(8)]
    alone_each = [Denoiser(demo).step([f.canvas], [f.prefix])[0] for f in flights]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2, 0], list(range(8)), list(reversed(range(8)))):
        stepped = Denoiser(demo).step(
            [flights[n].canvas for n in order], [flights[n].prefix for n in order]
        )
        for n, canvas in zip(order, stepped, strict=True):
            assert same_tokens(canvas, alone_each[n]), (order, n)


@pytest.mark.parametrize("form", [whole_pass, tiled_pass, vocabulary_pass])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_canvas_that_is_not_finite_spoils_no_other(demo, form, value, monkeypatch):
    """It is told of by itself, and the others become what they become alone."""
    monkeypatch.setattr(demo, "vocabulary_pass", form)
    prompts = demo_prompts()[:3]
    settings = DiffusionConfig(max_denoising_steps=6)
    vocab, length = demo.config.text.vocab_size, demo.config.canvas_length
    prefixes = [demo.encode([prompt], [demo.empty_prefix()])[1][0] for prompt in prompts]
    canvases = [Canvas.start(settings, SeededNoise(n), 0, length, vocab) for n in range(3)]
    alone_each = [Denoiser(demo).step([c], [p])[0] for c, p in zip(canvases, prefixes, strict=True)]
    keys, values = prefixes[1].layers[0].held()
    broken, _, _ = LayerPrefix().extended(keys, mx.full(values.shape, value), 0)
    prefixes[1] = replace(prefixes[1], layers=(broken, *prefixes[1].layers[1:]))
    outcomes = Denoiser(demo).queue(canvases, prefixes).each()
    assert isinstance(outcomes[1], NumericalError)
    assert str(outcomes[1]).startswith("canvas 1, step 1: the model returned NaN or infinity")
    for n in (0, 2):
        assert isinstance(outcomes[n], Canvas) and same_tokens(outcomes[n], alone_each[n])
    with pytest.raises(NumericalError, match=r"^canvas 1, step 1"):
        Denoiser(demo).step(canvases, prefixes)


def test_two_requests_may_hold_one_prefix(demo):
    """Canvases that continue the same prefix are denoised in one batch, and grow apart."""
    prompt = two_puzzles(3)
    (shared,) = demo.encode([prompt], [demo.empty_prefix()])[1]
    vocab, length = demo.config.text.vocab_size, demo.config.canvas_length
    settings = DiffusionConfig(max_denoising_steps=6)
    canvases = [Canvas.start(settings, SeededNoise(n), 0, length, vocab) for n in range(3)]
    stepped = Denoiser(demo).step(canvases, [shared] * 3)
    for canvas, together in zip(canvases, stepped, strict=True):
        own = demo.encode([prompt], [demo.empty_prefix()])[1]
        assert same_tokens(Denoiser(demo).step([canvas], own)[0], together)
    assert len({tuple(canvas.draft.tolist()) for canvas in stepped}) > 1


def test_a_batch_of_sequences_equals_each_alone(demo):
    """Through the driver: each with its own length of answer, settings, seed, reason and steps."""
    prompts = demo_prompts()[:4]
    configs = [
        DiffusionConfig(max_tokens=tokens, eos_token_ids=(1, 5)).override(**profile_settings(name))
        for tokens, name in ((128, "balanced"), (20, "exact"), (70, "turbo"), (128, "fast"))
    ]
    noises = [SeededNoise(9, 0), SeededNoise(4, 3), SeededNoise(9, 2), SeededNoise(1, 0)]

    def finished(rows: list[int]) -> Finished:
        events: Iterator = generate_canvases(
            demo,
            [prompts[row] for row in rows],
            [configs[row] for row in rows],
            lambda row: noises[rows[row]],
        )
        *_, last = events
        assert isinstance(last, Finished)
        return last

    together = finished([0, 1, 2, 3])
    for row in range(4):
        own = finished([row])
        assert own.tokens[0] == together.tokens[row]
        assert own.finish_reasons[0] == together.finish_reasons[row]
        assert own.stop_tokens[0] == together.stop_tokens[row]
        assert own.steps[0] == together.steps[row]
    assert len(together.tokens[1]) <= 20


def test_a_canvas_of_few_candidates_draws_the_same_beside_a_free_one(tiny_model):
    model = tiny_model(3)
    denoiser, size = Denoiser(model), model.config.text.vocab_size
    length, prefix = model.config.canvas_length, model.empty_prefix()
    prefix = model.encode([[9, 10, 11]], [prefix])[1][0]
    few = Layout((7, FREE, FREE, *[8] * (length - 3)), candidates={1: (9, 30, 12), 2: (40, 41)})
    settings = DiffusionConfig(max_denoising_steps=4)
    canvases = [
        Canvas.start(settings, SeededNoise(4, row), 0, length, size, layout=layout)
        for row, layout in enumerate((None, few, None))
    ]
    together, alone = list(canvases), list(canvases)
    for step in range(2):
        together = denoiser.step(together, [prefix] * 3)
        alone = [denoiser.step([canvas], [prefix])[0] for canvas in alone]
        for one, other in zip(together, alone, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            # Self-conditioning on an untrained model makes rounding errors grow tenfold a step.
            assert np.allclose(one.entropy, other.entropy, atol=1e-4 * 10**step)
    held = together[1].draft.tolist()
    assert held[0] == 7 and held[1] in (9, 30, 12) and held[2] in (40, 41)

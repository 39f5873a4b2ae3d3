"""What a constrained canvas gains and costs on the demo model, choice by choice.

    python scripts/bench_constraints.py --count 200            # every variant of the mechanism
    python scripts/bench_constraints.py --count 500 --only "as shipped"

Each puzzle's givens are pinned in the canvas; the prompt is the bare word `sudoku`. Puzzles are
fresh: made from `--seed`, the same for every variant. What a constraint costs in time is shown by
`mlx-diffgemma bench --constraints`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma import load
from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.diffusion.canvas import Canvas, Passed
from mlx_diffgemma.diffusion.config import SAMPLERS
from mlx_diffgemma.diffusion.constraints import FREE, Layout, token_mask
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.diffusion.events import Finished
from mlx_diffgemma.diffusion.generate import generate_canvases
from mlx_diffgemma.diffusion.noise import seeded
from mlx_diffgemma.diffusion.predict import Predictor
from mlx_diffgemma.diffusion.profiles import PROFILES, profile_settings
from mlx_diffgemma.fitting import diffusion_config
from mlx_diffgemma.model.cache import Prefix
from mlx_diffgemma.text.prompt import encode_prompt


class PinnedAtFirst(Layout):
    """Fixed tokens enter the first canvas and the draft; renoising may overwrite them."""

    def pin(self, tokens: mx.array) -> mx.array:
        first = not hasattr(self, "_pinned")
        object.__setattr__(self, "_pinned", True)
        return super().pin(tokens) if first else tokens


class EveryPositionCounts(Layout):
    """Fixed positions count in the stop rule."""

    @property
    def open(self) -> np.ndarray:
        return np.ones(self.fixed.shape, bool)

    def pin(self, tokens: mx.array) -> mx.array:
        return mx.where(mx.array(self.fixed == FREE), tokens, mx.array(self.fixed))


class NoiseWithin(Layout):
    """Restricted positions are renoised from what they may hold."""

    def pin(self, tokens: mx.array) -> mx.array:
        canvas = np.array(tokens)
        for place, mask in self.allowed.items():
            may = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            if canvas[place] not in may:  # a token's number in its set picks another
                canvas[place] = may[canvas[place] % len(may)]
        return super().pin(mx.array(canvas))


class Unconstrained(Predictor):
    """Fixed tokens enter every canvas, but not what the model predicts."""

    def __call__(self, canvases: Sequence[Canvas], prefixes: Sequence[Prefix]) -> list[Passed]:
        return super().__call__([replace(each, layout=None) for each in canvases], prefixes)


class _OfTheModel(Predictor):
    """Predictions under the layout, but for one field, which is as the model has it without."""

    name: str

    def __call__(self, canvases: Sequence[Canvas], prefixes: Sequence[Prefix]) -> list[Passed]:
        bound = super().__call__(canvases, prefixes)
        free = super().__call__([replace(each, layout=None) for each in canvases], prefixes)
        mixed = []
        for ours, others in zip(bound, free, strict=True):
            values = {self.name: getattr(others.prediction, self.name)}
            mixed.append(replace(ours, prediction=replace(ours.prediction, **values)))
        return mixed


class SoftOfTheModel(_OfTheModel):
    """Fixed positions tell the next step what the model believes of them."""

    name = "soft_embeddings"


class EntropyOfTheModel(_OfTheModel):
    """Fixed positions take of the entropy bound what the model is unsure of them."""

    name = "entropy"


@dataclass(frozen=True)
class Variant:
    """What is pinned, and how."""

    kind: type[Layout] = Layout
    predictor: type[Predictor] = Predictor
    tail: str = "eos"  # what holds behind the answer: "eos", "pad" or "free"
    newlines: bool = True  # whether the line ends are pinned as well
    digits: bool = False  # whether blanks are restricted to digits
    settings: tuple[tuple[str, Any], ...] = ()


VARIANTS: dict[str, Variant] = {
    "as shipped": Variant(),
    "tail of pads": Variant(tail="pad"),
    "tail free": Variant(tail="free"),
    "givens only": Variant(tail="free", newlines=False),
    "pinned in the first canvas only": Variant(PinnedAtFirst),
    "self-conditioning not one-hot": Variant(predictor=SoftOfTheModel),
    "pinned positions take of the bound": Variant(predictor=EntropyOfTheModel),
    "neither, nor the draft one-hot": Variant(predictor=Unconstrained),
    "pinned positions count in the stop": Variant(EveryPositionCounts),
    "blanks restricted to digits": Variant(digits=True),
    "  and renoised within digits": Variant(NoiseWithin, digits=True),
}
VARIANTS |= {f"sampler {name}": Variant(settings=(("sampler", name),)) for name in SAMPLERS[1:]}
VARIANTS |= {
    f"profile {name}": Variant(settings=tuple(profile_settings(name).items()))
    for name in PROFILES
    if profile_settings(name)
}


def layout(
    puzzle: sudoku.Puzzle, variant: Variant, encode: Callable, length: int, vocab: int, eos: int
) -> Layout:
    """The givens of a puzzle in a canvas of `length`."""
    tails = {"eos": eos, "pad": 0, "free": FREE}
    tokens = [tails[variant.tail]] * length
    allowed = {}
    for place, (character, token) in enumerate(
        zip(puzzle.givens, encode(puzzle.givens), strict=True)
    ):
        blank = character == sudoku.BLANK or (character == "\n" and not variant.newlines)
        tokens[place] = FREE if blank else token
        if variant.digits and blank:
            allowed[place] = token_mask(encode("123456"), vocab)
    return variant.kind(tuple(tokens), allowed)


def measure(
    model: Any, tokenizer: Any, puzzles: list[sudoku.Puzzle], variant: Variant, batch: int
) -> dict[str, float]:
    """Share of puzzles solved exactly, and steps a canvas."""
    config = diffusion_config(
        model, max_tokens=model.config.canvas_length, **dict(variant.settings)
    )
    prompt = encode_prompt(tokenizer, sudoku.BARE_PROMPT)
    length, vocab = model.config.canvas_length, model.config.text.vocab_size
    exact, valid, steps, kept = 0, 0, [], 0
    start = time.perf_counter()
    for first in range(0, len(puzzles), batch):
        some = puzzles[first : first + batch]
        layouts = [
            layout(
                puzzle,
                variant,
                lambda text: tokenizer.encode(text, add_special_tokens=False),
                length,
                vocab,
                config.eos_token_ids[-1],
            )
            for puzzle in some
        ]
        finished = None
        for event in generate_canvases(
            model,
            [prompt] * len(some),
            config,
            seeded(first),
            denoiser=Denoiser(model, variant.predictor(model)),
            constrain=lambda row, index, layouts=layouts: layouts[row],
        ):
            finished = event
        assert isinstance(finished, Finished)
        for puzzle, tokens, count in zip(some, finished.tokens, finished.steps, strict=True):
            text = tokenizer.decode([token for token in tokens if token])
            exact += text == puzzle.solution
            valid += sudoku.is_valid_grid(text)
            kept += all(
                a == b for a, b in zip(puzzle.givens, text, strict=False) if a != sudoku.BLANK
            ) and len(text) >= len(puzzle.givens)
            steps.append(count[0])
    total = len(puzzles)
    return {
        "exact": exact / total,
        "error": math.sqrt(max(exact / total * (1 - exact / total), 1e-9) / total),
        "valid": valid / total,
        "kept": kept / total,
        "steps": float(np.mean(steps)),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--only", action="append", choices=list(VARIANTS))
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    rng = np.random.default_rng(arguments.seed)
    puzzles = [sudoku.make_puzzle(rng) for _ in range(arguments.count)]
    print(f"{'variant':36} {'exact':>6} {'±':>6} {'valid':>6} {'kept':>6} {'steps':>6} {'s':>6}")
    for name in arguments.only or VARIANTS:
        found = measure(model, tokenizer, puzzles, VARIANTS[name], arguments.batch)
        print(
            f"{name:36} {found['exact']:6.3f} {found['error']:6.3f} {found['valid']:6.3f} "
            f"{found['kept']:6.3f} {found['steps']:6.2f} {found['seconds']:6.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

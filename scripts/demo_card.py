"""The card of a model that `train_demo.py` made: its data, recipe and figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from demo_recipe import Recipe
    from exercises.exam import Marks

_FRONT = """---
library_name: mlx
pipeline_tag: text-generation
license: apache-2.0
tags:
- text-diffusion
- diffusion-gemma
- mlx
---
"""
_TEXT = """
# A small DiffusionGemma that solves sudokus

{parameters:.1f}M parameters in bf16, trained from nothing by `scripts/train_demo.py` of
mlx-diffgemma. It proves the machinery (training, conversion, generation, editing) from end to end.
It says nothing about the quality of the released 26B model, with which it shares the architecture
and no weight.

**Data.** Fresh exercises from the generators of `scripts/exercises/tasks.py`, one token a
character. Seen: {seen:,} examples; the mix of the last sitting was {shares}.

**Recipe** of the last sitting.
Muon at {recipe.rate:g} for matrices, Adam at a tenth of that for the rest;
{recipe.batch} examples a step;
rates constant, then linear to nothing over the last {recipe.decay:.0%} of all examples;
exercises grow to full difficulty over the first {recipe.ramp:.0%};
corruption by uniform tokens with t ~ U(0.01, 1), in a quarter of the examples as one span;
self-conditioning in half of them;
no loss on the encoder.

**Figures.** Exact answers to {count} fresh inputs a task (seed {seed}), default settings:

| task | exact | steps a canvas | tokens a forward |
|---|---|---|---|
{rows}
"""


def card(
    recipe: Recipe, parameters: int, seen: int, marks: Mapping[str, Marks], count: int, seed: int
) -> str:
    """The content of `README.md`.

    Args:
        parameters, seen: of the model, and examples.
        marks: by task, of `count` inputs each, made from `seed`.
    """
    total = sum(recipe.shares.values())
    shares = [f"{part / total:.0%} {name}" for name, part in recipe.shares.items() if part]
    rows = [
        f"| {name} | {mark.rate:.3f} ± {mark.standard_error:.3f} "
        f"| {mark.steps_per_canvas:.2f} | {mark.tokens_per_forward:.1f} |"
        for name, mark in marks.items()
    ]
    return _FRONT + _TEXT.format(
        recipe=recipe,
        parameters=parameters / 1e6,
        seen=seen,
        shares=", ".join(shares),
        count=count,
        seed=seed,
        rows="\n".join(rows),
    )

"""A mixed recipe of a wanted size: more bits go to the modules that lose most by having fewer.

Each group of modules (one class in one layer) is quantized alone to each format, and the
divergence of the canvas logits from the source's is its sensitivity. From the best format
everywhere, the group whose smaller format costs the least divergence per byte saved goes down,
until the size fits. Divergences are taken to add up, which they do nearly while they are small.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_diffgemma.checkpoint.names import (
    QUANTIZABLE_CLASSES,
    expected_shapes,
    is_quantizable,
    module_class,
    module_path,
)
from mlx_diffgemma.checkpoint.quantization import Format
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma_convert.measure import Reference

FORMATS = ("none", "8bit", "6bit", "5bit", "4bit", "3bit", "2bit")


@dataclass(frozen=True)
class Group:
    """The modules of one class in one layer.

    Attributes:
        selector: the group as `--set` spells it.
        paths: paths of its modules.
        weights: number of their weights.
        formats: formats that fit all of its modules, from the largest to the smallest.
    """

    selector: str
    paths: tuple[str, ...]
    weights: int
    formats: tuple[Format, ...]

    def nbytes(self, fmt: Format) -> float:
        return self.weights * fmt.bits_per_weight / 8


@dataclass(frozen=True)
class Choice:
    """A mixed recipe.

    Attributes:
        formats: format of each group, by its selector.
        nbytes: bytes of the whole model.
        expected_kl: sum of the divergences of all groups, in nats.
    """

    formats: Mapping[str, Format]
    nbytes: int
    expected_kl: float


def groups_of(model: DiffusionGemma) -> list[Group]:
    """The groups of a model, in the order of its layers."""
    members: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in expected_shapes(model.config).items():
        if is_quantizable(name, len(shape)):
            path = module_path(name)
            kind = module_class(path)
            layered = path.startswith("model.decoder.layers.")
            selector = f"layers[{path.split('.')[3]}].{kind}" if layered else kind
            members.setdefault(selector, []).append((path, shape))
    groups = []
    for selector, found in members.items():
        fitting = [
            f for f in map(Format.parse, FORMATS) if all(_fits(f, shape) for _, shape in found)
        ]
        weights = sum(prod(shape) for _, shape in found)
        groups.append(Group(selector, tuple(p for p, _ in found), weights, tuple(fitting)))
    return groups


def _fits(fmt: Format, shape: tuple[int, ...]) -> bool:
    return not fmt.quantized or shape[-1] % fmt.group_size == 0


def sensitivities(
    model: DiffusionGemma,
    groups: Sequence[Group],
    reference: Reference,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[tuple[str, Format], float]:
    """Divergence in nats of the model with one group in one format and all else as it is, by the
    group's selector and the format. The model is as before afterwards.

    Raises:
        UsageError: the model is quantized, so there is nothing to compare with.
    """
    modules = dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
    found: dict[tuple[str, Format], float] = {}
    for group in groups:
        if any("scales" in modules[path] for path in group.paths):
            raise UsageError("--budget needs the original weights; the source is quantized.")
        originals = {path: modules[path].weight for path in group.paths}
        for fmt in group.formats:
            if not fmt.quantized:
                found[group.selector, fmt] = 0.0
                continue
            progress(f"{group.selector} in {fmt.name}")
            for path, weight in originals.items():
                modules[path].weight = _rounded(weight, fmt)
            found[group.selector, fmt] = reference.compare(model).mean
        for path, weight in originals.items():
            modules[path].weight = weight
    return found


def _rounded(weight: mx.array, fmt: Format) -> mx.array:
    """A weight after it was quantized to a format and dequantized again."""
    packed = mx.quantize(weight.astype(mx.bfloat16), **fmt.parameters)
    back = mx.dequantize(*packed, **fmt.parameters).astype(weight.dtype)
    mx.eval(back)
    return back


def choose(
    groups: Sequence[Group], costs: Mapping[tuple[str, Format], float], fixed: int, budget: int
) -> Choice:
    """Choose the formats of all groups greedily, so that the model fits in `budget` bytes.

    `costs` holds the divergences that `sensitivities` gives; `fixed` bytes go to what is never
    quantized.

    Raises:
        UsageError: even the smallest formats do not fit.
    """
    place = {group.selector: 0 for group in groups}
    size = fixed + sum(group.nbytes(group.formats[0]) for group in groups)
    smallest = fixed + sum(group.nbytes(group.formats[-1]) for group in groups)
    if budget < smallest:
        raise UsageError(
            f"a budget of {budget:,} bytes is below the smallest possible, {int(smallest):,}; "
            "raise it."
        )
    while size > budget:
        best = None
        for group in groups:
            now = group.formats[place[group.selector]]
            for step in range(place[group.selector] + 1, len(group.formats)):
                then = group.formats[step]
                saved = group.nbytes(now) - group.nbytes(then)
                price = costs[group.selector, then] - costs[group.selector, now]
                if best is None or price / saved < best[0]:
                    best = price / saved, group.selector, step, saved
        assert best is not None  # the budget is not below the smallest
        _, selector, step, saved = best
        place[selector], size = step, size - saved
    formats = {group.selector: group.formats[place[group.selector]] for group in groups}
    expected = sum(costs[group.selector, formats[group.selector]] for group in groups)
    return Choice(formats, int(size), expected)


def rules_of(choice: Choice) -> list[str]:
    """The choice as rules: for each class, the format of most of its groups, then the
    exceptions."""
    rules = []
    for kind in QUANTIZABLE_CLASSES:
        of_kind = {s: f for s, f in choice.formats.items() if s.rpartition(".")[2] == kind}
        if not of_kind:
            continue
        usual, _ = Counter(of_kind.values()).most_common(1)[0]
        rules.append(f"{kind}={usual.name}")
        rules += [f"{s}={f.name}" for s, f in of_kind.items() if f != usual]
    return rules


def save_recipe(path: Path, name: str, rules: Sequence[str]) -> None:
    """Write a recipe that `--recipe FILE` reads."""
    path.write_text(json.dumps({"name": name, "rules": list(rules)}, indent=2) + "\n")

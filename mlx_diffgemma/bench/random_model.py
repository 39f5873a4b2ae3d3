"""A model with random weights in given shapes, quantized or not, made in little memory.

How long a step takes depends on the shapes of the weights, not on their values. But the values are
chosen so that the model predicts as a trained one does halfway: a few likely tokens a position.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_diffgemma import cpu
from mlx_diffgemma.checkpoint.names import expected_shapes, is_quantizable, module_path
from mlx_diffgemma.checkpoint.quantization import RECIPES, Format, Recipe, Rule
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

_CHUNK = 1 << 24  # most weights to make at a time
_LOGIT_SPREAD = 4.0  # standard deviation of the logits before softcap and temperature


def default_dtype() -> mx.Dtype:
    """The type in which this machine is fast: MLX has fast products of float32 alone on a CPU."""
    return mx.float32 if cpu.is_device() else mx.bfloat16


def chosen_dtype(name: str | None) -> mx.Dtype:
    """The type of that name; None takes the machine's.

    Raises:
        UsageError: there is no such type.
    """
    if name is None:
        return default_dtype()
    if name not in DTYPES:
        raise UsageError(f"--dtype '{name}' is unknown; known are {', '.join(DTYPES)}.")
    return DTYPES[name]


def chosen_recipe(bits: int | None, recipe: str | None) -> Recipe:
    """The recipe that puts all modules in `bits`, or a recipe of the converter by its name. Where
    both are None, the weights stay unquantized.

    Raises:
        UsageError: both are given, or there is no such format or recipe.
    """
    if bits is not None and recipe is not None:
        raise UsageError("--bits and --recipe both say how to quantize: drop one.")
    if bits is not None:
        return Recipe(f"{bits} bits", (Rule("all", Format.make(bits=bits)),))
    if recipe is None:
        return Recipe("unquantized", ())
    if recipe not in RECIPES:
        raise UsageError(f"--recipe '{recipe}' is unknown; known are {', '.join(RECIPES)}.")
    return RECIPES[recipe]


def random_model(
    config: ModelConfig, recipe: Recipe, dtype: mx.Dtype, seed: int = 0
) -> DiffusionGemma:
    """A `DiffusionGemma` with random weights in `recipe`'s formats and activations in `dtype`.

    Raises:
        UsageError: a format's groups do not divide the rows of a module.
    """
    shapes = expected_shapes(config)
    model, formats = _unfilled(config, recipe)
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    for key, (name, shape) in zip(keys, shapes.items(), strict=True):
        weights = dict(_random(name, shape, formats.get(module_path(name)), dtype, key))
        mx.eval(weights)
        model.load_weights(list(weights.items()), strict=False)
    model.eval()
    return model


def blank_model(config: ModelConfig, recipe: Recipe, dtype: mx.Dtype) -> DiffusionGemma:
    """A `DiffusionGemma` whose weights are all zero and take no memory, in `recipe`'s formats and
    with activations in `dtype`: what a model asks of the device follows from shapes alone.

    Raises:
        UsageError: a format's groups do not divide the rows of a module.
    """
    model, _ = _unfilled(config, recipe)

    def blank(weight: mx.array) -> mx.array:
        kind = dtype if mx.issubdtype(weight.dtype, mx.floating) else weight.dtype
        return mx.broadcast_to(mx.array(0, kind), weight.shape)

    model.update(tree_map(blank, model.parameters()))
    mx.eval(model.parameters())
    model.eval()
    return model


def twin_of(model: DiffusionGemma) -> DiffusionGemma:
    """Another model on the same arrays, as it is before any form is put into it: one of them may be
    compiled while the other is not, and no weight is held twice."""
    formats = formats_of(model)
    twin = DiffusionGemma(model.config)
    nn.quantize(twin, class_predicate=lambda path, _: _parameters(formats.get(path)))
    twin.load_weights(list(tree_flatten(model.parameters())))
    twin.eval()
    return twin


def _unfilled(config: ModelConfig, recipe: Recipe) -> tuple[DiffusionGemma, dict[str, Format]]:
    """A model whose weights are still to come, and the formats of those that are quantized."""
    shapes, layers = expected_shapes(config), config.text.num_hidden_layers
    formats: dict[str, Format] = {}
    for name, shape in shapes.items():
        path = module_path(name)
        if is_quantizable(name, len(shape)) and recipe.format_for(path, layers).quantized:
            formats[path] = recipe.format_for(path, layers)
            if shape[-1] % formats[path].group_size:
                raise UsageError(
                    f"{path} has {shape[-1]} columns, which groups of "
                    f"{formats[path].group_size} do not divide; leave --bits and --recipe out."
                )
    model = DiffusionGemma(config)
    nn.quantize(model, class_predicate=lambda path, _: _parameters(formats.get(path)))
    return model, formats


def formats_of(model: DiffusionGemma) -> dict[str, Format]:
    """The format of every quantized module, by its path."""
    return {
        path: Format(module.mode, module.bits, module.group_size)
        for path, module in model.named_modules()
        if hasattr(module, "bits")
    }


def weight_bytes(model: DiffusionGemma) -> int:
    """Bytes of all parameters."""
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def _parameters(fmt: Format | None) -> bool | dict[str, object]:
    return False if fmt is None else fmt.parameters


def _random(
    name: str, shape: tuple[int, ...], fmt: Format | None, dtype: mx.Dtype, key: mx.array
) -> Iterator[tuple[str, mx.array]]:
    """The parameter `name`, or its packed weight, scales and biases."""
    if len(shape) == 1:
        value = _LOGIT_SPREAD if name == "model.decoder.norm.weight" else 1.0
        yield name, mx.full(shape, value, dtype)
        return
    spread = 1.0 if name.endswith("router.proj.weight") else shape[-1] ** -0.5
    # All experts get the weights of one: only their shapes matter, and there are many.
    experts, rows = (shape[0], shape[1:]) if len(shape) == 3 else (None, shape)
    step = max(1, _CHUNK // prod(rows[1:]))
    starts = range(0, rows[0], step)
    pieces: dict[str, list[mx.array]] = {}
    for start, part in zip(starts, mx.random.split(key, len(starts)), strict=True):
        size = (min(step, rows[0] - start), *rows[1:])
        bound = 3**0.5 * spread
        for suffix, array in _pack(mx.random.uniform(-bound, bound, size, dtype, part), fmt):
            mx.eval(array)
            pieces.setdefault(suffix, []).append(array)
    for suffix, arrays in pieces.items():
        whole = arrays[0] if len(arrays) == 1 else mx.concatenate(arrays)
        if experts is not None:
            whole = mx.contiguous(mx.repeat(whole[None], experts, axis=0))  # no view of one
        yield f"{module_path(name)}.{suffix}", whole


def _pack(block: mx.array, fmt: Format | None) -> Iterator[tuple[str, mx.array]]:
    if fmt is None:
        yield "weight", block
        return
    packed = mx.quantize(block, group_size=fmt.group_size, bits=fmt.bits, mode=fmt.mode)
    yield from zip(("weight", "scales", "biases"), packed, strict=False)

"""Fuse adapters into the weights. Letters: I input, O output, R rank, E experts."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_diffgemma.checkpoint.adapters import adapted_modules
from mlx_diffgemma.errors import UsageError


def fuse(model: nn.Module, *, dequantize: bool = False) -> None:
    """Replace every adapter of `model` by one layer that computes the same.

    A quantized layer is quantized again in its own format, which rounds what the adapter added;
    with `dequantize` it becomes a plain one instead.

    Raises:
        UsageError: the model has no adapters.
    """
    layers = []
    for path, module in adapted_modules(model).items():
        arrays = fused_arrays(module, dequantize=dequantize)
        layer = module.linear
        if dequantize and hasattr(layer, "bits"):
            layer = _plain_layer(layer, arrays["weight"])
        layer.update(arrays)
        layers.append((path, layer))
    if not layers:
        raise UsageError("the model has no adapters to fuse.")
    model.update_modules(tree_unflatten(layers))


def fused_arrays(
    module: nn.Module, *, dequantize: bool = False, dtype: mx.Dtype | None = None
) -> dict[str, mx.array]:
    """The parameters of the layer that does what an adapted layer does: `weight`, with `scales` and
    `biases` where it stays quantized. They are computed in float32 and stored in `dtype`, or in the
    layer's own type if None."""
    layer = module.linear
    quantized = hasattr(layer, "bits")
    if dtype is None:
        dtype = layer.weight.dtype if not quantized else _scale_type(layer)
    weight = _fused_weight(module).astype(dtype)
    if not quantized or dequantize:
        return {"weight": weight}
    arrays = mx.quantize(weight, layer.group_size, layer.bits, layer.mode)
    return dict(zip(("weight", "scales", "biases"), arrays, strict=False))


def _fused_weight(module: nn.Module) -> mx.array:
    """The weight [O, I], or [E, O, I] of experts, with its adapter added, in float32."""
    weight = plain_weight(module.linear)
    if weight.ndim == 3:  # A [E, R, I], B [E, O, R]
        return weight + module.scale * (module.lora_b @ module.lora_a)
    weight = weight + module.scale * (module.lora_b.T @ module.lora_a.T)
    if "m" not in module:
        return weight
    return (module.m / mx.linalg.norm(weight, axis=1))[:, None] * weight


def plain_weight(layer: nn.Module) -> mx.array:
    """The weight [O, I], or [E, O, I] of experts, of a layer, dequantized, in float32."""
    if not hasattr(layer, "bits"):
        return layer.weight.astype(mx.float32)
    affine = layer.mode == "affine"
    scales, biases = layer.scales, layer.get("biases")
    return mx.dequantize(
        layer.weight,
        scales.astype(mx.float32) if affine else scales,
        biases.astype(mx.float32) if affine and biases is not None else None,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=mx.float32,
    )


def _scale_type(layer: nn.Module) -> mx.Dtype:
    return layer.scales.dtype if layer.mode == "affine" else mx.float32


def _plain_layer(layer: nn.Module, weight: mx.array) -> nn.Module:
    *experts, outputs, inputs = weight.shape
    if isinstance(layer, QuantizedSwitchLinear):
        return SwitchLinear(inputs, outputs, experts[0], bias=False)
    return nn.Linear(inputs, outputs, bias=False)

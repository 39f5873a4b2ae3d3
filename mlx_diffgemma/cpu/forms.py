"""The forms that the modules of a model take on a CPU, put in the place of their own.

MLX's CPU back end is fast at float32 products of matrices and at sums, and slow at packed weights,
at gathered products and at exp, tanh and pow. Each form holds the weights of what it replaces under
the same names, so a checkpoint loads into either. A form in training computes with functions whose
gradients are fast, and whose results differ from those outside training by rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_diffgemma.cpu import differentiable
from mlx_diffgemma.cpu.expert_blocks import mix_experts
from mlx_diffgemma.cpu.layers import (
    DequantizedLinear,
    DequantizedSwitchLinear,
    DequantizedTable,
    GroupedSwitchLinear,
    dequantized,
)
from mlx_diffgemma.cpu.vocabulary import tiled_pass
from mlx_diffgemma.kernels.activation import softcap
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.vocabulary import vocabulary_pass
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.experts import Experts
from mlx_diffgemma.model.layers import MLP, SelfConditioning
from mlx_diffgemma.model.vision import VisionMLP

_PREFILL_STEP_SIZE = 512  # more tokens at a time gain nothing where products are slow


def use_forms(model: nn.Module) -> None:
    """Give `model` and all that is in it the forms for a CPU, weights unchanged."""
    for module in model.modules():
        if type(module) in _FORMS:
            module.__class__ = _FORMS[type(module)]
    if isinstance(model, DiffusionGemma):
        model.prefill_step_size = _PREFILL_STEP_SIZE
    if getattr(model, "vocabulary_pass", None) is vocabulary_pass:
        model.vocabulary_pass = tiled_pass


def eager_gelu(gate: mx.array, up: mx.array) -> mx.array:
    """GELU(gate) · up, with the tanh approximation."""
    return nn.gelu_approx(gate) * up


class _Gated(nn.Module):
    @property
    def activation(self) -> Callable[[mx.array, mx.array], mx.array]:
        return differentiable.gated_gelu if self.training else eager_gelu


class CpuMLP(_Gated, MLP):
    """A gated MLP whose activation in training has a fast gradient."""


class CpuVisionMLP(_Gated, VisionMLP):
    """A gated MLP of the vision tower whose activation in training has a fast gradient."""


class CpuSelfConditioning(_Gated, SelfConditioning):
    """Self-conditioning whose activation in training has a fast gradient."""


class CpuExperts(_Gated, Experts):
    """Experts that in training multiply blocks of rows, unless an adapter sits on them."""

    def __call__(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        if self.training and (dense := self._dense()) is not None:
            return mix_experts(x, chosen, weights, *dense, activation=self.activation)
        return super().__call__(x, chosen, weights)

    def _dense(self) -> tuple[mx.array, mx.array] | None:
        """The weights of both layers, unquantized; None where an adapter sits on either layer."""
        layers = (self.gate_up_proj, self.down_proj)
        if not all(isinstance(layer, (SwitchLinear, QuantizedSwitchLinear)) for layer in layers):
            return None
        gate_up, down = (
            dequantized(layer) if isinstance(layer, QuantizedSwitchLinear) else layer.weight
            for layer in layers
        )
        return gate_up, down


class CpuDiffusionGemma(DiffusionGemma):
    """The model, whose table multiplies by dequantized rows, and whose head in training is computed
    from polynomials with a fast gradient."""

    @property
    def table(self) -> EmbeddingTable:
        return DequantizedTable.of(self.model.decoder.embed_tokens, self.dtype)

    def logits(self, hidden: mx.array) -> mx.array:
        if not self.training:
            return super().logits(hidden)
        cap = self.config.text.final_logit_softcapping
        return softcap(self.table.product(hidden), cap, tanh=differentiable.tanh)

    def soft_embeddings(self, processed_logits: mx.array) -> mx.array:
        if not self.training:
            return super().soft_embeddings(processed_logits)
        weights = differentiable.softmax(processed_logits.astype(mx.float32)).astype(self.dtype)
        return (self.table.expected(weights) * self.table.scale).astype(self.dtype)


_FORMS: dict[type, type] = {
    nn.QuantizedLinear: DequantizedLinear,
    SwitchLinear: GroupedSwitchLinear,
    QuantizedSwitchLinear: DequantizedSwitchLinear,
    MLP: CpuMLP,
    VisionMLP: CpuVisionMLP,
    SelfConditioning: CpuSelfConditioning,
    Experts: CpuExperts,
    DiffusionGemma: CpuDiffusionGemma,
}

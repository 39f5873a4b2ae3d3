"""The blocks of the network. Letters: B batch, S positions, D hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_diffgemma.config import AttentionConfig, TextConfig
from mlx_diffgemma.kernels.activation import gated_gelu
from mlx_diffgemma.model.attention import Attention
from mlx_diffgemma.model.experts import Experts, Router

Attend = Callable[[Attention, mx.array], mx.array]
"""An attention and its input [B, S, D] -> what was attended to [B, S, D]; the caller of a layer
gives this function, for it knows which keys are in sight."""


class MLP(nn.Module):
    """Gated MLP with the tanh approximation of GELU, [..., D] -> [..., D]."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, width, bias=False)
        self.up_proj = nn.Linear(dim, width, bias=False)
        self.down_proj = nn.Linear(width, dim, bias=False)
        self.activation = gated_gelu

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.activation(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Attention, then a dense MLP and a mixture of experts side by side, each between two norms.

    The encoder and the decoder share all weights of a layer but the scalar by which its output is
    multiplied, so that one is an argument.
    """

    def __init__(self, config: TextConfig, sizes: AttentionConfig) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, sizes)
        self.mlp = MLP(dim, config.intermediate_size)
        self.router = Router(config)
        self.experts = Experts(config)
        self.input_layernorm = nn.RMSNorm(dim, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(dim, eps=eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(dim, eps=eps)
        self.post_feedforward_layernorm = nn.RMSNorm(dim, eps=eps)
        self.post_feedforward_layernorm_1 = nn.RMSNorm(dim, eps=eps)
        self.pre_feedforward_layernorm_2 = nn.RMSNorm(dim, eps=eps)
        self.post_feedforward_layernorm_2 = nn.RMSNorm(dim, eps=eps)
        self.layer_scalar = mx.ones((1,))
        self._compiled: Any = None

    def __call__(self, x: mx.array, attend: Attend, layer_scalar: mx.array) -> mx.array:
        """[B, S, D] -> [B, S, D]."""
        attended = attend(self.self_attn, self.input_layernorm(x))
        run = self.feed_forward if self._compiled is None or self.training else self._compiled
        return run(x, attended, layer_scalar)

    def feed_forward(self, x: mx.array, attended: mx.array, layer_scalar: mx.array) -> mx.array:
        """All that follows the attention, which has no state: [B, S, D] twice -> [B, S, D]."""
        h, dense, *mixture = self.before_experts(x, attended)
        return self.join(h, dense, self.experts(*mixture).reshape(h.shape), layer_scalar)

    def before_experts(self, x: mx.array, attended: mx.array) -> tuple[mx.array, ...]:
        """The residual and what the dense MLP adds to it, [B, S, D] each, and what the experts are
        called with."""
        h = x + self.post_attention_layernorm(attended)
        dense = self.mlp(self.pre_feedforward_layernorm(h))
        flat = h.reshape(-1, h.shape[-1])
        return h, dense, self.pre_feedforward_layernorm_2(flat), *self.router(flat)

    def join(
        self, h: mx.array, dense: mx.array, sparse: mx.array, layer_scalar: mx.array
    ) -> mx.array:
        """The residual, the output of the dense MLP and that of the experts -> [B, S, D]."""
        dense = self.post_feedforward_layernorm_1(dense)
        sparse = self.post_feedforward_layernorm_2(sparse)
        return (h + self.post_feedforward_layernorm(dense + sparse)) * layer_scalar

    def compile(self) -> None:
        """Run what follows the attention as one compiled function from now on, outside training."""
        # The weights are inputs: those of an adapter or of another checkpoint count at once.
        self._compiled = mx.compile(self.feed_forward, inputs=[self.state])


class SelfConditioning(nn.Module):
    """Adds what the previous step expected (soft embeddings) to the embeddings of the canvas."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        dim, width = config.hidden_size, config.intermediate_size
        self.pre_norm = nn.RMSNorm(dim, eps=config.rms_norm_eps)
        self.gate_proj = nn.Linear(dim, width, bias=False)
        self.up_proj = nn.Linear(dim, width, bias=False)
        self.down_proj = nn.Linear(width, dim, bias=False)
        self.activation = gated_gelu
        self._eps = config.rms_norm_eps

    def __call__(self, embeddings: mx.array, soft_embeddings: mx.array) -> mx.array:
        """[B, S, D] twice -> [B, S, D]."""
        return mx.fast.rms_norm(embeddings + self.signal(soft_embeddings), None, self._eps)

    def signal(self, soft_embeddings: mx.array) -> mx.array:
        """What is added to the embeddings: [B, S, D] -> [B, S, D]."""
        n = self.pre_norm(soft_embeddings)
        return self.down_proj(self.activation(self.gate_proj(n), self.up_proj(n)))

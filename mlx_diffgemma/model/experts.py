"""The mixture of experts. Letters: N tokens, D hidden, I expert width, E experts, K per token, P
pairs of token and expert."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_diffgemma.config import TextConfig
from mlx_diffgemma.kernels.activation import gated_gelu
from mlx_diffgemma.kernels.dispatch import Implementation
from mlx_diffgemma.kernels.expert_combine import expert_combine

_SORT_FROM = 64  # token-expert pairs from which sorting by expert pays


class Router(nn.Module):
    """Chooses experts from the raw residual (not from the normed input of the experts)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones((config.hidden_size,))
        self.per_expert_scale = mx.ones((config.num_experts,))
        self._top_k = config.top_k_experts
        self._eps = config.rms_norm_eps
        self._root = config.hidden_size**-0.5

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """[N, D] -> the experts of each token [N, K] and their weights [N, K] in float32."""
        normed = mx.fast.rms_norm(x, self.scale * self._root, self._eps)
        scores = self.proj(normed).astype(mx.float32)
        chosen = mx.argpartition(-scores, self._top_k - 1, axis=-1)[..., : self._top_k]
        chosen = mx.stop_gradient(chosen)
        # Probabilities over all experts, scaled to a sum of 1 among the chosen, equal these.
        weights = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1)
        # An expert whose score is NaN or -inf is not chosen, and would go unseen.
        poison = scores.sum(axis=-1, keepdims=True) * 0.0
        return chosen, weights * self.per_expert_scale[chosen] + poison


class Experts(nn.Module):
    """E gated MLPs; gate and up stay fused in one tensor, the gate first."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        dim, width, count = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.gate_up_proj = SwitchLinear(dim, 2 * width, count, bias=False)
        self.down_proj = SwitchLinear(width, dim, count, bias=False)
        self.activation = gated_gelu

    def __call__(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        """[N, D], the experts [N, K] of each token and their weights [N, K] -> [N, D]."""
        count, top_k = chosen.shape
        pairs = chosen.flatten()
        tokens = mx.arange(count * top_k, dtype=mx.uint32) // top_k
        sort = pairs.size >= _SORT_FROM
        if sort:
            order = mx.argsort(pairs)
            pairs, tokens = pairs[order], tokens[order]
        out = self.outputs(x[tokens], pairs, is_sorted=sort)
        # A Metal kernel has no gradient.
        how: Implementation = "mlx" if self.training else "auto"
        places = mx.argsort(order) if sort else None
        return expert_combine(out, places, weights, implementation=how)

    def outputs(self, x: mx.array, experts: mx.array, *, is_sorted: bool) -> mx.array:
        """[P, D], each through one of the `experts` [P] -> [P, D]; `is_sorted` where these
        ascend."""
        hidden = self.gate_up_proj(x[:, None], experts, sorted_indices=is_sorted)
        gate, up = mx.split(hidden, 2, axis=-1)
        return self.down_proj(self.activation(gate, up), experts, sorted_indices=is_sorted)[:, 0]

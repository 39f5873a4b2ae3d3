"""The vision tower: patches of a picture in, embeddings for the encoder out.

Follows `transformers.models.gemma4` (5.24) with one difference: pictures go through one at a time
and are not padded, so that nothing is masked. Attributes bear the names of the checkpoint's
tensors. Letters: B pictures of one size, P patches of a picture, D hidden size of the tower, H
heads, Dh head size, N soft tokens, T hidden size of the text model.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_diffgemma.config import VisionConfig
from mlx_diffgemma.kernels.activation import gated_gelu
from mlx_diffgemma.model.attention import attend


class ClippableLinear(nn.Module):
    """A linear layer without bias that may clip what goes in and what comes out."""

    def __init__(self, dim: int, width: int, clipped: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, width, bias=False)
        self._clipped = clipped
        if clipped:
            self.input_min, self.input_max = mx.array(-np.inf), mx.array(np.inf)
            self.output_min, self.output_max = mx.array(-np.inf), mx.array(np.inf)

    def __call__(self, x: mx.array) -> mx.array:
        if not self._clipped:
            return self.linear(x)
        x = self.linear(mx.clip(x, self.input_min, self.input_max))
        return mx.clip(x, self.output_min, self.output_max)


class PatchEmbedder(nn.Module):
    """A projection of the pixels, and a learned embedding of the column and of the row."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.input_proj = nn.Linear(3 * config.patch_size**2, dim, bias=False)
        self.position_embedding_table = mx.ones((2, config.position_embedding_size, dim))

    def __call__(self, values: mx.array, places: mx.array) -> mx.array:
        """Values [P, 3 · side²] from 0 to 1 and places [P, 2] (column, row) -> [P, D]."""
        table = self.position_embedding_table
        x = self.input_proj((2 * (values - 0.5)).astype(table.dtype))
        return x + (table[0][places[:, 0]] + table[1][places[:, 1]])


class VisionAttention(nn.Module):
    """Attention of every patch over every patch, with scale 1 and norms on each head."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim, eps, clipped = config.hidden_size, config.rms_norm_eps, config.use_clipped_linears
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = ClippableLinear(dim, queries, clipped)
        self.k_proj = ClippableLinear(dim, keys, clipped)
        self.v_proj = ClippableLinear(dim, keys, clipped)
        self.o_proj = ClippableLinear(queries, dim, clipped)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=eps)
        self._eps, self._head_dim = eps, config.head_dim

    def __call__(self, x: mx.array, turn: Turn) -> mx.array:
        """[B, P, D] -> [B, P, D]."""
        batch, count, _ = x.shape
        shape = (batch, count, -1, self._head_dim)
        queries = turn(self.q_norm(self.q_proj(x).reshape(shape)))
        keys = turn(self.k_norm(self.k_proj(x).reshape(shape)))
        values = mx.fast.rms_norm(self.v_proj(x).reshape(shape), None, self._eps)
        queries, keys, values = (part.transpose(0, 2, 1, 3) for part in (queries, keys, values))
        seen = attend(queries, keys, values, None, bounded=not self.training)
        return self.o_proj(seen.transpose(0, 2, 1, 3).reshape(batch, count, -1))


class Turn:
    """The rotary embedding: the first half of a head turns with the column, the second with the
    row; within a half, (d, d + Dh / 4) are a pair."""

    def __init__(self, config: VisionConfig, places: mx.array, dtype: mx.Dtype) -> None:
        half = config.head_dim // 2
        exponents = mx.arange(0, half, 2, dtype=mx.float32) / half
        frequencies = 1.0 / (config.rope_theta**exponents)
        angles = places[:, :, None].astype(mx.float32) * frequencies  # [P, 2, Dh / 4]
        self.cos = mx.cos(angles)[:, None].astype(dtype)
        self.sin = mx.sin(angles)[:, None].astype(dtype)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, P, H, Dh] -> [B, P, H, Dh]."""
        pairs = x.reshape(*x.shape[:-1], 2, 2, -1)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        turned = [first * self.cos - second * self.sin, second * self.cos + first * self.sin]
        return mx.stack(turned, axis=-2).reshape(x.shape)


class VisionMLP(nn.Module):
    """Gated MLP with the tanh approximation of GELU, [B, P, D] -> [B, P, D]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim, width, clipped = (
            config.hidden_size, config.intermediate_size, config.use_clipped_linears,
        )  # fmt: skip
        self.gate_proj = ClippableLinear(dim, width, clipped)
        self.up_proj = ClippableLinear(dim, width, clipped)
        self.down_proj = ClippableLinear(width, dim, clipped)
        self.activation = gated_gelu

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.activation(self.gate_proj(x), self.up_proj(x)))


class VisionLayer(nn.Module):
    """Attention and an MLP, each between two norms."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.input_layernorm = nn.RMSNorm(dim, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(dim, eps=eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(dim, eps=eps)
        self.post_feedforward_layernorm = nn.RMSNorm(dim, eps=eps)

    def __call__(self, x: mx.array, turn: Turn) -> mx.array:
        """[B, P, D] -> [B, P, D]."""
        attended = self.self_attn(self.input_layernorm(x), turn)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class _Encoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = [VisionLayer(config) for _ in range(config.num_hidden_layers)]


class VisionTower(nn.Module):
    """Patches of pictures of one size -> their soft tokens [B, N, D]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = _Encoder(config)
        if config.standardize:
            self.std_bias = mx.zeros((config.hidden_size,))
            self.std_scale = mx.ones((config.hidden_size,))
        self.config = config

    def __call__(self, values: mx.array, columns: int) -> mx.array:
        """Values [B, P, 3 · side²] from 0 to 1 in float32, of pictures with `columns` patches in a
        row -> their soft tokens [B, N, D]."""
        config, (batch, count, _) = self.config, values.shape
        place = mx.arange(count)
        places = mx.stack([place % columns, place // columns], axis=-1)
        x = self.patch_embedder(values.reshape(batch * count, -1), mx.tile(places, (batch, 1)))
        x = x.reshape(batch, count, -1)
        turn = Turn(config, places, x.dtype)
        for layer in self.encoder.layers:
            x = layer(x, turn)
            if not self.training:
                mx.async_eval(x)  # what is queued at once holds its memory at once
        return self._standardized(self._pooled(x, columns)).astype(x.dtype)

    def _pooled(self, x: mx.array, columns: int) -> mx.array:
        """The mean of each square of patches, times √D: [B, P, D] -> [B, N, D] in float32."""
        side, (batch, count, dim) = self.config.pooling_kernel_size, x.shape
        squares = x.astype(mx.float32).reshape(
            batch, count // columns // side, side, columns // side, side, dim
        )
        # The reference rounds the means to the type of the activations.
        means = squares.mean(axis=(2, 4)).reshape(batch, -1, dim).astype(x.dtype)
        return means.astype(mx.float32) * dim**0.5

    def _standardized(self, x: mx.array) -> mx.array:
        if not self.config.standardize:
            return x
        return (x - self.std_bias.astype(mx.float32)) * self.std_scale.astype(mx.float32)


class VisionProjection(nn.Module):
    """From soft tokens to embeddings of the text model, [..., D] -> [..., T]."""

    def __init__(self, config: VisionConfig, text_size: int) -> None:
        super().__init__()
        self.embedding_projection = nn.Linear(config.hidden_size, text_size, bias=False)
        self._eps = config.rms_norm_eps

    def __call__(self, x: mx.array) -> mx.array:
        return self.embedding_projection(mx.fast.rms_norm(x, None, self._eps))


class Vision(nn.Module):
    """The tower and the projection behind it, as they are loaded."""

    def __init__(self, config: VisionConfig, text_size: int) -> None:
        super().__init__()
        self.vision_tower = VisionTower(config)
        self.embed_vision = VisionProjection(config, text_size)

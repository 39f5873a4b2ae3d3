"""DiffusionGemma: one set of weights, run as an encoder of the prefix and a denoiser of a canvas.

Follows `transformers.models.diffusion_gemma` (5.23). Attributes bear the names of the checkpoint's
tensors. Letters: B batch, L new prefix positions, C canvas, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_diffgemma.config import ModelConfig, TextConfig
from mlx_diffgemma.kernels.activation import softcap
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.vocabulary import VocabularyPass, vocabulary_pass
from mlx_diffgemma.model.attention import decoder_masks, encoder_masks
from mlx_diffgemma.model.cache import PrefixCache
from mlx_diffgemma.model.layers import DecoderLayer, SelfConditioning


class _EncoderLayer(nn.Module):
    """The only weight that an encoder layer does not share with its decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_scalar = mx.ones((1,))


class _EncoderText(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layers = [_EncoderLayer() for _ in config.attention]


class _Encoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.language_model = _EncoderText(config)


class _Decoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, sizes) for sizes in config.attention]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config)


class _Backbone(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.decoder = _Decoder(config)
        self.encoder = _Encoder(config)


class DiffusionGemma(nn.Module):
    """The text model. It draws nothing at random and knows no strings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Backbone(config.text)
        self.vocabulary_pass: VocabularyPass = vocabulary_pass

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.model.decoder.layers

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the activations, and of weights that are not quantized."""
        return self.model.decoder.norm.weight.dtype

    def make_cache(self, pads: Sequence[int] | None = None) -> PrefixCache:
        """An empty prefix cache; `pads` is the left padding of each sequence, if they differ."""
        return PrefixCache.for_model(self.config.text, pads)

    def encode(self, ids: mx.array, cache: PrefixCache) -> mx.array:
        """Append `ids` [B, L] to the prefix and return their hidden states [B, L, D].

        A caller that only wants the cache evaluates `cache.arrays()`: the last layer's MLP and the
        final norm are then never computed.
        """
        x = self.embed(ids)
        masks = encoder_masks(self.config.text, cache, ids.shape[1])
        offset = cache.rope_offset()
        scalars = self.model.encoder.language_model.layers
        for layer, own, layer_cache in zip(self.layers, scalars, cache.layers, strict=True):
            mask = masks[layer.self_attn.sizes.kind]
            x = layer.encode(x, mask, layer_cache, offset, own.layer_scalar)
        cache.offset += ids.shape[1]
        return self.model.decoder.norm(x)

    def decode(
        self,
        canvas: mx.array,
        cache: PrefixCache,
        soft_embeddings: mx.array | None = None,
        places: mx.array | None = None,
    ) -> mx.array:
        """Hidden states [B, C, D] of a canvas [B, C] that continues the prefix.

        `soft_embeddings` [B, C, D] is what the previous step expected; None at the first step.
        Where `places` [A] is given, only those positions are computed, [B, A, D]; the others are
        seen as they were in the last pass over them. That needs a pass over the whole canvas
        before, and a batch without padding.
        """
        length = canvas.shape[1]
        if places is not None:
            canvas = canvas[:, places]
            soft_embeddings = None if soft_embeddings is None else soft_embeddings[:, places]
        x = self.embed(canvas)
        if soft_embeddings is None:
            soft_embeddings = mx.zeros_like(x)
        x = self.model.decoder.self_conditioning(x, soft_embeddings.astype(x.dtype))
        masks = decoder_masks(self.config.text, cache, length)
        offset = cache.rope_offset()
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer.decode(x, masks[layer.self_attn.sizes.kind], layer_cache, offset, places)
        return self.model.decoder.norm(x)

    def logits(self, hidden: mx.array) -> mx.array:
        """[B, C, D] -> [B, C, V] in float32, soft-capped."""
        table = EmbeddingTable.of(self.model.decoder.embed_tokens, self.dtype)
        return softcap(table.product(hidden), self.config.text.final_logit_softcapping)

    def soft_embeddings(self, processed_logits: mx.array) -> mx.array:
        """The embedding that the model expects at each position: [B, C, V] -> [B, C, D].

        `processed_logits` are the logits after the temperature.
        """
        weights = mx.softmax(processed_logits.astype(mx.float32), axis=-1).astype(self.dtype)
        table = EmbeddingTable.of(self.model.decoder.embed_tokens, self.dtype)
        return table.expected(weights) * self._embed_scale

    @property
    def _embed_scale(self) -> mx.array:
        # The reference rounds √hidden to the type of the embedding.
        return mx.array(self.config.text.hidden_size**0.5, self.dtype)

    def embed(self, ids: mx.array) -> mx.array:
        """Token ids [B, L] -> [B, L, D], scaled by √D."""
        return self.model.decoder.embed_tokens(ids).astype(self.dtype) * self._embed_scale

"""Operations and bytes that the model cannot do without, counted from its config.

An operation is a multiplication or an addition. Counted are the products (everything else is small)
and the bytes of weights and of the prefix cache, each read once: what a machine with room for all
activations on the chip would still have to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from mlx_diffgemma.checkpoint.names import expected_shapes, module_class, module_path
from mlx_diffgemma.checkpoint.quantization import Format
from mlx_diffgemma.config import AttentionConfig, ModelConfig, TextConfig


@dataclass(frozen=True)
class Cost:
    """What some work takes at least.

    Attributes:
        operations: multiplications and additions.
        bytes: bytes read from memory.
    """

    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.operations + other.operations, self.bytes + other.bytes)


@dataclass(frozen=True)
class Weights:
    """How the weights of a model are stored.

    Attributes:
        config: shapes of the model.
        formats: format of every quantized module, by its path.
        item: bytes of a weight that is not quantized, and of an activation.
    """

    config: ModelConfig
    formats: Mapping[str, Format]
    item: int

    def bytes_by_class(self) -> dict[str, float]:
        """Bytes of all modules of each class, by the name that `module_class` gives it."""
        sizes: dict[str, float] = {}
        for name, shape in expected_shapes(self.config).items():
            path = module_path(name)
            fmt = self.formats.get(path) if name.endswith(".weight") else None
            each = fmt.bits_per_weight / 8 if fmt else self.item
            kind = module_class(path)
            sizes[kind] = sizes.get(kind, 0.0) + prod(shape) * each
        return sizes


def layers_cost(weights: Weights, canvas: int, prefix: int, batch: int = 1) -> Cost:
    """Cost of one pass through self-conditioning and all layers of the decoder, of `batch` canvases
    of `canvas` positions, each behind `prefix` tokens."""
    text, tokens = weights.config.text, batch * canvas
    operations = 2.0 * tokens * 3 * text.hidden_size * text.intermediate_size  # self-conditioning
    cached = 0.0
    for sizes in text.attention:
        seen = min(prefix, text.sliding_window - 1) if sizes.is_sliding else prefix
        operations += 2.0 * tokens * _weights_per_token(text, sizes)
        operations += _attention(sizes, tokens * (seen + canvas))
        cached += batch * seen * 2 * sizes.num_kv_heads * sizes.head_dim * weights.item
    return Cost(operations, cached + _layer_bytes(weights, tokens) + _conditioning_bytes(weights))


def vocabulary_cost(weights: Weights, canvas: int, batch: int = 1) -> Cost:
    """Cost of the head and of the exact self-conditioning product; both read the table once."""
    text = weights.config.text
    product = 2.0 * batch * canvas * text.vocab_size * text.hidden_size
    return Cost(2 * product, weights.bytes_by_class()["embedding"])


def prefill_cost(weights: Weights, length: int, step_size: int, batch: int = 1) -> Cost:
    """Cost of encoding `batch` prompts of `length` tokens, `step_size` positions at a time; each
    chunk reads the weights again."""
    text, total = weights.config.text, Cost()
    for start in range(0, length, step_size):
        new = min(step_size, length - start)
        operations, cached = 0.0, 0.0
        for sizes in text.attention:
            window = text.sliding_window if sizes.is_sliding else length
            # Position p sees min(p + 1, window) keys.
            pairs = _triangle(start + new, window) - _triangle(start, window)
            operations += 2.0 * batch * new * _weights_per_token(text, sizes)
            operations += _attention(sizes, batch * pairs)
            seen = min(start, window - 1)
            cached += batch * seen * 2 * sizes.num_kv_heads * sizes.head_dim * weights.item
        total += Cost(operations, cached + _layer_bytes(weights, batch * new))
    return total


def _weights_per_token(text: TextConfig, sizes: AttentionConfig) -> int:
    """Weights of one layer that a token is multiplied with."""
    dim = text.hidden_size
    # Full layers have no value projection.
    kv = (2 if sizes.is_sliding else 1) * sizes.num_kv_heads * sizes.head_dim
    attention = dim * (2 * sizes.num_heads * sizes.head_dim + kv)
    experts = text.top_k_experts * 3 * dim * text.moe_intermediate_size
    return attention + 3 * dim * text.intermediate_size + dim * text.num_experts + experts


def _attention(sizes: AttentionConfig, pairs: float) -> float:
    """Operations of the scores and weighted values of `pairs` pairs of a query and a key."""
    return 4.0 * pairs * sizes.num_heads * sizes.head_dim


def _triangle(positions: int, window: int) -> int:
    """Keys seen by the first `positions` positions together."""
    full = min(positions, window)
    return full * (full + 1) // 2 + (positions - full) * window


def _layer_bytes(weights: Weights, tokens: int) -> float:
    """Bytes of the weights of all layers; of the experts, those that `tokens` tokens are likely to
    choose."""
    text, sizes = weights.config.text, weights.bytes_by_class()
    missed = (1 - text.top_k_experts / text.num_experts) ** tokens
    return sizes["attention"] + sizes["mlp"] + sizes["router"] + sizes["experts"] * (1 - missed)


def _conditioning_bytes(weights: Weights) -> float:
    return weights.bytes_by_class()["self_conditioning"]

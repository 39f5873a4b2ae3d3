"""`config.json` of a DiffusionGemma checkpoint, read and validated.

No size is ever guessed: the class defaults of transformers differ from the released model, so a
missing size is an error that names the key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_diffgemma.errors import ConfigError

MODEL_TYPE = "diffusion_gemma"
SLIDING = "sliding_attention"
FULL = "full_attention"

_REQUIRED = object()


class _Section:
    """One JSON object of a config, read key by key; every error names the key's full path."""

    def __init__(self, data: Any, path: str = "", file: str = "config.json") -> None:
        if not isinstance(data, Mapping):
            raise ConfigError(f"{file}: '{path or 'top level'}' must be an object.")
        self.data, self.path, self.file = data, path, file

    def name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def fail(self, key: str, why: str) -> ConfigError:
        return ConfigError(f"{self.file}: '{self.name(key)}' {why}.")

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.data.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self.fail(key, "is missing; copy config.json from the original checkpoint")
            return default
        return value

    def size(self, key: str, default: Any = _REQUIRED) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(key, f"must be a positive integer, not {value!r}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, *, above: float = 0.0) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > above:
            raise self.fail(key, f"must be a number above {above:g}, not {value!r}")
        return float(value)

    def section(self, key: str) -> _Section:
        return _Section(self.get(key), self.name(key), self.file)

    def ids(self, key: str, vocab_size: int | None = None) -> tuple[int, ...]:
        """One token id or a list of them; below `vocab_size`, where that is given."""
        value = self.get(key, [])
        ids = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.fail(key, f"must be a token id or a list of them, not {value!r}")
        for token in ids:
            if vocab_size is not None and token >= vocab_size:
                raise self.fail(key, f"is {token}, and ids go from 0 to {vocab_size - 1}")
        return tuple(ids)

    def token(self, key: str, vocab_size: int) -> int | None:
        """A token id, or None where there is none."""
        if isinstance(self.data.get(key), (list, tuple)):
            raise self.fail(key, f"must be one token id, not {self.data[key]!r}")
        return next(iter(self.ids(key, vocab_size)), None)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of layer: `default`, or `proportional` (only the first
    `partial_rotary_factor` of the frequencies rotate)."""

    theta: float
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    factor: float = 1.0

    @classmethod
    def read(cls, section: _Section) -> RopeConfig:
        rope_type = section.get("rope_type", "default")
        if rope_type not in ("default", "proportional"):
            raise section.fail(
                "rope_type", f"is {rope_type!r}; known are 'default' and 'proportional'"
            )
        partial = section.number("partial_rotary_factor", 1.0)
        if partial > 1 or (rope_type == "default" and partial != 1):
            raise section.fail("partial_rotary_factor", f"cannot be {partial:g} for {rope_type!r}")
        return cls(section.number("rope_theta"), rope_type, partial, section.number("factor", 1.0))


@dataclass(frozen=True)
class AttentionConfig:
    """Attention sizes of one layer."""

    kind: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig

    @property
    def is_sliding(self) -> bool:
        return self.kind == SLIDING


@dataclass(frozen=True)
class TextConfig:
    """The network: one set of weights, run as the encoder and as the decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k_experts: int
    moe_intermediate_size: int
    sliding_window: int
    max_position_embeddings: int
    rms_norm_eps: float
    attention: tuple[AttentionConfig, ...]
    final_logit_softcapping: float = 30.0
    pad_token_id: int = 0
    bos_token_id: int | None = None

    @property
    def num_hidden_layers(self) -> int:
        return len(self.attention)

    @classmethod
    def read(cls, section: _Section) -> TextConfig:
        if section.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
            raise section.fail("hidden_activation", "must be 'gelu_pytorch_tanh'")
        if section.get("use_bidirectional_attention", "vision") != "vision":
            raise section.fail("use_bidirectional_attention", "must be 'vision' or absent")
        if not section.get("tie_word_embeddings", True):
            raise section.fail("tie_word_embeddings", "must be true: DiffusionGemma ties its head")
        if section.get("attention_bias", False):
            raise section.fail("attention_bias", "must be false: its encoder biases are not tied")
        vocab_size = section.size("vocab_size")
        num_experts, top_k = section.size("num_experts"), section.size("top_k_experts")
        if top_k > num_experts:
            raise section.fail("top_k_experts", f"is {top_k}, more than num_experts {num_experts}")
        return cls(
            vocab_size=vocab_size,
            hidden_size=section.size("hidden_size"),
            intermediate_size=section.size("intermediate_size"),
            num_experts=num_experts,
            top_k_experts=top_k,
            moe_intermediate_size=section.size("moe_intermediate_size"),
            sliding_window=section.size("sliding_window"),
            max_position_embeddings=section.size("max_position_embeddings"),
            rms_norm_eps=section.number("rms_norm_eps"),
            attention=_read_attention(section),
            final_logit_softcapping=section.number("final_logit_softcapping", 30.0),
            pad_token_id=section.token("pad_token_id", vocab_size) or 0,
            bos_token_id=section.token("bos_token_id", vocab_size),
        )


def _read_attention(section: _Section) -> tuple[AttentionConfig, ...]:
    """Attention sizes layer by layer, from either spelling.

    The release writes `global_head_dim` and `num_global_key_value_heads` for the full layers;
    transformers ≥ 5.15 writes `per_layer_config`, a map of layer index to overrides.
    """
    kinds = section.get("layer_types")
    if not isinstance(kinds, (list, tuple)) or not kinds:
        raise section.fail("layer_types", "must be a list with one entry a layer")
    count = section.size("num_hidden_layers")
    if len(kinds) != count:
        raise section.fail("layer_types", f"names {len(kinds)} layers, num_hidden_layers {count}")
    for kind in kinds:
        if kind not in (SLIDING, FULL):
            raise section.fail("layer_types", f"has {kind!r}; known are '{SLIDING}' and '{FULL}'")
    ropes = {
        kind: RopeConfig.read(section.section("rope_parameters").section(kind))
        for kind in dict.fromkeys(kinds)
    }
    overrides = _layer_overrides(section, len(kinds))
    per_layer = section.get("per_layer_config", None) is not None
    heads = section.size("num_attention_heads")
    layers = []
    for index, kind in enumerate(kinds):
        sizes = _Section(
            {
                "head_dim": section.get("head_dim", None),
                "num_key_value_heads": section.get("num_key_value_heads", None),
                **(overrides.get(index, {}) if per_layer else _global_sizes(section, kind)),
            },
            f"{section.path} (layer {index})",
        )
        kv_heads, head_dim = sizes.size("num_key_value_heads"), sizes.size("head_dim")
        if heads % kv_heads:
            raise section.fail(
                "num_attention_heads",
                f"is {heads}, no multiple of layer {index}'s {kv_heads} KV heads",
            )
        if head_dim % 2:
            raise sizes.fail("head_dim", f"must be even for rotary embeddings, not {head_dim}")
        layers.append(AttentionConfig(kind, heads, kv_heads, head_dim, ropes[kind]))
    return tuple(layers)


def _layer_overrides(section: _Section, num_layers: int) -> dict[int, Mapping[str, Any]]:
    overrides = {}
    for key, value in section.get("per_layer_config", {}).items():
        if not str(key).isdigit() or int(key) >= num_layers:
            raise section.fail("per_layer_config", f"has {key!r}, no index of a layer")
        overrides[int(key)] = _Section(value, section.name(f"per_layer_config.{key}")).data
    return overrides


def _global_sizes(section: _Section, kind: str) -> dict[str, int]:
    if kind == SLIDING:
        return {}
    sizes = {"head_dim": section.size("global_head_dim")}
    if section.get("num_global_key_value_heads", None) is not None:
        sizes["num_key_value_heads"] = section.size("num_global_key_value_heads")
    return sizes


@dataclass(frozen=True)
class ModelConfig:
    """A whole checkpoint's `config.json`."""

    text: TextConfig
    canvas_length: int
    eos_token_ids: tuple[int, ...] = ()
    image_token_ids: tuple[int, ...] = ()
    quantization: Mapping[str, Any] | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def end_token_ids(self, tokenizer: Iterable[int] = ()) -> tuple[int, ...]:
        """The ids that end an answer: those of `generation_config.json`, else of `config.json`,
        else the `tokenizer`'s.

        Raises:
            ConfigError: none of them names one, so that no answer would ever end.
        """
        generation = self.raw.get("generation_config") or {}
        ids = _Section(generation, file="generation_config.json").ids("eos_token_id")
        ids = ids or self.eos_token_ids or tuple(sorted(tokenizer))
        if not ids:
            raise ConfigError(
                "neither config.json nor generation_config.json nor the tokenizer names an "
                "'eos_token_id', so no answer would end; add it to config.json."
            )
        return ids

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Read and validate a parsed `config.json`.

        Raises:
            ConfigError: naming the key that is missing, unknown or contradictory.
        """
        top = _Section(data)
        model_type = data.get("model_type")
        if model_type != MODEL_TYPE:
            raise ConfigError(
                f"config.json: model_type is {model_type!r}, not '{MODEL_TYPE}'; "
                "use mlx-lm or mlx-vlm for other models."
            )
        text = TextConfig.read(top.section("text_config"))
        if not top.get("tie_word_embeddings", True):
            raise top.fail("tie_word_embeddings", "must be true: DiffusionGemma ties its head")
        quantization = data.get("quantization") or data.get("quantization_config")
        if quantization is not None and "bits" not in _Section(quantization, "quantization").data:
            raise top.fail(
                "quantization_config", "is not in MLX form; convert the original weights"
            )
        return cls(
            text=text,
            canvas_length=top.size("canvas_length"),
            eos_token_ids=top.ids("eos_token_id", text.vocab_size)
            or top.section("text_config").ids("eos_token_id", text.vocab_size),
            image_token_ids=tuple(
                i
                for key in ("image_token_id", "boi_token_id", "eoi_token_id")
                for i in top.ids(key)
            ),
            quantization=quantization,
            raw=data,
        )


def check_generation_ids(generation: Any, vocab_size: int, *, inside_config: bool = False) -> None:
    """Check the token ids of a parsed `generation_config.json`, which a repository may also carry
    inside `config.json`.

    Raises:
        ConfigError: one is no id of the vocabulary; file and key are named.
    """
    section = (
        _Section(generation, "generation_config")
        if inside_config
        else _Section(generation, file="generation_config.json")
    )
    section.ids("eos_token_id", vocab_size)
    section.token("pad_token_id", vocab_size)


def both_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a `config.json` that carries the attention sizes in both spellings, so that every
    reader finds the one it knows."""
    parsed = ModelConfig.from_dict(config)
    text = dict(config["text_config"])
    full = [(i, a) for i, a in enumerate(parsed.text.attention) if not a.is_sliding]
    text["per_layer_config"] = {
        str(i): {"head_dim": a.head_dim, "num_key_value_heads": a.num_kv_heads} for i, a in full
    }
    sizes = {(a.head_dim, a.num_kv_heads) for _, a in full}
    if len(sizes) == 1:
        text["global_head_dim"], text["num_global_key_value_heads"] = sizes.pop()
    return {**config, "text_config": text}

"""`config.json` of a DiffusionGemma checkpoint, read and validated.

No size is ever guessed: the class defaults of transformers differ from the released model, so a
missing size is an error that names the key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.reading import LARGEST_LENGTH, Section, shown

MODEL_TYPE = "diffusion_gemma"
SLIDING = "sliding_attention"
FULL = "full_attention"
SOFT_TOKENS = (70, 140, 280, 560, 1120)
"""The values that the most soft tokens of a picture may be set to."""

_LAYER = re.compile(r"[0-9]{1,9}")
_GLOBAL = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
_PACKERS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "compressed-tensors": "compressed-tensors",
    "modelopt": "modelopt",
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of layer.

    Attributes:
        theta: base of the frequencies.
        rope_type: "default", or "proportional", in which only the first `partial_rotary_factor` of
            the frequencies rotate.
        partial_rotary_factor: share of the frequencies that rotate, above 0 and at most 1.
        factor: what the periods of the frequencies are multiplied by.
    """

    theta: float
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    factor: float = 1.0

    @classmethod
    def read(cls, section: Section) -> RopeConfig:
        """Read the part of `rope_parameters` for one kind of layer.

        Raises:
            ConfigError: naming the key that is missing, unknown or contradictory.
        """
        rope_type = section.get("rope_type", "default")
        if rope_type not in ("default", "proportional"):
            raise section.fail(
                "rope_type", f"is {shown(rope_type)}; known are 'default' and 'proportional'"
            )
        partial = section.number("partial_rotary_factor", 1.0)
        if partial > 1 or (rope_type == "default" and partial != 1):
            raise section.fail("partial_rotary_factor", f"cannot be {partial:g} for {rope_type!r}")
        return cls(section.number("rope_theta"), rope_type, partial, section.number("factor", 1.0))


@dataclass(frozen=True)
class AttentionConfig:
    """Attention sizes of one layer, whose `kind` is `SLIDING` or `FULL`."""

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
    def read(cls, section: Section) -> TextConfig:
        """Read the `text_config` of a `config.json`.

        Raises:
            ConfigError: naming the key that is missing, unknown or contradictory.
        """
        if section.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
            raise section.fail("hidden_activation", "must be 'gelu_pytorch_tanh'")
        if section.get("use_bidirectional_attention", "vision") != "vision":
            raise section.fail("use_bidirectional_attention", "must be 'vision' or absent")
        if not section.flag("tie_word_embeddings", True):
            raise section.fail("tie_word_embeddings", "must be true: DiffusionGemma ties its head")
        if section.flag("attention_bias", False):
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
            sliding_window=section.size("sliding_window", most=LARGEST_LENGTH),
            max_position_embeddings=section.size("max_position_embeddings", most=LARGEST_LENGTH),
            rms_norm_eps=section.number("rms_norm_eps", most=1.0),
            attention=_read_attention(section),
            final_logit_softcapping=section.number("final_logit_softcapping", 30.0),
            pad_token_id=section.token("pad_token_id", vocab_size) or 0,
            bos_token_id=section.token("bos_token_id", vocab_size),
        )


def _read_attention(section: Section) -> tuple[AttentionConfig, ...]:
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
            raise section.fail(
                "layer_types", f"has {shown(kind)}; known are '{SLIDING}' and '{FULL}'"
            )
    ropes = {
        kind: RopeConfig.read(section.section("rope_parameters").section(kind))
        for kind in dict.fromkeys(kinds)
    }
    overrides = _layer_overrides(section, len(kinds))
    heads = section.size("num_attention_heads")
    layers = []
    for index, kind in enumerate(kinds):
        sizes = _layer_sizes(section, index, kind, overrides)
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


def _layer_overrides(section: Section, num_layers: int) -> dict[int, Section] | None:
    """What `per_layer_config` says of layers, by index; None where a config has none."""
    if not section.has("per_layer_config"):
        return None
    overrides = {}
    given = section.section("per_layer_config")
    for key in given.data:
        if not _LAYER.fullmatch(str(key)) or int(key) >= num_layers:
            raise section.fail("per_layer_config", f"has {shown(key)}, no index of a layer")
        if int(key) in overrides:
            raise section.fail("per_layer_config", f"has layer {int(key)} twice")
        overrides[int(key)] = Section(given.data[key], given.name(str(key)))
    return overrides


def _layer_sizes(
    section: Section, index: int, kind: str, overrides: Mapping[int, Section] | None
) -> Section:
    """The attention sizes of a layer, by the names that they have for all layers.

    Raises:
        ConfigError: both spellings are there and contradict each other.
    """
    sizes = {key: section.get(key, None) for key in _GLOBAL}
    path = f"{section.path} (layer {index})"
    if overrides is None:
        if kind == FULL:
            sizes["head_dim"] = section.size("global_head_dim")
            if section.has("num_global_key_value_heads"):
                sizes["num_key_value_heads"] = section.size("num_global_key_value_heads")
        return Section(sizes, path)
    override = overrides.get(index)
    if override is not None:
        sizes |= {key: override.size(key) for key in _GLOBAL if override.has(key)}
    for key, spelling in _GLOBAL.items() if kind == FULL else ():
        if section.has(spelling) and section.size(spelling) != sizes[key]:
            raise section.fail(
                spelling,
                f"is {section.size(spelling)}, and 'per_layer_config' gives layer {index} a {key} "
                f"of {shown(sizes[key])}; copy config.json from the original checkpoint",
            )
    return Section(sizes, path)


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower, and how a picture is cut for it.

    Attributes:
        patch_size: pixels of a side of a patch.
        pooling_kernel_size: patches of a side of the square that becomes one soft token.
        position_embedding_size: most patches of a side of a picture.
        soft_tokens: most soft tokens of a picture, where nothing else is asked for.
        use_clipped_linears: whether projections clip what goes in and comes out.
        standardize: whether soft tokens are shifted and scaled at the end.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    patch_size: int
    pooling_kernel_size: int
    position_embedding_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 100.0
    use_clipped_linears: bool = False
    standardize: bool = False
    soft_tokens: int = 280

    @property
    def side_multiple(self) -> int:
        """Pixels of a side of one soft token; the sides of a picture are multiples of it."""
        return self.patch_size * self.pooling_kernel_size

    @classmethod
    def read(cls, section: Section, soft_tokens: int) -> VisionConfig:
        """Read the `vision_config` of a `config.json`.

        Raises:
            ConfigError: naming the key that is missing, unknown or contradictory.
        """
        if section.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
            raise section.fail("hidden_activation", "must be 'gelu_pytorch_tanh'")
        if section.flag("attention_bias", False):
            raise section.fail("attention_bias", "must be false")
        rope = section.section("rope_parameters", {})
        if rope.get("rope_type", "axial") not in ("axial", "default"):
            raise rope.fail("rope_type", f"is {shown(rope.get('rope_type'))}; known is 'axial'")
        heads, kv_heads = section.size("num_attention_heads"), section.size("num_key_value_heads")
        if heads % kv_heads:
            raise section.fail("num_attention_heads", f"is {heads}, no multiple of {kv_heads}")
        head_dim = section.size("head_dim")
        if head_dim % 4:
            raise section.fail("head_dim", f"must be a multiple of 4, not {head_dim}")
        return cls(
            hidden_size=section.size("hidden_size"),
            intermediate_size=section.size("intermediate_size"),
            num_hidden_layers=section.size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            patch_size=section.size("patch_size"),
            pooling_kernel_size=section.size("pooling_kernel_size"),
            position_embedding_size=section.size("position_embedding_size"),
            rms_norm_eps=section.number("rms_norm_eps", 1e-6, most=1.0),
            rope_theta=rope.number("rope_theta", 100.0),
            use_clipped_linears=section.flag("use_clipped_linears", False),
            standardize=section.flag("standardize", False),
            soft_tokens=soft_tokens,
        )


@dataclass(frozen=True)
class ModelConfig:
    """A whole checkpoint's `config.json`.

    Attributes:
        text: the network, without the vision tower.
        canvas_length: tokens of a canvas, C.
        eos_token_ids: ids that end an answer, as `config.json` has them; in a model that `load`
            gives, those of `end_token_ids`.
        image_token_id: the id that stands for each soft token of a picture, or None.
        boi_token_id, eoi_token_id: the ids that stand before and behind the soft tokens of a
            picture, or None.
        quantization: the block of `config.json` of that name, in MLX's form, or None.
        raw: the whole `config.json`, as it was given.
    """

    text: TextConfig
    canvas_length: int
    eos_token_ids: tuple[int, ...] = ()
    image_token_id: int | None = None
    boi_token_id: int | None = None
    eoi_token_id: int | None = None
    quantization: Mapping[str, Any] | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def vision(self) -> VisionConfig | None:
        """The vision tower; None where the config names no tower, or no id that stands for a soft
        token.

        Raises:
            ConfigError: the tower's part of the config is damaged.
        """
        top = Section(self.raw)
        if not top.has("vision_config") or self.image_token_id is None:
            return None
        soft_tokens = top.size("vision_soft_tokens_per_image", 280)
        return VisionConfig.read(top.section("vision_config"), soft_tokens)

    @property
    def stated_end_ids(self) -> tuple[int, ...]:
        """The ids by which the checkpoint says that an answer ends: those of
        `generation_config.json`, else of `config.json`; none where neither names any.

        Raises:
            ConfigError: an id of `generation_config.json` is outside the vocabulary.
        """
        generation = self.raw.get("generation_config") or {}
        section = Section(generation, file="generation_config.json")
        return section.ids("eos_token_id", self.text.vocab_size) or self.eos_token_ids

    def end_token_ids(self, tokenizer: Iterable[int] = ()) -> tuple[int, ...]:
        """The ids that end an answer: `stated_end_ids`, else the `tokenizer`'s.

        Raises:
            ConfigError: neither names any, so that no answer would ever end, or one of the ids is
                outside the vocabulary.
        """
        vocab_size = self.text.vocab_size
        ids = self.stated_end_ids or tuple(sorted(tokenizer))
        if not ids:
            raise ConfigError(
                "neither config.json nor generation_config.json nor the tokenizer names an "
                "'eos_token_id', so no answer would end; add it to config.json."
            )
        outside = next((token for token in ids if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise ConfigError(
                f"the tokenizer ends answers with token {outside}, and ids go from 0 to "
                f"{vocab_size - 1}; name an 'eos_token_id' in config.json."
            )
        return ids

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Read and validate a parsed `config.json`.

        Raises:
            ConfigError: naming the key that is missing, unknown or contradictory.
        """
        top = Section(data)
        model_type = data.get("model_type")
        if model_type != MODEL_TYPE:
            raise ConfigError(
                f"config.json: model_type is {shown(model_type)}, not '{MODEL_TYPE}'; "
                "use mlx-lm or mlx-vlm for other models."
            )
        text = TextConfig.read(top.section("text_config"))
        if not top.flag("tie_word_embeddings", True):
            raise top.fail("tie_word_embeddings", "must be true: DiffusionGemma ties its head")
        quantization = _read_quantization(top)
        return cls(
            text=text,
            canvas_length=top.size("canvas_length"),
            eos_token_ids=top.ids("eos_token_id", text.vocab_size)
            or top.section("text_config").ids("eos_token_id", text.vocab_size),
            image_token_id=next(iter(top.ids("image_token_id")), None),
            boi_token_id=next(iter(top.ids("boi_token_id")), None),
            eoi_token_id=next(iter(top.ids("eoi_token_id")), None),
            quantization=quantization,
            raw=data,
        )


def _read_quantization(top: Section) -> Mapping[str, Any] | None:
    """The `quantization` of a config, or None.

    Raises:
        ConfigError: it is not in MLX's form; the error names the form, where it is known.
    """
    keys = ("quantization", "quantization_config")
    key = next((each for each in keys if top.has(each) and top.section(each).data), None)
    if key is None:
        return None
    block = top.section(key)
    method = block.get("quant_method", "mlx")
    if method != "mlx" or not block.has("bits"):
        packer = _PACKERS.get(method, shown(method)) if isinstance(method, str) else "another"
        whose = "" if method == "mlx" else f" but that of {packer}"
        raise top.fail(key, f"is not in MLX form{whose}; convert the original weights")
    _check_format(block)
    for path, entry in block.data.items():
        if isinstance(entry, Mapping):
            _check_format(block.section(path))
        elif "." in path and not isinstance(entry, bool):
            raise block.fail(path, f"must be an object, true or false, not {shown(entry)}")
    return block.data


def _check_format(section: Section) -> None:
    """Check the types of what an object says of a format."""
    for key in ("bits", "group_size"):
        if section.has(key):
            section.size(key)
    if section.has("mode"):
        section.text("mode")


def check_generation_ids(generation: Any, vocab_size: int, *, inside_config: bool = False) -> None:
    """Check the token ids of a parsed `generation_config.json`, which a repository may also carry
    inside `config.json`.

    Raises:
        ConfigError: an id is outside the vocabulary; the error names file and key.
    """
    section = (
        Section(generation, "generation_config")
        if inside_config
        else Section(generation, file="generation_config.json")
    )
    section.ids("eos_token_id", vocab_size)
    section.token("pad_token_id", vocab_size)


def both_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a `config.json` that carries the attention sizes in both spellings, so that every
    reader finds the one it knows.

    Raises:
        ConfigError: as for `ModelConfig.from_dict`.
    """
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

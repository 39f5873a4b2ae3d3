"""The one place that knows tensor names.

The MLX model's parameters bear the names of the Hugging Face checkpoint, but for the two expert
stacks, which gain `.weight` because they are modules here. A module's path is the name without
`.weight`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_diffgemma.config import AttentionConfig, ModelConfig, TextConfig, VisionConfig

VISION_ROOT = "model.encoder."
VISION_PREFIXES = (f"{VISION_ROOT}vision_tower.", f"{VISION_ROOT}embed_vision.")
CLIP_BOUNDS = ("input_min", "input_max", "output_min", "output_max")
_TIED_PREFIX = "model.encoder.language_model."
_STACKS = (".experts.gate_up_proj", ".experts.down_proj")
_PIECE = re.compile(
    r"(?P<experts>model\.decoder\.layers\.\d+\.experts)"
    r"(?:\.(?P<expert>\d+))?"
    r"\.(?P<part>gate_proj|up_proj|gate_up_proj|down_proj)(?:\.weight)?"
)
_CLASSES = (
    (re.compile(r"\.embed_tokens$"), "embedding"),
    (re.compile(r"norm(_[12])?$"), "norm"),
    (re.compile(r"\.self_attn\."), "attention"),
    (re.compile(r"\.mlp\."), "mlp"),
    (re.compile(r"\.router($|\.)"), "router"),
    (re.compile(r"\.experts($|\.)"), "experts"),
    (re.compile(r"\.self_conditioning\."), "self_conditioning"),
)
QUANTIZABLE_CLASSES = (
    "embedding", "attention", "mlp", "router", "experts", "self_conditioning",
)  # fmt: skip


@dataclass(frozen=True)
class ExpertPiece:
    """Part of a fused expert stack that a checkpoint stores as a tensor of its own.

    Attributes:
        fused: name of the MLX parameter that it belongs to.
        part: "gate" (the first half of the rows), "up" (the second) or "all" of them.
        expert: which expert, or None if the tensor is a stack of all.
    """

    fused: str
    part: str
    expert: int | None


def canonical_name(hf_name: str) -> str | None:
    """The MLX name of a tensor of a Hugging Face or converted checkpoint, None if it is dropped.

    Dropped are the tied head, buffers of the rotary embedding, and the encoder's copies of the
    decoder's weights. Vision tensors keep their names. A tensor that is only a piece of an expert
    stack (`expert_piece`) maps to the stack.
    """
    if hf_name == "lm_head.weight" or "rotary_emb" in hf_name:
        return None
    if hf_name.startswith(_TIED_PREFIX):
        return hf_name if hf_name.endswith(".layer_scalar") else None
    piece = expert_piece(hf_name)
    if piece is not None:
        return piece.fused
    return f"{hf_name}.weight" if hf_name.endswith(_STACKS) else hf_name


def expert_piece(hf_name: str) -> ExpertPiece | None:
    """Where a tensor belongs in a fused expert stack; None if it is a whole stack or no expert.

    The known forms are one tensor for each expert (`experts.7.gate_proj.weight`) and stacks of all
    gates and all ups (`experts.gate_proj`).
    """
    match = _PIECE.fullmatch(hf_name)
    if match is None:
        return None
    part, expert = match["part"], match["expert"]
    if expert is None and part in ("gate_up_proj", "down_proj"):
        return None
    stack = "down_proj" if part == "down_proj" else "gate_up_proj"
    half = {"gate_proj": "gate", "up_proj": "up"}.get(part, "all")
    fused = f"{match['experts']}.{stack}.weight"
    return ExpertPiece(fused, half, None if expert is None else int(expert))


def to_hugging_face(name: str) -> str:
    """The name that the reference implementation gives to an (unquantized) MLX parameter."""
    module = module_path(name)
    return module if name.endswith(".weight") and module.endswith(_STACKS) else name


def is_vision(name: str) -> bool:
    """Whether a tensor or module belongs to the vision tower or its projection."""
    return f"{name}.".startswith(VISION_PREFIXES)


def module_path(name: str) -> str:
    """The module that a parameter belongs to, as a quantization map names it."""
    for suffix in (".weight", ".scales", ".biases"):
        if name.endswith(suffix):
            return name[: -len(suffix)]
    return name


def module_class(path: str) -> str:
    """What a module does: embedding, attention, mlp, router, experts, self_conditioning, norm,
    vision or other."""
    if is_vision(path):
        return "vision"
    for pattern, kind in _CLASSES:
        if pattern.search(path):
            return kind
    return "other"


def is_quantizable(name: str, ndim: int) -> bool:
    """Whether a parameter is a matrix (or a stack of them) that may be quantized."""
    kind = module_class(module_path(name))
    return name.endswith(".weight") and ndim >= 2 and kind in QUANTIZABLE_CLASSES


def is_vision_quantizable(name: str, ndim: int) -> bool:
    """Whether a parameter of the vision tower is a matrix that may be quantized. The projection of
    the pixels is none: cast to the type of packed weights, pixels become integers."""
    path = module_path(name)
    return (
        is_vision(path)
        and name.endswith(".weight")
        and ndim == 2
        and not path.endswith("patch_embedder.input_proj")
    )


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every text parameter of the unquantized model, by MLX name."""
    text = config.text
    dim, width = text.hidden_size, text.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.decoder.embed_tokens.weight": (text.vocab_size, dim)
    }
    for index, attention in enumerate(text.attention):
        layer = _layer_shapes(text, attention)
        shapes |= {f"model.decoder.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.decoder.norm.weight"] = (dim,)
    shapes["model.decoder.self_conditioning.pre_norm.weight"] = (dim,)
    shapes |= _gated("model.decoder.self_conditioning.", dim, width)
    for index in range(text.num_hidden_layers):
        shapes[f"{_TIED_PREFIX}layers.{index}.layer_scalar"] = (1,)
    return shapes


def _layer_shapes(text: TextConfig, attention: AttentionConfig) -> dict[str, tuple[int, ...]]:
    dim, size, experts = text.hidden_size, attention.head_dim, text.num_experts
    out = {
        "q": attention.num_heads * size,
        "k": attention.num_kv_heads * size,
        **({"v": attention.num_kv_heads * size} if attention.is_sliding else {}),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"self_attn.{p}_proj.weight": (rows, dim) for p, rows in out.items()
    }
    shapes["self_attn.o_proj.weight"] = (dim, out["q"])
    shapes |= {"self_attn.q_norm.weight": (size,), "self_attn.k_norm.weight": (size,)}
    shapes |= _gated("mlp.", dim, text.intermediate_size)
    shapes["router.proj.weight"] = (experts, dim)
    shapes["router.scale"] = (dim,)
    shapes["router.per_expert_scale"] = (experts,)
    shapes["experts.gate_up_proj.weight"] = (experts, 2 * text.moe_intermediate_size, dim)
    shapes["experts.down_proj.weight"] = (experts, dim, text.moe_intermediate_size)
    for norm in (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
        "post_feedforward_layernorm", "post_feedforward_layernorm_1",
        "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2",
    ):  # fmt: skip
        shapes[f"{norm}.weight"] = (dim,)
    shapes["layer_scalar"] = (1,)
    return shapes


def _gated(prefix: str, dim: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (width, dim),
        f"{prefix}up_proj.weight": (width, dim),
        f"{prefix}down_proj.weight": (dim, width),
    }


def vision_shapes(vision: VisionConfig, text_size: int) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the unquantized vision tower and of its projection into a text
    model of `text_size`, by name."""
    dim, width = vision.hidden_size, vision.intermediate_size
    queries = vision.num_attention_heads * vision.head_dim
    keys = vision.num_key_value_heads * vision.head_dim
    tower, projection = VISION_PREFIXES
    shapes: dict[str, tuple[int, ...]] = {
        f"{projection}embedding_projection.weight": (text_size, dim),
        f"{tower}patch_embedder.input_proj.weight": (dim, 3 * vision.patch_size**2),
        f"{tower}patch_embedder.position_embedding_table": (2, vision.position_embedding_size, dim),
    }
    if vision.standardize:
        shapes |= {f"{tower}std_bias": (dim,), f"{tower}std_scale": (dim,)}
    linears = {
        "self_attn.q_proj": (queries, dim),
        "self_attn.k_proj": (keys, dim),
        "self_attn.v_proj": (keys, dim),
        "self_attn.o_proj": (dim, queries),
        "mlp.gate_proj": (width, dim),
        "mlp.up_proj": (width, dim),
        "mlp.down_proj": (dim, width),
    }
    norms = {
        "input_layernorm": dim,
        "post_attention_layernorm": dim,
        "pre_feedforward_layernorm": dim,
        "post_feedforward_layernorm": dim,
        "self_attn.q_norm": vision.head_dim,
        "self_attn.k_norm": vision.head_dim,
    }
    for index in range(vision.num_hidden_layers):
        layer = f"{tower}encoder.layers.{index}."
        shapes |= {f"{layer}{name}.weight": (size,) for name, size in norms.items()}
        for name, shape in linears.items():
            shapes[f"{layer}{name}.linear.weight"] = shape
            if vision.use_clipped_linears:
                for bound in CLIP_BOUNDS:
                    shapes[f"{layer}{name}.{bound}"] = ()
    return shapes

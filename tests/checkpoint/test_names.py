from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma.checkpoint.names import (
    ExpertPiece,
    canonical_name,
    expected_shapes,
    expert_piece,
    is_quantizable,
    is_vision,
    module_class,
    module_path,
    to_hugging_face,
)
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

LAYER = "model.decoder.layers.3"


def small_config(**text) -> ModelConfig:
    kinds = ["sliding_attention", "full_attention"]
    rope = {kind: {"rope_theta": 1000.0} for kind in kinds}
    sizes = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_experts": 4,
        "top_k_experts": 2, "moe_intermediate_size": 16, "sliding_window": 8,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16,
        "num_global_key_value_heads": 1, "num_hidden_layers": 2, "layer_types": kinds,
        "rope_parameters": rope,
    }  # fmt: skip
    return ModelConfig.from_dict(
        {"model_type": "diffusion_gemma", "canvas_length": 16, "text_config": {**sizes, **text}}
    )


def test_expected_shapes_are_those_of_the_model():
    config = small_config()
    model = DiffusionGemma(config)
    shapes = {name: value.shape for name, value in tree_flatten(model.parameters())}
    assert expected_shapes(config) == shapes
    assert isinstance(next(iter(tree_flatten(model.parameters())))[1], mx.array)


@pytest.mark.parametrize(
    ("hf_name", "name"),
    [
        (f"{LAYER}.experts.gate_up_proj", f"{LAYER}.experts.gate_up_proj.weight"),
        (f"{LAYER}.experts.down_proj", f"{LAYER}.experts.down_proj.weight"),
        (f"{LAYER}.experts.down_proj.scales", f"{LAYER}.experts.down_proj.scales"),
        (f"{LAYER}.experts.gate_up_proj.weight", f"{LAYER}.experts.gate_up_proj.weight"),
        (f"{LAYER}.mlp.down_proj.weight", f"{LAYER}.mlp.down_proj.weight"),
        ("lm_head.weight", None),
        ("model.encoder.language_model.rotary_emb.inv_freq", None),
        ("model.encoder.language_model.layers.0.mlp.up_proj.weight", None),
        ("model.encoder.language_model.embed_tokens.weight", None),
        ("model.encoder.language_model.layers.0.layer_scalar",) * 2,
        ("model.encoder.vision_tower.encoder.layers.0.mlp.down_proj.linear.weight",) * 2,
        (f"{LAYER}.experts.12.gate_proj.weight", f"{LAYER}.experts.gate_up_proj.weight"),
        (f"{LAYER}.experts.up_proj", f"{LAYER}.experts.gate_up_proj.weight"),
    ],
)
def test_canonical_names(hf_name, name):
    assert canonical_name(hf_name) == name


def test_names_survive_the_way_to_hugging_face_and_back():
    for name in expected_shapes(small_config()):
        assert canonical_name(to_hugging_face(name)) == name
    assert to_hugging_face(f"{LAYER}.experts.down_proj.weight") == f"{LAYER}.experts.down_proj"


@pytest.mark.parametrize(
    ("name", "piece"),
    [
        (f"{LAYER}.experts.12.gate_proj.weight", ("gate_up_proj", "gate", 12)),
        (f"{LAYER}.experts.12.up_proj.weight", ("gate_up_proj", "up", 12)),
        (f"{LAYER}.experts.0.down_proj.weight", ("down_proj", "all", 0)),
        (f"{LAYER}.experts.1.gate_up_proj", ("gate_up_proj", "all", 1)),
        (f"{LAYER}.experts.gate_proj", ("gate_up_proj", "gate", None)),
        (f"{LAYER}.experts.up_proj.weight", ("gate_up_proj", "up", None)),
    ],
)
def test_expert_pieces(name, piece):
    stack, part, expert = piece
    assert expert_piece(name) == ExpertPiece(f"{LAYER}.experts.{stack}.weight", part, expert)


def test_whole_stacks_and_dense_projections_are_no_pieces():
    for name in (f"{LAYER}.experts.gate_up_proj", f"{LAYER}.mlp.gate_proj.weight"):
        assert expert_piece(name) is None


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("model.decoder.embed_tokens", "embedding"),
        ("model.decoder.norm", "norm"),
        (f"{LAYER}.self_attn.q_proj", "attention"),
        (f"{LAYER}.self_attn.q_norm", "norm"),
        (f"{LAYER}.mlp.gate_proj", "mlp"),
        (f"{LAYER}.router.proj", "router"),
        (f"{LAYER}.router.scale", "router"),
        (f"{LAYER}.experts.gate_up_proj", "experts"),
        (f"{LAYER}.post_feedforward_layernorm_2", "norm"),
        (f"{LAYER}.layer_scalar", "other"),
        ("model.decoder.self_conditioning.pre_norm", "norm"),
        ("model.decoder.self_conditioning.up_proj", "self_conditioning"),
        ("model.encoder.embed_vision.embedding_projection", "vision"),
        ("model.encoder.vision_tower.encoder.layers.0.self_attn.q_proj.linear", "vision"),
    ],
)
def test_module_classes(path, kind):
    assert module_class(path) == kind
    assert is_vision(path) == (kind == "vision")


def test_only_matrices_of_the_text_model_are_quantizable():
    shapes = expected_shapes(small_config())
    quantizable = {name for name, shape in shapes.items() if is_quantizable(name, len(shape))}
    assert quantizable == {name for name, shape in shapes.items() if len(shape) > 1}
    assert not is_quantizable("model.encoder.embed_vision.embedding_projection.weight", 2)
    assert module_path("a.b.scales") == module_path("a.b.weight") == "a.b"

"""Operations and bytes against numbers worked out by hand."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma.bench.counting import Cost, Weights, layers_cost, prefill_cost, vocabulary_cost
from mlx_diffgemma.bench.presets import RELEASE, SMALL, config_like
from mlx_diffgemma.bench.random_model import chosen_recipe, formats_of, random_model
from mlx_diffgemma.checkpoint.quantization import Format
from mlx_diffgemma.config import FULL, SLIDING, ModelConfig


@pytest.fixture
def weights():
    """One sliding and one full layer: hidden 8, dense width 4, 4 experts of 2 with 1 a token, 2
    query heads; sliding 2 KV heads of 4 and a window of 5, full 1 KV head of 6; vocabulary 10."""
    config = {**config_like(SMALL), "eos_token_id": 1}
    config["text_config"] = {
        **config["text_config"],
        "vocab_size": 10, "hidden_size": 8, "intermediate_size": 4, "num_experts": 4,
        "top_k_experts": 1, "moe_intermediate_size": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 4, "num_global_key_value_heads": 1,
        "global_head_dim": 6, "sliding_window": 5, "layer_types": [SLIDING, FULL],
    }  # fmt: skip
    return Weights(ModelConfig.from_dict(config), {}, 4)


# Weights that one token meets, from the sizes above.
SLIDING_WEIGHTS = 8 * 8 + 2 * 8 * 8 + 8 * 8 + 3 * 8 * 4 + 8 * 4 + 3 * 8 * 2  # q, k and v, o, ...
FULL_WEIGHTS = 8 * 12 + 8 * 6 + 12 * 8 + 3 * 8 * 4 + 8 * 4 + 3 * 8 * 2


def test_a_canvas_of_three_behind_a_prefix_of_seven(weights):
    cost = layers_cost(weights, canvas=3, prefix=7)
    projections = 2 * 3 * (SLIDING_WEIGHTS + FULL_WEIGHTS)
    conditioning = 2 * 3 * (3 * 8 * 4)
    # The sliding layer sees 4 of the prefix and the canvas, the full one everything.
    attention = 4 * (3 * 7) * (2 * 4) + 4 * (3 * 10) * (2 * 6)
    assert cost.operations == projections + conditioning + attention


def test_bytes_are_the_weights_and_the_cache_once(weights):
    cost = layers_cost(weights, canvas=3, prefix=7)
    attention = (64 + 128 + 64) + (96 + 48 + 96)
    dense = 2 * 3 * 8 * 4
    # A router has a scale for each dimension and one for each expert beside its projection.
    routers = 2 * (8 * 4 + 8 + 4)
    experts = 2 * 4 * 3 * 8 * 2 * (1 - 0.75**3)
    conditioning = 3 * 8 * 4
    cache = 4 * 2 * 2 * 4 + 7 * 2 * 1 * 6
    counted = attention + dense + routers + experts + conditioning + cache
    assert cost.bytes == pytest.approx(4 * counted)


def test_the_vocabulary_is_multiplied_twice_and_read_once(weights):
    cost = vocabulary_cost(weights, canvas=3, batch=2)
    assert cost == Cost(2 * (2 * 6 * 10 * 8), 4 * 10 * 8)


def test_prefill_counts_every_pair_once_however_it_is_chunked(weights):
    pairs = {SLIDING: 1 + 2 + 3 + 4 + 5 * 5, FULL: 9 * 10 // 2}
    expected = 2 * 9 * (SLIDING_WEIGHTS + FULL_WEIGHTS)
    expected += 4 * pairs[SLIDING] * 8 + 4 * pairs[FULL] * 12
    whole, chunked = (prefill_cost(weights, 9, step) for step in (9, 4))
    assert whole.operations == chunked.operations == expected
    assert chunked.bytes > 2 * whole.bytes  # three chunks read the weights three times


def test_two_sequences_cost_twice_the_operations_but_not_the_weights(weights):
    one, two = (layers_cost(weights, 3, 7, batch) for batch in (1, 2))
    assert two.operations == 2 * one.operations
    assert one.bytes < two.bytes < 2 * one.bytes


@pytest.mark.parametrize(("bits", "recipe"), [(None, None), (4, None), (None, "4bit")])
def test_counted_bytes_are_those_of_the_arrays(bits, recipe):
    config = ModelConfig.from_dict(_small_vocabulary())
    model = random_model(config, chosen_recipe(bits, recipe), mx.float16)
    counted = Weights(config, formats_of(model), 2).bytes_by_class()
    assert sum(counted.values()) == sum(a.nbytes for _, a in tree_flatten(model.parameters()))


def test_the_release_takes_what_others_count_for_it():
    """FLOPs a step: 1.95 TFLOP in the layers, 0.38 in the head, 0.38 in self-conditioning."""
    config = ModelConfig.from_dict(config_like(RELEASE))
    weights = Weights(config, {}, 2)
    assert vocabulary_cost(weights, 256).operations / 2 == pytest.approx(0.378e12, rel=0.01)
    assert layers_cost(weights, 256, 512).operations == pytest.approx(1.95e12, rel=0.15)
    assert sum(weights.bytes_by_class().values()) == pytest.approx(50.5e9, rel=0.02)


def test_a_format_counts_its_scales():
    config = ModelConfig.from_dict(_small_vocabulary())
    path = "model.decoder.embed_tokens"
    plain = Weights(config, {}, 2).bytes_by_class()["embedding"]
    packed = Weights(config, {path: Format.parse("4bit/64")}, 2).bytes_by_class()["embedding"]
    assert packed / plain == 4.5 / 16


def _small_vocabulary():
    config = {**config_like(SMALL), "eos_token_id": 1}
    config["text_config"] = {**config["text_config"], "vocab_size": 512}
    return config

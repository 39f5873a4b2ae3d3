"""Router and experts beside a naive loop, and the other blocks beside plain formulas."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.model.diffusion_gemma import CanvasView
from mlx_diffgemma.model.experts import Experts, Router
from mlx_diffgemma.model.layers import SelfConditioning


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x: np.ndarray, weight=1.0) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def randomize(module, seed: int) -> dict[str, np.ndarray]:
    """Random parameters, and the same as numpy arrays in float64."""
    rng = np.random.default_rng(seed)
    found = {}

    def fill(tree, prefix=""):
        out = {}
        for name, value in tree.items():
            if isinstance(value, dict):
                out[name] = fill(value, f"{prefix}{name}.")
            else:
                array = rng.normal(0.3, 0.7, value.shape).astype(np.float32)
                found[prefix + name] = array.astype(np.float64)
                out[name] = mx.array(array)
        return out

    module.update(fill(module.parameters()))
    return found


@pytest.fixture
def config(tiny_config):
    return ModelConfig.from_dict(tiny_config(0, num_experts=7, top_k_experts=3)).text


def test_router(config):
    router = Router(config)
    weights = randomize(router, 0)
    x = np.random.default_rng(1).normal(0, 30, (50, config.hidden_size)).astype(np.float32)
    chosen, scales = (np.array(a) for a in router(mx.array(x)))
    assert chosen.shape == scales.shape == (50, 3)
    for token in range(50):
        scaled = norm(x[token].astype(np.float64)) * weights["scale"] * config.hidden_size**-0.5
        scores = weights["proj.weight"] @ scaled
        p = np.exp(scores - scores.max())
        p /= p.sum()
        best = sorted(range(7), key=lambda e: -p[e])[:3]
        assert sorted(chosen[token].tolist()) == sorted(best)
        total = sum(p[e] for e in best)
        for expert, scale in zip(chosen[token], scales[token], strict=True):
            expected = p[expert] / total * weights["per_expert_scale"][expert]
            assert scale == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_router_in_half_precision_has_weights_in_float32(config):
    router = Router(config)
    router.set_dtype(mx.bfloat16)
    _, weights = router(mx.ones((4, config.hidden_size), mx.bfloat16))
    assert weights.dtype == mx.float32


@pytest.mark.parametrize("count", [1, 5, 21, 22, 200], ids=lambda n: f"{n} tokens")
def test_experts(config, count):
    """Below and above the number of pairs from which they are sorted."""
    experts = Experts(config)
    weights = randomize(experts, 0)
    rng = np.random.default_rng(count)
    x = rng.normal(size=(count, config.hidden_size)).astype(np.float32)
    chosen = np.stack([rng.permutation(7)[:3] for _ in range(count)]).astype(np.uint32)
    scales = rng.normal(size=(count, 3)).astype(np.float32)
    found = np.array(experts(mx.array(x), mx.array(chosen), mx.array(scales)))
    expected = np.zeros((count, config.hidden_size))
    width = config.moe_intermediate_size
    for token in range(count):
        for expert, scale in zip(chosen[token], scales[token], strict=True):
            both = weights["gate_up_proj.weight"][expert] @ x[token]
            hidden = gelu(both[:width]) * both[width:]
            expected[token] += scale * (weights["down_proj.weight"][expert] @ hidden)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)


def test_experts_keep_the_type_of_their_input(config):
    experts = Experts(config)
    experts.set_dtype(mx.bfloat16)
    x = mx.ones((2, config.hidden_size), mx.bfloat16)
    chosen = mx.array([[0, 1, 2], [3, 4, 5]], mx.uint32)
    assert experts(x, chosen, mx.ones((2, 3))).dtype == mx.bfloat16


@pytest.mark.parametrize("zeros", [False, True], ids=["signal", "first step"])
def test_self_conditioning(config, zeros):
    module = SelfConditioning(config)
    w = randomize(module, 0)
    rng = np.random.default_rng(1)
    x, soft = rng.normal(0, 3, (2, 2, 4, config.hidden_size)).astype(np.float32)
    if zeros:
        soft = np.zeros_like(soft)
    n = norm(soft.astype(np.float64), w["pre_norm.weight"])
    hidden = gelu(n @ w["gate_proj.weight"].T) * (n @ w["up_proj.weight"].T)
    expected = norm(x + hidden @ w["down_proj.weight"].T)
    np.testing.assert_allclose(
        np.array(module(mx.array(x), mx.array(soft))), expected, atol=2e-5, rtol=1e-4
    )


def test_soft_embeddings_are_the_expected_embeddings(tiny_model):
    model = tiny_model(0)
    text = model.config.text
    logits = np.random.default_rng(0).normal(0, 4, (2, 3, text.vocab_size)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    table = np.array(model.model.decoder.embed_tokens.weight).astype(np.float64)
    np.testing.assert_allclose(
        np.array(model.soft_embeddings(mx.array(logits))),
        p @ table * math.sqrt(text.hidden_size),
        atol=1e-5,
    )


def test_logits_are_capped_and_in_float32(tiny_model):
    model = tiny_model(0)
    text = model.config.text
    hidden = np.random.default_rng(0).normal(0, 20, (1, 3, text.hidden_size)).astype(np.float32)
    table = np.array(model.model.decoder.embed_tokens.weight).astype(np.float64)
    expected = 30 * np.tanh(hidden @ table.T / 30)
    assert np.abs(expected).max() > 25
    np.testing.assert_allclose(np.array(model.logits(mx.array(hidden))), expected, atol=2e-4)
    model.set_dtype(mx.bfloat16)
    assert model.logits(mx.array(hidden).astype(mx.bfloat16)).dtype == mx.float32


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_activations_have_the_type_of_the_weights(tiny_model, dtype):
    model = tiny_model(0)
    model.set_dtype(dtype)
    hidden, (prefix,) = model.encode([[9, 10, 11]], [model.empty_prefix()])
    assert hidden.dtype == dtype
    assert {array.dtype for array in prefix.arrays()} == {dtype}
    hidden = model.decode([CanvasView(mx.array([9, 10]), prefix)])
    assert hidden.dtype == dtype
    soft = model.soft_embeddings(model.logits(hidden))
    assert soft.dtype == dtype
    assert model.decode([CanvasView(mx.array([9, 10]), prefix, soft)]).dtype == dtype


@pytest.mark.parametrize("bits, mode", [(8, "affine"), (4, "mxfp4")])
def test_soft_embeddings_of_a_quantized_table(tiny_model, bits, mode):
    """The packed table is multiplied as such: equal to its dequantized twin."""
    model = tiny_model(0, hidden_size=64, vocab_size=128)
    table = model.model.decoder.embed_tokens
    model.model.decoder.embed_tokens = packed = nn.QuantizedEmbedding.from_embedding(
        table, group_size=32, bits=bits, mode=mode
    )
    logits = mx.random.normal((2, 3, 128), key=mx.random.key(0)) * 4
    plain = mx.dequantize(
        packed.weight, packed.scales, packed.get("biases"), group_size=32, bits=bits, mode=mode
    )
    expected = mx.softmax(logits, axis=-1) @ plain.astype(mx.float32) * 8
    np.testing.assert_allclose(
        np.array(model.soft_embeddings(logits)), np.array(expected), atol=1e-4
    )

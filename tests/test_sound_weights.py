"""What is not finite in the weights is an error in every command, never another answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from text.gemma_like import build
from tiny_models import make_config, make_model, make_weights

import mlx_diffgemma
from mlx_diffgemma.config import FULL, SLIDING, ModelConfig
from mlx_diffgemma.cpu.vocabulary import tiled_pass
from mlx_diffgemma.kernels.materialized import whole_pass
from mlx_diffgemma.kernels.vocabulary import vocabulary_pass
from mlx_diffgemma.train.config import TrainConfig
from mlx_diffgemma.train.evaluate import held_out_loss
from mlx_diffgemma.train.examples import Example
from mlx_diffgemma.train.loop import sizes_of

VALUES = (math.inf, -math.inf, math.nan)
QUICK = {"seed": 1, "max_denoising_steps": 1}
DIGITS = {"type": "integer", "minimum": 0, "maximum": 99}


@cache
def small() -> tuple[Any, Any]:
    raw = make_config(
        5, vocab_size=416, head_dim=8, hidden_size=36, num_hidden_layers=2,
        layer_types=[SLIDING, FULL],
    ) | {"canvas_length": 12}  # fmt: skip
    config = ModelConfig.from_dict(raw)
    return make_model(config, make_weights(config, 5)), build()


def evaluated(model: Any, _: Any) -> float:
    examples = [Example(tuple(range(20, 40)), 9)]
    return held_out_loss(model, examples, TrainConfig(batch_size=1, val_batches=1), sizes_of(model))


def decided(model: Any, tokenizer: Any) -> list[float]:
    question = {"type": "choice", "instructions": "c", "criteria": {"a": None, "b": None}}
    found = mlx_diffgemma.decide(model, tokenizer, "ab", {"q": question}, seed=0, steps=2)
    return list(found.answers["q"].probabilities)


def chatted(model: Any, tokenizer: Any) -> list[str]:
    """Two turns over one cache, so that what was committed is read again."""
    cache, said = model.make_cache(), []
    for turn in ("ab", "ba"):
        prompt = "".join([*said, turn])
        said += [turn, mlx_diffgemma.generate(model, tokenizer, prompt, 12, raw=True,
                                              prefix_cache=cache, **QUICK)]  # fmt: skip
    return said


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "generate": lambda *m: mlx_diffgemma.generate(*m, "ab", 12, **QUICK),
    "chat": chatted,
    "batch": lambda *m: mlx_diffgemma.batch_generate(*m, ["ab", "b"], 12, **QUICK).texts,
    "decide": decided,
    "fill a list": lambda *m: mlx_diffgemma.fill(*m, "a {x:a|b}", **QUICK).text,
    "fill": lambda *m: mlx_diffgemma.fill(*m, "a {x}", lengths=[1, 2], **QUICK).text,
    "infill": lambda *m: mlx_diffgemma.infill(*m, "a [[?]]", lengths=[1, 2], **QUICK).text,
    "edit": lambda *m: mlx_diffgemma.edit(*m, "ab\nb", "c", (1, 1), lengths=[2], **QUICK).text,
    "structured": lambda *m: (
        mlx_diffgemma.generate_structured(*m, "ab", choices=["a", "b"], **QUICK).text
    ),
    "a schema": lambda *m: (
        mlx_diffgemma.generate_structured(*m, "ab", 12, json_schema=DIGITS, **QUICK).text
    ),
    "evaluate": evaluated,
}


def unsound(parameter: mx.array, value: float) -> mx.array:
    """A copy with one value replaced, in the middle."""
    flat = np.array(parameter).reshape(-1)
    flat[len(flat) // 2] = value
    return mx.array(flat.reshape(parameter.shape))


def missed(way: str, values: dict[str, list[float]]) -> list[str]:
    """The tensors and values with which a way of asking answers, and not as with sound ones."""
    model, tokenizer = small()
    ask = WAYS[way]
    expected, found = ask(model, tokenizer), []
    parameters = dict(tree_flatten(model.parameters()))
    for name, value in [(name, value) for name, each in values.items() for value in each]:
        model.update(tree_unflatten([(name, unsound(parameters[name], value))]))
        try:
            if ask(model, tokenizer) != expected:
                found.append(f"{name} {value}")
        except mlx_diffgemma.DiffGemmaError as error:
            assert str(error).isprintable() and "NaN or infinity" in str(error)
        finally:
            model.update(tree_unflatten([(name, parameters[name])]))
    return found


def tensors() -> list[str]:
    return [name for name, _ in tree_flatten(small()[0].parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_no_answer_from_weights_that_are_not_finite(way):
    """All three values in every tensor."""
    assert missed(way, {name: list(VALUES) for name in tensors()}) == []


@pytest.mark.parametrize("form", [whole_pass, tiled_pass, vocabulary_pass])
def test_whatever_form_the_pass_over_the_vocabulary_takes(form, monkeypatch):
    model, _ = small()
    monkeypatch.setattr(model, "vocabulary_pass", form)
    names = ("model.decoder.embed_tokens.weight", "model.decoder.norm.weight")
    values = {name: list(VALUES) for name in names}
    assert [missed(way, values) for way in ("generate", "decide")] == [[], []]


def test_a_row_of_the_embedding_that_is_not_finite_is_an_error():
    """Not merely no other answer: no token of the row occurs anywhere."""
    model, tokenizer = small()
    table = model.model.decoder.embed_tokens
    sound = table.weight
    for place, value in product((0, 200, 415), VALUES):
        broken = np.array(sound)
        broken[place, 3] = value
        table.weight = mx.array(broken)
        try:
            for way in ("generate", "fill a list", "structured"):
                with pytest.raises(mlx_diffgemma.DiffGemmaError, match="NaN or infinity"):
                    WAYS[way](model, tokenizer)
        finally:
            table.weight = sound

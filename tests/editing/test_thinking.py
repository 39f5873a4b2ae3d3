"""A constraint binds what follows the thought, wherever in a canvas that ends."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from text import gemma_like, release_like
from tiny_models import make_config, make_model, make_weights

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.diffusion.canvas import Passed, Prediction
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.diffusion.predict import Predictor
from mlx_diffgemma.editing.structured import Structured, UnmetConstraintError, generate_structured
from mlx_diffgemma.text.prompt import encode_prompt

CANVAS = 24
OPEN = "<|channel>thought\n"
_THINKS = "{% if enable_thinking %}<|think|>{% endif %}"


@cache
def setting() -> tuple[Any, Any]:
    raw = make_config(5, vocab_size=480, head_dim=8, hidden_size=36) | {"canvas_length": CANVAS}
    config = ModelConfig.from_dict(raw)
    tokenizer = release_like.build()
    tokenizer.chat_template = _THINKS + release_like.TEMPLATE
    return make_model(config, make_weights(config, 5)), tokenizer


class Scripted:
    """Says its canvases where a canvas may hold anything, and what the model says elsewhere."""

    def __init__(self, model: Any, canvases: list[list[int]]) -> None:
        self.inner, self.canvases = Predictor(model), canvases
        self.bound: list[tuple[int, ...]] = []  # the prefixes of the canvases that are constrained

    def __call__(self, canvases, prefixes):
        (canvas,) = canvases
        (passed,) = self.inner(canvases, prefixes)
        if canvas.layout.allowed or canvas.layout.pins:
            self.bound.append(prefixes[0].ids)
            return [passed]
        tokens, soft = mx.array(self.canvases[canvas.index]), passed.prediction.soft_embeddings
        none = mx.zeros((CANVAS,))
        return [Passed(Prediction(tokens, none + 1, tokens, none, none + 1, soft, none))]


@pytest.fixture
def answer():
    """Answers "x" with text that matches a pattern, where the model thinks what it is told: the
    answer, the prefix that the constraint began with, and the prompt."""

    def run(said: list[str], pattern: str = "[0-9]{3,40}", most: int = 90, **how: Any):
        model, tokenizer = setting()
        tokenizer = how.pop("tokenizer", tokenizer)
        ends = release_like.ends(setting()[1])
        spelt = [release_like.ids(tokenizer, text)[:CANVAS] for text in said]
        scripted = Scripted(model, [ids + [ends[0]] * (CANVAS - len(ids)) for ids in spelt])
        found = generate_structured(
            model, tokenizer, "x", most, regex=pattern, seed=1,
            max_denoising_steps=3, eos_token_ids=ends, denoiser=Denoiser(model, scripted),
            **{"thinking": True, **how},
        )  # fmt: skip
        assert re.fullmatch(pattern, found.text)
        assert found.passes == sum(found.denoising_steps)
        assert len(found.thought_tokens) + len(found.tokens) <= most
        prompt = encode_prompt(tokenizer, "x", thinking=how.get("thinking", True))
        assert scripted.bound[0] == (*prompt, *found.thought_tokens)
        return found

    return run


def spelt(found: Structured) -> str:
    text: str = setting()[1].decode(list(found.thought_tokens), skip_special_tokens=False)
    return text


@pytest.mark.parametrize("behind", ["", "12 is no part of it", "<|channel>thought\nmore"])
def test_the_constraint_begins_behind_the_thought_s_end(answer, behind):
    found = answer([f"{OPEN}ab 1<channel|>{behind}"])
    assert found.thought == "ab 1"
    assert spelt(found) == f"{OPEN}ab 1<channel|>"


def test_a_thought_may_take_several_canvases(answer):
    tokenizer = setting()[1]
    whole = release_like.ids(tokenizer, OPEN + "ab " * 60)[: 2 * CANVAS - 3]
    first, second = whole[:CANVAS], whole[CANVAS:]
    said = [tokenizer.decode(part, skip_special_tokens=False) for part in (first, second)]
    assert [len(release_like.ids(tokenizer, text)) for text in said] == [CANVAS, CANVAS - 3]
    found = answer([said[0], said[1] + "<channel|>1"])
    assert len(found.thought_tokens) == 2 * CANVAS - 2
    assert found.thought.startswith("ab ab") and len(found.denoising_steps) >= 3


@pytest.mark.parametrize("said", ["ab 12.", "", f"ab {OPEN}1<channel|>"])
def test_a_model_that_opens_no_thought_is_bound_at_once(answer, said):
    found = answer([said])
    assert (found.thought, found.thought_tokens) == ("", ())
    assert len(found.denoising_steps) >= 2  # the first canvas is dropped, and counted


def test_a_thought_that_ends_with_the_turn_is_closed(answer):
    found = answer([f"{OPEN}ab"])
    assert (found.thought, spelt(found)) == ("ab", f"{OPEN}ab<channel|>")


def test_a_thought_that_the_prompt_opens_goes_on(answer):
    tokenizer = release_like.build()
    tokenizer.chat_template = (
        f"{release_like.TEMPLATE}{{% if enable_thinking %}}{OPEN}{{% endif %}}"
    )
    found = answer(["ab<channel|>12"], tokenizer=tokenizer)
    assert (found.thought, spelt(found)) == ("ab", "ab<channel|>")


def test_a_thought_that_was_never_opened_counts(answer):
    assert answer(["ab<channel|>12"]).thought == "ab"


def test_a_thought_leaves_room_for_the_answer_or_says_so(answer):
    said = [f"{OPEN}ab ab ab<channel|>"]
    taken = len(answer(said).thought_tokens)
    assert len(answer(said, "[0-9]{5,40}", taken + 5).tokens) == 5
    with pytest.raises(UnmetConstraintError) as error:
        answer(said, "[0-9]{5,40}", taken + 4)
    assert str(error.value) == (
        f"the thought took the {taken + 4} tokens of max_tokens and left too few for an answer "
        "that matches; raise max_tokens."
    )
    assert error.value.partial.startswith("ab ab")


def test_nothing_is_thought_where_it_is_not_asked_for_or_not_marked(answer):
    said = [f"{OPEN}ab<channel|>"]
    assert answer(said, thinking=None).thought == ""
    unused = [f"<unused{n}>" for n in range(release_like.TOOL_RESPONSE - len(gemma_like.CONTROLS))]
    controls = [*gemma_like.CONTROLS, *unused, "<|tool_response>"]
    template = _THINKS.replace("<|think|>", "") + release_like.TEMPLATE
    plain = answer(["ab"], tokenizer=gemma_like.build(template, controls, []))
    assert (plain.thought, plain.thought_tokens) == ("", ())

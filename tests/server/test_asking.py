"""The neutral layer: each answer is what the library gives alone, and nothing is left behind."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import jsonschema
import numpy as np
import pytest

from mlx_diffgemma import generate_structured, infill, stream_generate
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.server.asking import answer, count_tokens
from mlx_diffgemma.server.pieces import Asked, Call, Ended, Frame, Started, Text, Thought
from mlx_diffgemma.server.preparing import arguments_schema, prepare
from mlx_diffgemma.server.refusals import RefusedError
from mlx_diffgemma.server.working import arguments_in

HELLO = [{"role": "user", "content": "sort: 3 1 2"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "d",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "days": {"$ref": "#/$defs/d"},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"d": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}  # fmt: skip
CLOCK = {"type": "function", "function": {"name": "clock", "description": "d", "parameters": {}}}


def pieces_of(engine: Any, *asked: Asked) -> list[Any]:
    async def run() -> list[Any]:
        async with aclosing(answer(engine, *asked)) as pieces:
            return [piece async for piece in pieces]

    return asyncio.run(asyncio.wait_for(run(), 60))


def text_of(pieces: list[Any], index: int = 0) -> str:
    return "".join(each.text for each in pieces if isinstance(each, Text) and each.index == index)


def ends_of(pieces: list[Any]) -> list[Ended]:
    ends = [each for each in pieces if isinstance(each, Ended)]
    return sorted(ends, key=lambda each: each.index)


def alone(engine: Any, **options: Any) -> tuple[str, Any]:
    responses = list(
        stream_generate(engine.model, engine.tokenizer, HELLO, engine.context, **options)
    )
    return "".join(each.text for each in responses), responses[-1]


def test_an_answer_is_what_stream_generate_gives_alone(demo_engine):
    pieces = pieces_of(demo_engine, Asked(messages=HELLO, seed=7))
    said, last = alone(demo_engine, seed=7)
    (end,) = ends_of(pieces)
    assert isinstance(pieces[0], Started) and pieces[0].prompt_tokens == last.prompt_tokens
    assert text_of(pieces) == said and said
    assert (end.reason, end.completion_tokens) == (last.finish_reason, last.generation_tokens)
    assert (end.steps, end.seed) == (last.denoising_steps, 7)


def test_several_answers_go_by_the_next_seeds_and_encode_their_prompt_once(demo_engine):
    before = demo_engine.counters.prompt_tokens, demo_engine.counters.cached_tokens
    pieces = pieces_of(demo_engine, Asked(messages=HELLO, seed=3, n=3), Asked(prompt="1 2", seed=3))
    assert [end.index for end in ends_of(pieces)] == [0, 1, 2, 3]
    for number in range(3):
        assert text_of(pieces, number) == alone(demo_engine, seed=3 + number)[0]
    counters = demo_engine.counters
    length = ends_of(pieces)[0].prompt_tokens
    new = counters.prompt_tokens - before[0] - (counters.cached_tokens - before[1])
    assert new <= length + ends_of(pieces)[3].prompt_tokens
    known = pieces_of(demo_engine, Asked(messages=HELLO, seed=3))[0].cached_tokens
    assert 0 < known <= length


def test_temperature_scales_the_schedule_and_is_argmax_at_0(demo_engine):
    cold = [pieces_of(demo_engine, Asked(messages=HELLO, seed=1, temperature=0)) for _ in "ab"]
    assert (
        text_of(cold[0]) == text_of(cold[1]) == alone(demo_engine, seed=1, draw_likeliest=True)[0]
    )
    half = pieces_of(demo_engine, Asked(messages=HELLO, seed=1, temperature=0.5))
    own = demo_engine.model.config.raw["generation_config"]
    heat = {"t_min": own["t_min"] * 0.5, "t_max": own["t_max"] * 0.5}
    assert text_of(half) == alone(demo_engine, seed=1, **heat)[0]


def test_a_form_is_kept_and_a_gap_is_filled_as_alone(demo_engine):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    asked = Asked(messages=HELLO, json_schema=schema, seed=2, max_tokens=24, logprobs=True)
    pieces = pieces_of(demo_engine, asked)
    at = demo_engine.model, demo_engine.tokenizer
    found = generate_structured(*at, HELLO, 24, json_schema=schema, validate=4, seed=2)
    assert text_of(pieces) == found.text
    (said,) = [each for each in pieces if isinstance(each, Text)]
    assert b"".join(each.spelled for each in said.tokens).decode() == found.text
    np.testing.assert_allclose(
        np.exp([each.log_probability for each in said.tokens]), found.probability, rtol=1e-5
    )
    gap = pieces_of(demo_engine, Asked(prompt="1 2 ", suffix=" 4 5", seed=1, max_tokens=2))
    alike = infill(*at, "1 2 [[?]] 4 5", lengths=[1, 2], seed=1)
    assert text_of(gap) == alike.holes[0].text


def test_a_gap_may_ask_for_more_tokens_than_a_canvas_holds(demo_engine):
    # Both sides end in a token that may grow into the gap.
    room = demo_engine.model.config.canvas_length - 3
    asked = {"prompt": "1 2 ", "suffix": " 4 5", "seed": 1, "settings": {"max_denoising_steps": 2}}
    longest = pieces_of(demo_engine, Asked(**asked, max_tokens=10 * room))
    assert text_of(longest) == text_of(pieces_of(demo_engine, Asked(**asked, max_tokens=room)))


@pytest.mark.parametrize("choice", ["required", "weather"])
def test_a_call_that_must_be_made_validates(calling_engine, choice):
    asked = Asked(
        messages=HELLO, tools=[CLOCK, WEATHER], tool_choice=choice, seed=4, max_tokens=120,
        settings={"max_denoising_steps": 6},
    )  # fmt: skip
    pieces = pieces_of(calling_engine, asked)
    (call,) = [each for each in pieces if isinstance(each, Call)]
    schemas = {
        each["function"]["name"]: each["function"]["parameters"] for each in (CLOCK, WEATHER)
    }
    jsonschema.validate(call.arguments, schemas[call.name])
    assert isinstance(call.arguments, dict) and choice in ("required", call.name)
    assert ends_of(pieces)[0].reason == "tool_calls" and not text_of(pieces)


def test_a_call_has_only_numbers_that_clients_can_read():
    assert arguments_in('{"a": 1e300, "b": 7}') == {"a": 1e300, "b": 7}
    with pytest.raises(RefusedError, match="out of range, -1e999") as refused:
        arguments_in('{"a": [-1e999]}')
    assert refused.value.status == 422
    with pytest.raises(RefusedError, match="out of range, 1111"):
        arguments_in(f'{{"a": {"1" * 5000}}}')


def test_a_call_that_must_be_made_names_no_argument_that_its_function_does_not_know():
    city = {"city": {"type": "string"}}
    for parameters, more in (
        ({}, {"type": "object", "properties": {}, "additionalProperties": False}),
        ({"properties": city}, {"type": "object", "additionalProperties": False}),
        ({"properties": city, "additionalProperties": True}, {"type": "object"}),
        ({"properties": city, "anyOf": [{"required": ["town"]}]}, {"type": "object"}),
        ({"required": ["town"]}, {"type": "object", "properties": {}}),
        ({"required": [["a"]]}, {"type": "object", "properties": {}}),
        ({"minProperties": 1}, {"type": "object", "properties": {}}),
        ({"type": ["object", "null"], "required": ["a"]}, {"type": "object", "properties": {}}),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "object"}}}, {}),
    ):
        assert arguments_schema(parameters) == {**parameters, **more}


SAID = '<|channel>thought\nplan<channel|>So: <|tool_call>call:weather{city:<|"|>Rome<|"|>,days:2}'


def test_thoughts_texts_and_calls_come_apart(calling_engine, script, ids):
    script.canvases = [ids(SAID + "<tool_call|><|tool_response>")]
    asked = Asked(messages=HELLO, tools=[WEATHER], seed=1, frames=True)
    pieces = pieces_of(calling_engine, asked)
    kinds = [type(each) for each in pieces]
    assert kinds == [Started, Frame, Thought, Text, Call, Ended]
    frame, thought, text, call, end = pieces[1:]
    assert (thought.text, text.text, call.name) == ("plan", "So: ", "weather")
    assert call.arguments == {"city": "Rome", "days": 2}
    assert (frame.text, frame.thought, frame.step) == ("So: ", "plan", 1)
    assert end.reason == "tool_calls"


def test_calls_that_may_not_be_made_stay_text(calling_engine, script, ids):
    script.canvases = [ids(SAID + "<tool_call|><|tool_response>")]
    asked = Asked(messages=HELLO, tools=[WEATHER], tool_choice="none", seed=1)
    pieces = pieces_of(calling_engine, asked)
    assert not [each for each in pieces if isinstance(each, Call)]
    assert "call:weather" in text_of(pieces) and ends_of(pieces)[0].reason == "stop"
    untold = asyncio.run(count_tokens(calling_engine, asked))
    assert untold < asyncio.run(
        count_tokens(calling_engine, Asked(messages=HELLO, tools=[WEATHER]))
    )


def test_stop_strings_cut_text_and_tokens(calling_engine, script, ids):
    script.canvases = [ids("<|channel>thought\nEND<channel|>é one EN"), ids("D two<turn|>")]
    asked = Asked(messages=HELLO, stop=("END",), logprobs=True, seed=1)
    pieces = pieces_of(calling_engine, asked)
    tokens = [info for each in pieces if isinstance(each, Text) for info in each.tokens]
    assert text_of(pieces) == "é one " == b"".join(each.spelled for each in tokens).decode()
    assert [each.token for each in tokens] == ids("é one ")
    assert len({each.entropy for each in tokens}) == len(tokens)  # each its own
    (end,) = ends_of(pieces)
    assert (end.reason, end.stop_string) == ("stop", "END")


@pytest.mark.parametrize("how", ["prompt", "messages", "system", "suffix", "prefill", "tools"])
def test_text_that_spells_a_control_token_is_text(calling_engine, how):
    """However often the tokenizer of clients changes what it takes for a control token."""
    spelt = "a<turn|><|tool_call>b"
    tool = {"type": "function", "function": {"name": "f", "description": spelt, "parameters": {}}}
    asked = {
        "prompt": Asked(prompt=spelt),
        "suffix": Asked(prompt=spelt, suffix=spelt),
        "messages": Asked(messages=[{"role": "user", "content": spelt}]),
        "system": Asked(messages=HELLO, system=spelt),
        "prefill": Asked(messages=HELLO, prefill=spelt),
        "tools": Asked(messages=HELLO, tools=[tool]),
    }[how]
    tokens = prepare(calling_engine, asked).encoded.ids
    own = calling_engine.tokenizer
    turn, call = own.convert_tokens_to_ids(["<turn|>", "<|tool_call>"])
    assert call not in tokens
    turns = {"prompt": 0, "suffix": 0, "messages": 1, "prefill": 1}.get(how, 2)
    assert tokens.count(turn) == turns


def test_a_form_that_cannot_be_kept_says_so(demo_engine):
    endless = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    broken = {"type": "string", "pattern": "("}
    short = {"type": "array", "items": {"type": "integer"}, "minItems": 40}
    for schema in (endless, broken, short):
        asked = Asked(messages=HELLO, json_schema=schema, seed=1, max_tokens=20)
        with pytest.raises((UsageError, RefusedError)):
            pieces_of(demo_engine, asked)


def test_a_client_that_leaves_leaves_nothing(demo_engine):
    async def run() -> None:
        async with aclosing(answer(demo_engine, Asked(messages=HELLO, n=2, seed=0))) as pieces:
            await anext(pieces)
        while demo_engine.counters.running:
            await asyncio.sleep(0.01)

    finished = demo_engine.counters.finished
    asyncio.run(asyncio.wait_for(run(), 30))
    assert demo_engine.counters.finished <= finished + 1  # the prompt that both begin from


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (Asked(), "either messages or a prompt"),
        (Asked(messages=HELLO, n=0), "n must be"),
        (Asked(messages=HELLO, temperature=-1), "temperature must be"),
        (Asked(messages=HELLO, json_schema=True, regex="a"), "one form"),
        (Asked(messages=HELLO, json_schema=True, tools=[CLOCK]), "tools may be called"),
        (Asked(messages=HELLO, tool_choice="required"), "no tools are given"),
        (Asked(messages=HELLO, tools=[CLOCK], tool_choice="x"), "none of the tools"),
        (Asked(prompt=[1, 999]), "ids go from 0"),
        (Asked(messages=HELLO, settings={"max_denoising_steps": 0}), "max_denoising_steps"),
        (Asked(prompt="x" * 5000), "context is 4096"),
    ],
)
def test_what_cannot_be_done_is_refused_before_it_begins(demo_engine, asked, why):
    requests = demo_engine.counters.requests
    with pytest.raises((UsageError, RefusedError), match=why):
        pieces_of(demo_engine, asked)
    assert demo_engine.counters.requests == requests

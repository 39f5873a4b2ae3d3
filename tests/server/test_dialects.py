"""The packages of Anthropic, Ollama and typed decisions against engines as they are."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import jsonschema
import ollama
import pytest
import typesafe_sdk
from running import until
from typesafe_sdk import Choice, Noul, Score, TypeSafeClient

from mlx_diffgemma import generate
from mlx_diffgemma.editing.decide import decide

SORT = [{"role": "user", "content": "sort: 3 1 2"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
CALL = '<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|><|tool_response>'
ANSWER = "<|channel>thought\nIt is a greeting.<channel|>Hello END world<turn|>"
QUESTIONS = {
    "spam": Noul(instructions="It is spam."),
    "tone": Choice(instructions="Which tone?", criteria={"angry": "It is hostile.", "calm": None}),
    "urgency": Score(instructions="How urgent?", criteria=["low", "mid", {"level": "high"}]),
}


def claude(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="k", max_retries=0)


def typed(url: str) -> TypeSafeClient:
    return TypeSafeClient(api_key="k", base_url=url, retry=typesafe_sdk.RetryPolicy(max_retries=0))


def asked(messages: Any = SORT, **fields: Any) -> dict[str, Any]:
    return {"model": "x", "max_tokens": 200, "messages": messages, **fields}


def test_all_say_what_the_library_says(demo_engine, demo_url):
    said = generate(demo_engine.model, demo_engine.tokenizer, SORT, 200, seed=7)
    assert said
    seeded = {"extra_body": {"seed": 7}}
    with claude(demo_url) as client:
        message = client.messages.create(**asked(), **seeded)
        assert message.content[0].text == said and message.stop_reason == "end_turn"
        with client.messages.stream(**asked(), **seeded) as stream:
            assert "".join(stream.text_stream) == said
    with ollama.Client(host=demo_url) as client:
        options = {"seed": 7}
        assert client.chat("demo", SORT, options=options).message.content == said
        lines = client.generate("demo", SORT[0]["content"], stream=True, options=options)
        assert "".join(line.response for line in lines) == said


def test_what_is_known_of_a_prompt_is_counted_apart(demo_url):
    prompt = [{"role": "user", "content": "sort: 9 4 7 5 8"}]
    with claude(demo_url) as client:
        total = client.messages.count_tokens(model="x", messages=prompt).input_tokens
        client.messages.create(**asked(prompt))
        usage = client.messages.create(**asked(prompt)).usage
    assert usage.cache_read_input_tokens > 0
    assert usage.input_tokens + usage.cache_read_input_tokens == total


def test_thoughts_calls_and_stops(calling_url, script, ids):
    tools = [{"name": "weather", "description": "d", "input_schema": CITY}]
    described = {"name": "weather", "description": "d", "parameters": CITY}
    with claude(calling_url) as client, ollama.Client(host=calling_url) as other:
        script.canvases = [ids(ANSWER)]
        thinking = {"type": "enabled", "budget_tokens": 1024}
        given = asked(thinking=thinking, stop_sequences=["END"])
        with client.messages.stream(**given) as stream:
            message = stream.get_final_message()
        assert [block.type for block in message.content] == ["thinking", "text"]
        assert message.content[0].thinking == "It is a greeting."
        assert (message.content[1].text, message.stop_sequence) == ("Hello ", "END")
        told = other.chat("calling", SORT, think=True, options={"stop": ["END"]}).message
        assert (told.thinking, told.content) == ("It is a greeting.", "Hello ")
        script.canvases = [ids(CALL)]
        message = client.messages.create(**asked(tools=tools))
        assert message.stop_reason == "tool_use"
        assert message.content[-1].input == {"city": "Oslo"}
        tool = {"type": "function", "function": described}
        lines = list(other.chat("calling", SORT, tools=[tool], stream=True))
        (call,) = [each for line in lines for each in line.message.tool_calls or ()]
        assert call.function.arguments == {"city": "Oslo"}


def test_a_call_that_must_be_made_is_valid(calling_url):
    tools = [{"name": "weather", "description": "d", "input_schema": CITY}]
    with claude(calling_url) as client:
        for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
            message = client.messages.create(**asked(tools=tools, tool_choice=choice))
            (block,) = message.content
            jsonschema.validate(block.input, CITY)
            assert (block.name, message.stop_reason) == ("weather", "tool_use")
        config = {"format": {"type": "json_schema", "schema": CITY}}
        message = client.messages.create(**asked(output_config=config))
        jsonschema.validate(json.loads(message.content[0].text), CITY)


def test_a_client_that_leaves_ends_the_work(calling_engine, calling_url):
    def gone(count: int) -> Any:
        before = calling_engine.counters.cancelled
        return lambda: (
            calling_engine.counters.cancelled - before == count
            and not calling_engine.counters.running
        )

    seed = {"seed": 1}  # its answer does not end by itself meanwhile
    with claude(calling_url) as client, ollama.Client(host=calling_url) as other:
        ended = gone(2)
        with client.messages.stream(**asked(max_tokens=100_000), extra_body=seed) as stream:
            next(iter(stream))
        lines = other.chat("calling", SORT, stream=True, options=seed)
        next(lines)
        lines.close()
        until(ended)
        ended = gone(1)
        endless = asked(max_tokens=10**6, **seed)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{calling_url}/v1/messages", json=endless, timeout=0.5)
        until(ended)


def test_a_prompt_that_does_not_fit_is_a_bad_request(demo_url):
    long = [{"role": "user", "content": "sort: " + "1 " * 5000}]
    with claude(demo_url) as client, pytest.raises(anthropic.BadRequestError) as raised:
        client.messages.create(**asked(long))
    assert "context" in raised.value.api_message and "\n" not in raised.value.api_message
    with ollama.Client(host=demo_url) as client, pytest.raises(ollama.ResponseError) as refused:
        list(client.chat("demo", long, stream=True))
    assert (refused.value.status_code, refused.value.error) == (400, raised.value.api_message)


def test_ollama_is_told_of_the_model(calling_engine, calling_url):
    with ollama.Client(host=calling_url) as client:
        (listed,) = client.list().models
        assert listed.model == "calling:latest" and len(listed.digest) == 64
        assert listed.details.family == "diffusion_gemma" and listed.modified_at
        (runs,) = client.ps().models
        assert (runs.digest, runs.size) == (listed.digest, listed.size) and runs.size > 10_000
        assert runs.context_length == calling_engine.context
        shown = client.show("calling")
    assert set(shown.capabilities) == {"completion", "insert", "tools", "thinking"}
    architecture = shown.modelinfo["general.architecture"]
    assert shown.modelinfo[f"{architecture}.context_length"] == calling_engine.context
    for method in ("GET", "HEAD"):
        assert httpx.request(method, f"{calling_url}/api/version").status_code == 200


def test_one_list_of_models_is_read_by_all(calling_url):
    with typed(calling_url) as client:
        assert [model.name for model in client.models.list().models] == ["calling"]
    with claude(calling_url) as client:
        (listed,) = client.models.list().data
        assert (listed.id, listed.lifecycle, listed.created_at.year) == ("calling", "active", 2026)
        assert client.models.retrieve("calling").display_name == "calling"


def test_an_infill_stands_between_both_texts(calling_url):
    with ollama.Client(host=calling_url) as client:
        options = {"seed": 1, "num_predict": 4}
        whole = client.generate("calling", "def f(", suffix="):\n", options=options)
    assert whole.done and whole.response and whole.eval_count


def test_decisions_are_those_of_the_library(calling_engine, calling_url):
    state = {"mail": "You won! Click now."}
    wire = {name: question.model_dump() for name, question in QUESTIONS.items()}
    own = decide(calling_engine.model, calling_engine.tokenizer, state, wire, seed=5, draws=2)
    extra = {"seed": 5, "draws": 2}
    with typed(calling_url) as client:
        found = client.system_one(state, QUESTIONS, extra_body=extra)
    assert found.model == "calling" and found.request_id
    assert found.nouls["spam"].noul == pytest.approx(own.answers["spam"].probabilities[0])
    tone, urgency = own.answers["tone"], own.answers["urgency"]
    expected = dict(zip(("angry", "calm"), tone.probabilities, strict=True))
    assert found.choices["tone"].probabilities == pytest.approx(expected)
    assert found.choices["tone"].choice == tone.best
    assert found.scores["urgency"].score == pytest.approx(urgency.score)
    assert found.scores["urgency"].legend == {0: "low", 1: "mid", 2: {"level": "high"}}
    assert found.usage.input_tokens == own.prompt_tokens and found.usage.output_tokens == 3
    with ollama.Client(host=calling_url) as client:
        own_kind = {"urgency": {**wire["urgency"], "criteria": ["low", "high"]}}
        told = client.systemone("calling", state, {**wire, **own_kind})
    assert told.answers["tone"].choice in ("angry", "calm")
    body = {"model": "x", "state": state, "questions": wire, **extra, "steps": 2}
    said = httpx.post(f"{calling_url}/v1/decisions", json=body).json()
    assert said["answers"]["tone"]["spread"].keys() == {"angry", "calm"}
    assert (said["seed"], said["passes"]) == (5, 2)
    assert said["usage"]["cached_tokens"] > 0


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"questions": {"q": {"type": "box"}}}, "question 'q': type 'box' is unknown"),
        ({"questions": {"q": {"type": "choice", "criteria": {"a": None}}}}, "question 'q' has 1"),
        ({"assets": {"a": {"type": "image"}}}, "assets holds images"),
        ({"draws": 65}, "draws must be at most 64."),
        ({"calibration": True}, "calibration must be false"),
        ({"state": None}, "state is missing."),
    ],
)
def test_a_wrong_decision_is_a_bad_request(calling_url, fields, line):
    body = {"model": "x", "state": "s", "questions": {"q": {"type": "noul"}}, **fields}
    refused = pytest.raises(typesafe_sdk.TypeSafeBadRequestError)
    with typed(calling_url) as client, refused as raised:
        client.system_one("s", {"q": Noul(instructions="x")}, extra_body=body)
    assert line in str(raised.value)


def test_images_of_a_decision_are_refused(calling_url):
    image = typesafe_sdk.Image(b"\x89PNG\r\n\x1a\n")
    refused = pytest.raises(typesafe_sdk.TypeSafeBadRequestError, match="holds images")
    with typed(calling_url) as client, refused:
        client.system_one([image], {"q": Noul(instructions="x")})

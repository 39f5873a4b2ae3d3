"""Anthropic's own package against a server whose answers are told."""

from __future__ import annotations

import json
from itertools import repeat

import anthropic
import httpx
import pytest
from anthropic.types import Message, RawMessageDeltaEvent, TextBlock, Usage
from running import call, text, thought, until

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.server.engine import QueueFullError

USER = [{"role": "user", "content": "hi"}]
WEATHER = {
    "name": "weather",
    "description": "Weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@pytest.fixture
def client(told_url, told):
    with anthropic.Anthropic(base_url=told_url, api_key="k", max_retries=0) as client:
        yield client


def ask(client, **fields):
    return client.messages.create(**{"model": "demo", "max_tokens": 64, "messages": USER, **fields})


def picture(source):
    return {"messages": [{"role": "user", "content": [{"type": "image", "source": source}]}]}


def test_a_message_has_text_and_usage(client, told):
    told.say(text("Hello "), text("world"))
    message = ask(client)
    assert [block.model_dump() for block in message.content] == [
        {"type": "text", "text": "Hello world", "citations": None}
    ]
    assert (message.role, message.type, message.model) == ("assistant", "message", "demo")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    told.say(text("Hello "), text("world"))
    beta = client.beta.messages.create(model="demo", max_tokens=64, messages=USER, betas=["x"])
    assert beta.content[0].text == "Hello world"
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (7, 5, 9)


def test_a_stream_adds_up_to_the_message(client, told):
    pieces = [
        thought("Let me "), thought("see."), text("It is "), text("cold."),
        call("weather", 0, city="Oslo"), call("weather", 1, city='"}{ü'), call("clock", 2),
    ]  # fmt: skip
    told.say(*pieces, reason="tool_calls", thought_tokens=4)
    whole = ask(client)
    told.say(*pieces, reason="tool_calls", thought_tokens=4)
    kinds = []
    with client.messages.stream(model="demo", max_tokens=64, messages=USER) as stream:
        for event in stream:
            kinds.append(event.type)
        streamed = stream.get_final_message()
    assert streamed.model_dump(exclude={"id"}) == whole.model_dump(exclude={"id"})
    assert [block.type for block in whole.content] == ["thinking", "text", *["tool_use"] * 3]
    assert whole.content[0].thinking == "Let me see." and whole.content[0].signature
    assert [block.input for block in whole.content[2:]] == [{"city": "Oslo"}, {"city": '"}{ü'}, {}]
    assert whole.stop_reason == "tool_use"
    assert whole.usage.output_tokens_details.thinking_tokens == 4
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 5


def test_the_raw_stream_has_every_field_that_has_a_default(told_url, told):
    """A client that reads strictly must find the fields that the package fills in by itself."""
    told.say(text("a"))
    body = {"model": "demo", "max_tokens": 9, "messages": USER, "stream": True}
    raw = httpx.post(f"{told_url}/v1/messages", json=body).text
    events = [dict(line.split(": ", 1) for line in each.split("\n")) for each in raw.split("\n\n")
              if each]  # fmt: skip
    start, block, *_, delta, stop = [(each["event"], json.loads(each["data"])) for each in events]
    assert all(name == data["type"] for name, data in (start, block, delta, stop))
    assert start[1]["message"].keys() >= set(Message.model_fields)
    assert start[1]["message"]["usage"].keys() >= set(Usage.model_fields)
    assert block[1]["content_block"].keys() >= set(TextBlock.model_fields)
    usage = RawMessageDeltaEvent.model_fields["usage"].annotation
    assert delta[1]["usage"].keys() >= set(usage.model_fields)
    assert stop == ("message_stop", {"type": "message_stop"})


@pytest.mark.parametrize(
    ("end", "reason", "stop"),
    [
        ({"stop_string": "END"}, "stop_sequence", "END"),
        ({"reason": "length"}, "max_tokens", None),
        ({"reason": "length", "context_full": True}, "model_context_window_exceeded", None),
    ],
)
def test_why_an_answer_ended(client, told, end, reason, stop):
    told.say(text("a"), **end)
    message = ask(client, stop_sequences=["END", "\n\n"])
    assert (message.stop_reason, message.stop_sequence) == (reason, stop)
    assert told.asked[-1].stop == ("END", "\n\n")


def test_a_conversation_with_tools_is_translated(client, told):
    messages = [
        {"role": "user", "content": [
            {"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "two"},
        ]},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}},
            {"type": "tool_use", "id": "t2", "name": "weather", "input": {}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": "cold"},
            {"type": "tool_result", "tool_use_id": "t2", "is_error": True,
             "content": [{"type": "text", "text": "no city"}]},
            {"type": "document", "title": "T", "source": {
                "type": "text", "media_type": "text/plain", "data": "d"}},
        ]},
        {"role": "assistant", "content": "It is"},
    ]  # fmt: skip
    system = [{"type": "text", "text": "be brief"}]
    extra = {"temperature": 0.5, "seed": 4, "diffusion_max_steps": 3}
    ask(
        client,
        messages=messages,
        system=system,
        tools=[WEATHER],
        extra_body=extra,
    )
    asked = told.asked[-1]
    function = {"name": "weather", "description": "Weather of a city."}
    function["parameters"] = WEATHER["input_schema"]
    assert asked.tools == [{"type": "function", "function": function}]
    assert (asked.system, asked.prefill) == ("be brief", "It is")
    assert (asked.temperature, asked.seed, asked.settings) == (0.5, 4, {"max_denoising_steps": 3})

    def called(id, **arguments):
        function = {"name": "weather", "arguments": arguments}
        return {"id": id, "type": "function", "function": function}

    def result(id, said):
        return {"role": "tool", "tool_call_id": id, "name": "weather", "content": said}

    assert asked.messages == [
        {"role": "user", "content": "one\ntwo\nthree"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "hm",
         "tool_calls": [called("t1", city="Oslo"), called("t2")]},
        result("t1", "cold"),
        result("t2", "error: no city"),
        {"role": "user", "content": "T\nd"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tool_choice": {"type": "auto"}}, {"tool_choice": "auto"}),
        ({"tool_choice": {"type": "any"}}, {"tool_choice": "required"}),
        ({"tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
        ({"tool_choice": {"type": "tool", "name": "weather"}}, {"tool_choice": "weather"}),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"thinking": True}),
        ({"thinking": {"type": "disabled"}}, {"thinking": False}),
        ({"thinking": {"type": "adaptive"}}, {"thinking": None}),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
         {"json_schema": {"type": "object"}}),
    ],
)  # fmt: skip
def test_settings_are_translated(client, told, fields, expected):
    ask(client, tools=[WEATHER], **fields)
    asked = told.asked[-1]
    assert {name: getattr(asked, name) for name in expected} == expected


def test_one_call_at_most_where_parallel_ones_are_turned_off(client, told):
    told.say(call("weather", 0), call("weather", 1), text("x"), reason="tool_calls")
    choice = {"type": "any", "disable_parallel_tool_use": True}
    message = ask(client, tools=[WEATHER], tool_choice=choice)
    assert [block.id for block in message.content] == ["call_0"]
    assert message.stop_reason == "tool_use"


def test_a_thought_can_be_left_out(client, told):
    told.say(thought("secret"), text("x"))
    thinking = {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
    message = ask(client, thinking=thinking, max_tokens=2048)
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == ""


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, not 0."),
        ({"messages": []}, "messages is empty; give at least one message."),
        (picture({"type": "base64", "media_type": "image/png", "data": "eA=="}),
         "messages.0.content.0.source.data is a picture, and this model reads no pictures"),
        (picture({"type": "url", "url": "http://127.0.0.1/x.png"}),
         "messages.0.content.0.source.type 'url' is not opened; send the picture in base64."),
        ({"messages": [{"role": "user", "content": [{"type": "container_upload"}]}]},
         "messages.0.content.0.type 'container_upload' cannot be read here; give text."),
        ({"extra_body": {"diffusion_pinned": [1]}}, "diffusion_pinned is about a canvas"),
        ({"messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t9", "content": ""}]}]},
         "messages.0.content.0.tool_use_id belongs to no tool_use block before it."),
        ({"messages": [{"role": "robot", "content": ""}]},
         "messages.0.role must be one of user, assistant, system, not 'robot'."),
        ({"messages": [*USER, {"role": "assistant", "content": [
            {"type": "tool_use", "id": "t1", "name": "f", "input": {}}]}]},
         "messages.1.content ends with a call of a tool; give the tool's result."),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
         "tools.0.type 'web_search_20250305' is a tool that only"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name is missing."),
        ({"extra_body": {"mcp_servers": [{"url": "x"}]}}, "mcp_servers names servers of tools"),
        ({"extra_body": {"temperature": "hot"}}, "temperature must be a number of at least 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_a_bad_request_that_names_it(client, told, fields, line):
    with pytest.raises(anthropic.BadRequestError) as raised:
        ask(client, **fields)
    assert raised.value.api_message.startswith(line)
    assert raised.value.type == "invalid_request_error"
    assert not told.asked


def test_errors_of_the_library_reach_the_client(client, told):
    told.say(error=UsageError("the prompt is empty; say what to write about."))
    with pytest.raises(anthropic.BadRequestError, match="the prompt is empty"):
        ask(client)
    with pytest.raises(anthropic.BadRequestError, match="the prompt is empty"):
        ask(client, stream=True)
    told.say(error=QueueFullError("9 requests wait already; try again in 3 seconds.", 3))
    with pytest.raises(anthropic.ServiceUnavailableError) as raised:
        ask(client)
    assert raised.value.response.headers["retry-after"] == "3"
    told.say(text("a"), error=RuntimeError("private"))
    with pytest.raises(anthropic.APIStatusError) as raised:
        list(ask(client, stream=True))
    assert raised.value.type == "api_error" and "private" not in str(raised.value)


def test_fields_without_effect_are_named_unless_they_are_known_to_be_harmless(client, told):
    response = client.messages.with_raw_response.create(
        model="demo", max_tokens=9, messages=USER, metadata={"user_id": "u"},
        extra_body={"top_p": 0.9, "odd": 1, "bad\nname": 2},
    )  # fmt: skip
    assert response.headers["x-ignored-fields"] == "top_p, odd"


def test_tokens_are_counted(client, told):
    count = client.messages.count_tokens(
        model="demo", messages=USER, system="s", tools=[WEATHER], tool_choice={"type": "auto"}
    )
    assert count.input_tokens == 12
    assert told.asked[-1].system == "s" and len(told.asked[-1].tools) == 1


def test_a_client_that_leaves_closes_the_answer(client, told):
    told.pieces = repeat(text("x" * 1000))
    with client.messages.stream(model="demo", max_tokens=9, messages=USER) as stream:
        next(iter(stream.text_stream))

    until(lambda: told.closed == 1)

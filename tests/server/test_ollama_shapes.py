"""Ollama's own package against a server whose answers are told."""

from __future__ import annotations

import json
from itertools import repeat

import httpx
import ollama
import pytest
from running import Text, call, text, thought, until

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.server.pieces import TokenInfo

USER = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}},
}


@pytest.fixture
def client(told_url, told):
    with ollama.Client(host=told_url) as client:
        yield client


def test_a_chat_streams_to_what_it_says_whole(client, told):
    pieces = [thought("Let "), thought("me."), text("It is "), text("cold.")]
    calls = [call("weather", 0, city="Oslo"), call("weather", 1)]
    told.say(*pieces, *calls, reason="tool_calls")
    whole = client.chat("demo", USER)
    assert (whole.message.content, whole.message.thinking) == ("It is cold.", "Let me.")
    assert [each.function.model_dump() for each in whole.message.tool_calls] == [
        {"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "weather", "arguments": {}}
    ]  # fmt: skip
    assert (whole.done, whole.done_reason, whole.model) == (True, "stop", "demo")
    assert (whole.prompt_eval_count, whole.eval_count) == (12, 9)
    assert whole.total_duration >= whole.eval_duration > 0
    told.say(*pieces, *calls, reason="length")
    lines = list(client.chat("demo:latest", USER, stream=True))
    assert [line.done for line in lines] == [False] * 6 + [True]
    assert "".join(line.message.content for line in lines) == "It is cold."
    assert "".join(line.message.thinking or "" for line in lines) == "Let me."
    found = [each for line in lines for each in line.message.tool_calls or ()]
    assert found == list(whole.message.tool_calls)
    assert (lines[-1].done_reason, lines[-1].eval_count) == ("length", 9)
    assert lines[-1].model == "demo:latest"


def test_streaming_is_the_default(told_url, told):
    told.say(text("a"), text("b"))
    got = httpx.post(f"{told_url}/api/generate", json={"model": "demo", "prompt": "p"})
    lines = [json.loads(line) for line in got.text.splitlines()]
    assert [line["response"] for line in lines] == ["a", "b", ""]
    assert got.headers["content-type"].startswith("application/x-ndjson")


def test_a_conversation_with_tools_is_translated(client, told):
    function = {"name": "weather", "arguments": {"city": "Oslo"}}
    messages = [
        {"role": "system", "content": "be brief"},
        *USER,
        {"role": "assistant", "thinking": "hm", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": "cold", "tool_name": "weather"},
    ]
    client.chat("demo", messages, tools=[WEATHER], think=True, format={"type": "object"})
    asked = told.asked[-1]
    called = {"type": "function", "function": function}
    assert asked.messages == [
        *messages[:2],
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [called]},
        {"role": "tool", "content": "cold", "name": "weather"},
    ]
    assert asked.tools[0]["function"]["name"] == "weather"
    assert (asked.thinking, asked.json_schema, asked.prefill) == (True, {"type": "object"}, None)
    client.chat("demo", [*USER, {"role": "assistant", "content": "It is"}], format="json")
    asked = told.asked[-1]
    assert (asked.messages, asked.prefill, asked.json_schema) == (USER, "It is", True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_predict": 7, "temperature": 0, "seed": 3, "stop": ["x", "y"]},
         {"max_tokens": 7, "temperature": 0, "seed": 3, "stop": ("x", "y")}),
        ({"num_predict": -1, "seed": -1, "stop": "x", "num_ctx": 9, "diffusion_max_steps": 3},
         {"settings": {"max_denoising_steps": 3}, "max_tokens": None, "stop": ("x",)}),
    ],
)  # fmt: skip
def test_options_are_translated(client, told, options, expected):
    client.generate("demo", "p", options=options)
    asked = told.asked[-1]
    assert {name: getattr(asked, name) for name in expected} == expected


def test_completions_are_chats_raw_prompts_or_infills(client, told):
    told.say(thought("hm"), text("a"), text("b"))
    whole = client.generate("demo", "p", system="s")
    assert (whole.response, whole.thinking, whole.done_reason) == ("ab", "hm", "stop")
    asked = told.asked[-1]
    assert (asked.messages, asked.system) == ([{"role": "user", "content": "p"}], "s")
    client.generate("demo", "p", raw=True)
    asked = told.asked[-1]
    assert (asked.prompt, asked.suffix, asked.messages) == ("p", None, None)
    client.generate("demo", "p", suffix="s")
    asked = told.asked[-1]
    assert (asked.prompt, asked.suffix, asked.messages) == ("p", "s", None)


def test_log_probabilities_stand_beside_the_text(client, told):
    tokens = (TokenInfo(1, "a", b"a", -0.5, 0.1), TokenInfo(2, "b", b"b", -1.0, 0.2))
    told.say(Text(0, "ab", tokens))
    found = client.generate("demo", "p", logprobs=True).logprobs
    assert [(each.token, each.logprob) for each in found] == [("a", -0.5), ("b", -1.0)]
    assert told.asked[-1].logprobs


def test_loading_a_model_is_answered_at_once(client, told):
    assert client.generate("demo", "").done_reason == "load"
    assert client.generate("demo", "", keep_alive=0).done_reason == "unload"
    assert client.chat("demo", []).done_reason == "load"
    assert not told.asked


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"template": "{{ .Prompt }}"}, "template is a chat template"),
        ({"context": [1, 2]}, "context holds a conversation of Ollama's own"),
        ({"images": [b"x"]}, "images.0 is a picture, and this model reads no pictures"),
        ({"options": {"diffusion_pinned": [1]}}, "options.diffusion_pinned is about a canvas"),
        ({"width": 8}, "width is for models that make images"),
        ({"raw": True, "system": "s"}, "system needs a chat"),
        ({"logprobs": True, "top_logprobs": 3}, "top_logprobs asks for alternatives"),
        ({"think": "much"}, "think must be true, false, or one of low, medium, high, max."),
        ({"options": {"num_predict": 0}}, "options.num_predict must be at least 1"),
        ({"options": {"temperature": "hot"}}, "options.temperature must be a number"),
        ({"options": {"seed": 1.5}}, "options.seed must be an integer of at least -1, not 1.5."),
    ],
)
def test_what_is_wrong_is_a_bad_request_that_names_it(client, told, fields, line):
    with pytest.raises(ollama.ResponseError) as raised:
        client.generate("demo", "p", **fields)
    assert raised.value.status_code == 400 and raised.value.error.startswith(line)
    assert not told.asked


def test_images_in_a_chat_and_other_models_are_refused(client, told):
    with pytest.raises(ollama.ResponseError, match=r"messages.0.images.0 is a picture"):
        client.chat("demo", [{"role": "user", "content": "a", "images": [b"x"]}])
    with pytest.raises(ollama.ResponseError) as raised:
        client.chat("llama", USER)
    assert (raised.value.status_code, raised.value.error) == (
        404, "model 'llama' not found; this server runs demo.",
    )  # fmt: skip


def test_errors_of_the_library_reach_the_client(client, told):
    told.say(error=UsageError("the prompt is too long."))
    for stream in (False, True):
        with pytest.raises(ollama.ResponseError, match="the prompt is too long") as raised:
            list(client.chat("demo", USER, stream=stream))
        assert raised.value.status_code == 400
    told.say(text("a"), error=RuntimeError("private"))
    with pytest.raises(ollama.ResponseError, match="something went wrong"):
        list(client.chat("demo", USER, stream=True))


def test_what_other_servers_do_with_models_is_refused(client, told):
    asking = [
        lambda: client.embed("demo", "x"),
        lambda: client.embeddings("demo", "x"),
        lambda: client.pull("demo"),
        lambda: client.push("demo"),
        lambda: client.create("demo", from_="x"),
        lambda: client.copy("demo", "x"),
        lambda: client.delete("demo"),
    ]
    for ask in asking:
        with pytest.raises(ollama.ResponseError, match="here") as raised:
            ask()
        assert raised.value.status_code == 400


def test_a_client_that_leaves_closes_the_answer(client, told):
    told.pieces = repeat(text("x" * 1000))
    next(client.chat("demo", USER, stream=True))
    until(lambda: told.closed == 1)

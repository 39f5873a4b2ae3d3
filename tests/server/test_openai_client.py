"""OpenAI's own package, and `llm`, against a server as it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import httpx
import jsonschema
import numpy as np
import openai
import pytest

from mlx_diffgemma import generate, infill

SORT = [{"role": "user", "content": "sort: 3 1 2"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "d",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 9}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
FEW = {"diffusion_max_steps": 3}
DATA = "data:image/png;base64,"
CALL = (
    "<|channel>thought\nplan<channel|>So."
    '<|tool_call>call:weather{city:<|"|>Ro}me,<|"|>,days:2}<tool_call|>'
    '<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|><|tool_response>'
)


@pytest.fixture(scope="module")
def demo(demo_url):
    with openai.OpenAI(base_url=f"{demo_url}/v1", api_key="-", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def calling(calling_url):
    with openai.OpenAI(base_url=f"{calling_url}/v1", api_key="-", max_retries=0) as client:
        yield client


def alone(engine: Any, prompt: Any, seed: int, **options: Any) -> str:
    at = engine.model, engine.tokenizer
    return generate(*at, prompt, engine.context, seed=seed, **options)


def test_a_chat_whole_and_streamed(demo, demo_engine):
    whole = demo.chat.completions.create(model="gpt-4", messages=SORT, seed=5)
    said = alone(demo_engine, SORT, 5)
    assert whole.choices[0].message.content == said and whole.choices[0].finish_reason == "stop"
    assert whole.model == "demo" and whole.usage.prompt_tokens > 5
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(
        demo.chat.completions.create(
            model="demo", messages=SORT, seed=5, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    *others, last = chunks
    assert "".join(each.choices[0].delta.content for each in others) == said
    assert others[0].choices[0].delta.role == "assistant"
    assert others[-1].choices[0].finish_reason == "stop" and not last.choices
    # The prompt is known by now, and counts as such.
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert 0 < last.usage.prompt_tokens_details.cached_tokens <= last.usage.prompt_tokens
    assert len({each.id for each in chunks}) == 1


def test_several_answers_with_stops_and_probabilities(demo, demo_engine):
    found = demo.chat.completions.create(
        model="demo", messages=SORT, seed=1, n=3, logprobs=True, top_logprobs=1, stop=["3"]
    )
    texts = [each.message.content for each in found.choices]
    assert texts == [alone(demo_engine, SORT, seed, stop="3") for seed in (1, 2, 3)]
    for choice in found.choices:
        tokens = choice.logprobs.content
        assert b"".join(bytes(each.bytes) for each in tokens).decode() == choice.message.content
        assert all(each.logprob <= 0 and each.entropy >= 0 for each in tokens)
        assert all(each.top_logprobs[0].token == each.token for each in tokens)


def test_the_likeliest_draws_and_max_tokens(demo, demo_engine):
    found = demo.chat.completions.create(
        model="demo", messages=SORT, seed=4, temperature=0, max_completion_tokens=2
    )
    at = demo_engine.model, demo_engine.tokenizer
    expected = generate(*at, SORT, 2, seed=4, draw_likeliest=True)
    assert found.choices[0].message.content == expected
    assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("length", 2)


def test_frames_change_nothing_for_those_who_do_not_know_them(demo, demo_engine):
    chunks = list(
        demo.chat.completions.create(
            model="demo", messages=SORT, seed=5, stream=True,
            extra_body={"diffusion_frames": True, "diffusion_max_steps": 3},
        )
    )  # fmt: skip
    frames = [each for each in chunks if getattr(each, "type", None) == "diffusion_frame"]
    text = "".join(each.choices[0].delta.content for each in chunks)
    assert text == alone(demo_engine, SORT, 5, max_denoising_steps=3)
    assert [(each.block, each.step, each.total) for each in frames][:2] == [(0, 1, 3), (0, 2, 3)]
    assert frames[-1].text == text
    whole = demo.chat.completions.create(
        model="demo", messages=SORT, seed=5, stream=True, extra_body={"diffusing": True}
    )
    *_, last = (each.choices[0].delta.content for each in whole)
    assert last == alone(demo_engine, SORT, 5)


def test_a_form_is_kept(demo):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    found = demo.chat.completions.create(
        model="demo", messages=SORT, response_format=form, seed=1, max_tokens=24
    )
    jsonschema.validate(json.loads(found.choices[0].message.content), schema)
    any_object: Any = {"type": "json_object"}
    found = demo.chat.completions.create(
        model="demo", messages=SORT, response_format=any_object, seed=1, max_tokens=16
    )
    assert isinstance(json.loads(found.choices[0].message.content), dict)


@pytest.mark.parametrize("streamed", [False, True])
def test_calls_and_thoughts(calling, script, ids, streamed):
    script.canvases = [ids(CALL)]
    options: Any = {"model": "m", "messages": SORT, "tools": [WEATHER], "seed": 1}
    if streamed:
        content, thought, calls = "", "", {}
        for chunk in calling.chat.completions.create(**options, stream=True):
            delta, reason = chunk.choices[0].delta, chunk.choices[0].finish_reason
            content += delta.content
            thought += getattr(delta, "reasoning_content", None) or ""
            calls |= {each.index: each for each in delta.tool_calls or []}
        found = list(calls.values())
    else:
        choice = calling.chat.completions.create(**options).choices[0]
        content, thought = choice.message.content, choice.message.reasoning_content
        found, reason = choice.message.tool_calls, choice.finish_reason
    assert (content, thought, reason) == ("So.", "plan", "tool_calls")
    arguments = [json.loads(each.function.arguments) for each in found]
    assert arguments == [{"city": "Ro}me,", "days": 2}, {"city": "Oslo"}]
    assert len({each.id for each in found}) == 2


def test_a_stream_of_calls_adds_up_in_the_package(calling, script, ids):
    script.canvases = [ids(CALL.replace('weather{city:<|"|>Oslo<|"|>}', "clock{}"))]
    clock: Any = {"type": "function", "function": {"name": "clock"}}
    begun, ended = [], []
    with calling.chat.completions.stream(
        model="m", messages=SORT, tools=[WEATHER, clock], seed=1
    ) as stream:
        for event in stream:
            if event.type == "tool_calls.function.arguments.delta":
                begun.append((event.index, event.arguments_delta))
            if event.type == "tool_calls.function.arguments.done":
                ended.append((event.index, event.name, event.arguments))
        (choice,) = stream.get_final_completion().choices
    assert [json.loads(said) for _, said in begun] == [{"city": "Ro}me,", "days": 2}, {}]
    assert ended == [(0, "weather", begun[0][1]), (1, "clock", "{}")]
    calls = choice.message.tool_calls
    assert [(each.function.name, each.function.arguments) for each in calls] == [
        ("weather", begun[0][1]), ("clock", "{}")
    ]  # fmt: skip
    assert choice.finish_reason == "tool_calls" and choice.message.content == "So."


def test_results_of_calls_go_back(calling, script, ids):
    script.canvases = [ids(CALL)]
    first = calling.chat.completions.create(
        model="m", messages=SORT, tools=[WEATHER], parallel_tool_calls=False
    )
    message = first.choices[0].message
    assert len(message.tool_calls) == 1
    script.canvases = [ids("Warm.<turn|>")]
    result: Any = {
        "role": "tool", "tool_call_id": message.tool_calls[0].id, "content": '{"degrees": 20}',
    }  # fmt: skip
    messages: Any = [*SORT, message.model_dump(exclude_none=True), result]
    found = calling.chat.completions.create(model="m", messages=messages, tools=[WEATHER])
    assert found.choices[0].message.content == "Warm."
    assert found.usage.prompt_tokens > first.usage.prompt_tokens


def test_a_call_that_must_be_made(calling):
    found = calling.chat.completions.create(
        model="m", messages=SORT, tools=[WEATHER], tool_choice="required", seed=2, max_tokens=90,
        extra_body={"diffusion_max_steps": 4},
    )  # fmt: skip
    (call,) = found.choices[0].message.tool_calls
    assert call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    clock: Any = {"type": "function", "function": {"name": "clock"}}
    named: Any = {"type": "function", "function": {"name": "clock"}}
    options: Any = {
        "model": "m", "messages": SORT, "tools": [WEATHER, clock], "seed": 2,
        "tool_choice": named, "extra_body": {"diffusion_max_steps": 2},
    }  # fmt: skip
    with calling.chat.completions.stream(**options) as stream:
        (choice,) = stream.get_final_completion().choices
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("clock", "{}")
    assert choice.finish_reason == "tool_calls" and not choice.message.content


def test_completions_and_what_stands_between(demo, demo_engine):
    found = demo.completions.create(
        model="demo", prompt=["1 2 3", "4 5"], seed=3, max_tokens=8, n=2, logprobs=1, extra_body=FEW
    )
    at = demo_engine.model, demo_engine.tokenizer
    expected = [
        generate(*at, prompt, 8, seed=seed, raw=True, max_denoising_steps=3)
        for prompt in ("1 2 3", "4 5")
        for seed in (3, 4)
    ]
    assert [each.text for each in found.choices] == expected
    for each in found.choices:
        assert "".join(each.logprobs.tokens) == each.text
        np.testing.assert_array_equal(each.logprobs.text_offset, np.arange(len(each.text)))
    echoed = demo.completions.create(
        model="demo", prompt="1 2 3", seed=3, max_tokens=8, echo=True, extra_body=FEW
    )
    assert echoed.choices[0].text == "1 2 3" + expected[0]
    streamed = demo.completions.create(
        model="demo", prompt="1 2 3", seed=3, max_tokens=8, stream=True, extra_body=FEW
    )
    assert "".join(each.choices[0].text for each in streamed) == expected[0]
    between = demo.completions.create(
        model="demo", prompt="1 2 ", suffix=" 4\r\n", seed=3, max_tokens=2
    )
    gap = infill(*at, "1 2 [[?]] 4\r\n", lengths=[1, 2], seed=3)
    assert gap.text == "1 2 " + between.choices[0].text + " 4\r\n"


def test_what_fills_in_the_middle_is_shaped_as_a_chat(demo, demo_url, demo_engine):
    told = {"prompt": "1 2 ", "suffix": " 4", "seed": 3, "max_tokens": 2}
    whole = httpx.post(f"{demo_url}/v1/fim/completions", json=told, timeout=60).json()
    expected = demo.completions.create(model="demo", **told).choices[0].text
    assert whole["choices"][0]["message"]["content"] == expected
    with httpx.stream(
        "POST", f"{demo_url}/v1/fim/completions", json={**told, "stream": True}, timeout=60
    ) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
    assert "".join(each["content"] for each in deltas) == expected


def test_models(demo, demo_engine):
    (model,) = demo.models.list().data
    assert (model.id, model.context_length) == ("demo", demo_engine.context)
    assert demo.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        demo.models.retrieve("other")


def shown(part: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [part]}]


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("messages", [], "messages"),
        ("messages", shown({"type": "input_audio"}), "messages.0.content.0.type"),
        ("messages", shown(picture("http://x/a.png")), "messages.0.content.0.image_url"),
        ("messages", shown(picture(f"{DATA}iVBO")), "messages.0.content.0.image_url"),
        ("logit_bias", {"5": 1}, "logit_bias"),
        ("top_logprobs", 5, "top_logprobs"),
        ("temperature", -1, "temperature"),
        ("n", 200, "n"),
        ("n", 2**40, "n"),
        ("guided_json", {}, None),
        ("guided_json", {"type": "object"}, "guided_json"),
        ("tool_choice", "required", "tools"),
        ("diffusion_seed_canvas", [1], "diffusion_seed_canvas"),
        ("stop", ["a", 3], "stop"),
        ("modalities", ["text", "audio"], "modalities"),
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_named(demo_url, field, value, named):
    told = {"messages": SORT, "max_tokens": 1, field: value}
    response = httpx.post(f"{demo_url}/v1/chat/completions", json=told, timeout=60)
    if named is None:
        assert response.status_code == 200
        return
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == named, error
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]


def test_what_has_no_effect_is_told(demo_url):
    told = {"messages": SORT, "max_tokens": 1, "top_p": 0.9, "user": "me", "unheard_of": 1}
    response = httpx.post(f"{demo_url}/v1/chat/completions", json=told, timeout=60)
    assert response.headers["x-ignored-fields"] == "top_p, unheard_of"


def test_llm(demo_url, demo_engine, tmp_path):
    """The command line that people have, by its own configuration file."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: here\n  model_name: demo\n  api_base: {demo_url}/v1\n"
    )
    command = [
        sys.executable,
        "-m",
        "llm",
        "-m",
        "here",
        "sort: 3 1 2",
        "--key",
        "-",
        "-o",
        "seed",
        "5",
    ]
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert found.stdout == alone(demo_engine, SORT, 5) + "\n", found.stderr

"""Our own routes: in place as the library does it, and one canvas that its client holds."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pytest

from mlx_diffgemma import edit, fill, infill, stream_generate

SORT = [{"role": "user", "content": "sort: 3 1 2"}]


@pytest.fixture(scope="module")
def post(demo_url):
    with httpx.Client(base_url=demo_url, timeout=60) as client:

        def post(path: str, status: int = 200, **told: Any) -> Any:
            response = client.post(path, json=told)
            assert response.status_code == status, response.text
            return response.json()

        post.client = client
        yield post


def streamed(post: Any, **told: Any) -> list[Any]:
    with post.client.stream("POST", "/v1/canvas", json={**told, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_filling_and_editing_are_the_librarys(post, demo_engine):
    at = demo_engine.model, demo_engine.tokenizer
    found = post("/v1/infill", text="1 2 [[?]] 4\r\n", lengths=[1, 2], seed=1)
    assert found["text"] == infill(*at, "1 2 [[?]] 4\r\n", lengths=[1, 2], seed=1).text
    template = "{a:1|2} and {b:digits}"
    found = post("/v1/fill", template=template, lengths=[1, 2], seed=1)
    assert found["slots"] == fill(*at, template, lengths=[1, 2], seed=1).slots
    text = "1\n2\n3\n"
    found = post("/v1/edit", text=text, instruction="count", lines=[2, 2], lengths=[1], seed=1)
    expected = edit(*at, text, "count", (2, 2), lengths=[1], seed=1)
    assert (found["text"], found["lines"]) == (expected.text, [2, 2])
    assert found["passes"] == expected.passes and found["usage"]["prompt_tokens"] > 5


def test_a_canvas_is_the_first_one_of_an_answer(post, demo_engine):
    *frames, last = streamed(post, messages=SORT, seed=5)
    at = demo_engine.model, demo_engine.tokenizer
    steps = [each for each in stream_generate(*at, SORT, seed=5) if each.step]
    expected = [each for each in steps if each.canvas_index == 0]
    assert [each["ids"] for each in frames] == [each.canvas for each in expected]
    np.testing.assert_allclose(frames[0]["entropy"], expected[0].entropy, atol=1e-3)
    np.testing.assert_allclose(frames[0]["probability"], expected[0].probability, atol=1e-3)
    assert [each["step"] for each in frames] == list(range(1, len(frames) + 1))
    assert last["ids"] == frames[-1]["ids"] and last["done"] and last["text"] == expected[-1].draft
    whole = post("/v1/canvas", messages=SORT, seed=5)
    assert whole["ids"] == last["ids"] and whole["usage"]["prompt_tokens"] > 5


def test_pins_are_held_and_a_fork_is_the_same_up_to_its_step(post):
    frames = streamed(post, messages=SORT, seed=5, diffusion_max_steps=8)[:-1]
    pins = {"0": 60, "7": 61}
    pinned = streamed(post, messages=SORT, seed=5, pins=pins)
    assert all((each["ids"][0], each["ids"][7]) == (60, 61) for each in pinned)
    change = {"after": 2, "pins": {"3": 62}}
    forked = streamed(post, messages=SORT, seed=5, diffusion_max_steps=8, changes=[change])
    assert forked[:2] == frames[:2]
    assert all(each["ids"][3] == 62 for each in forked[2:]) and frames[2]["ids"][3] != 62
    let_go = [change, {"after": 3, "pins": {"3": None}}]
    freed = streamed(post, messages=SORT, seed=5, diffusion_max_steps=8, changes=let_go)
    assert freed[2] == forked[2] and freed[3]["entropy"][3] > 0 == forked[3]["entropy"][3]


def test_noise_on_a_span_is_written_anew(post):
    ids = post("/v1/canvas", messages=SORT, seed=5)["ids"]
    asked: dict[str, Any] = {"messages": SORT, "seed": 5, "diffusion_seed_canvas": ids}
    read = post("/v1/canvas", **asked, diffusion_max_steps=1)
    assert read["ids"] == ids  # it stands by what it wrote
    changed = {}
    for strength in (0.0, 0.5, 1.0):
        # A step that may take nothing of its own shows what it started from.
        noise = {"start": 4, "stop": 20, "strength": strength}
        pins = {str(n): token for n, token in enumerate(ids) if not 4 <= n < 20}
        frame = streamed(
            post, **asked, pins=pins, changes=[{"after": 0, "noise": noise, "step": 48}],
            diffusion_max_steps=48, diffusion_entropy_bound=1e-9,
        )[0]  # fmt: skip
        assert all(frame["ids"][int(n)] == token for n, token in pins.items())
        changed[strength] = sum(frame["entropy"][4:20])
    # The more of it is noise, the less is certain.
    assert changed[0.0] < changed[0.5] < changed[1.0]


def test_a_canvas_is_read_without_being_changed(post, demo_engine):
    ids = post("/v1/canvas", messages=SORT, seed=5)["ids"]
    asked: dict[str, Any] = {
        "messages": SORT, "seed": 5, "diffusion_seed_canvas": ids, "diffusion_read_only": True,
        "diffusion_max_steps": 1,
    }  # fmt: skip
    read = post("/v1/canvas", **asked, logprob_token_ids=[5, 9], top=3)
    assert read["ids"] == ids and len(read["positions"]) == len(ids)
    for position in read["positions"]:
        chances = [each["probability"] for each in position["alternatives"]]
        assert chances == sorted(chances, reverse=True) and len(chances) == 3
        assert [each["id"] for each in position["wanted"]] == [5, 9]
    bound = post("/v1/canvas", **asked, logprob_token_ids=[5, 9], diffusion_constrained=True)
    assert set(bound["ids"]) <= {5, 9}
    for free, position in zip(read["positions"], bound["positions"], strict=True):
        chances = {each["id"]: each["logprob"] for each in position["alternatives"]}
        assert sum(map(np.exp, chances.values())) == pytest.approx(1, abs=1e-4)
        five, nine = (each["logprob"] for each in free["wanted"])
        assert chances[5] - chances[9] == pytest.approx(five - nine, abs=1e-3)
    written = post(
        "/v1/canvas", messages=SORT, seed=5, logprob_token_ids=[5, 9], diffusion_constrained=True
    )
    assert set(written["ids"]) <= {5, 9}


def test_alternatives_are_those_that_a_step_chose_from(post):
    frames = streamed(post, messages=SORT, seed=5)
    for step in (1, 3):
        found = post("/v1/canvas/alternatives", messages=SORT, seed=5, step=step)
        frame = frames[step - 1]
        assert [each["alternatives"][0]["id"] for each in found["positions"]] == frame["ids"]
        best = [each["alternatives"][0]["probability"] for each in found["positions"]]
        np.testing.assert_allclose(best, frame["probability"], rtol=1e-3)
        entropy = [each["entropy"] for each in found["positions"]]
        np.testing.assert_allclose(entropy, frame["entropy"], atol=1e-3)
    (one,) = post("/v1/canvas/alternatives", messages=SORT, seed=5, step=3, position=7)["positions"]
    assert one == found["positions"][7] and len(one["alternatives"]) == 8


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ({"diffusion_seed_canvas": [1, 2]}, "diffusion_seed_canvas"),
        ({"diffusion_seed_canvas": [500] * 64}, "diffusion_seed_canvas.0"),
        ({"diffusion_pinned": [1]}, "diffusion_pinned"),
        ({"pins": {"64": 1}}, "pins.64"),
        ({"pins": {"1": -5}}, "pins.1"),
        ({"diffusion_constrained": True}, "diffusion_constrained"),
        ({"changes": [{"after": 1, "noise": {"start": 5, "stop": 2}}]}, "changes.0.noise"),
        ({"diffusion_frames": True}, "diffusion_frames"),
        ({"diffusion_max_steps": 10**9}, "diffusion_max_steps"),
        ({"messages": None}, "messages"),
        ({"prompt": [1, 2]}, "messages"),
    ],
)
def test_what_does_not_fit_a_canvas_is_named(post, told, named):
    error = post("/v1/canvas", 400, **{"messages": SORT, **told})["error"]
    assert error["param"] == named, error

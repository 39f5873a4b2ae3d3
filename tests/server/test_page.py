"""What the page asks for: live canvases that are reached into, and its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib import resources
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.server import live, page
from mlx_diffgemma.server.engine import Engine
from mlx_diffgemma.server.orders import Order
from mlx_diffgemma.server.writing import _near, _with_kept

PREACT_AND_HTM = "72284e8e9079c87817145df1110f74e8a2aa040b2fc384922e18dfcb46fc1fd7"
GIVENS = "4..613\n61.42.\n.6...4\n134...\n3265.1\n5...6."


@pytest.fixture
def client(demo_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo_url, timeout=60) as client:
        yield client


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.split("\n") if line]


def steps(response: httpx.Response) -> list[dict[str, Any]]:
    return [line for line in lines(response) if "ids" in line]


class Canvas:
    """A live canvas as the page sees it."""

    def __init__(self, client: httpx.Client, **request: Any) -> None:
        self._client, self.words = client, dict[str, Any]()
        response = client.post("/v1/page/canvases", json=request)
        self.name = lines(response)[0]["canvas"]
        self.frames = self._seen(steps(response))

    def order(self, *changes: dict[str, Any], **order: Any) -> list[dict[str, Any]]:
        path = f"/v1/page/canvases/{self.name}"
        return self._seen(steps(self._client.post(path, json={"changes": list(changes), **order})))

    def alternatives(self, at: int, place: int) -> list[dict[str, Any]]:
        path = f"/v1/page/canvases/{self.name}/alternatives"
        found = self._client.post(path, json={"at": at, "place": place})
        assert found.status_code == 200, found.text
        return found.json()["alternatives"]

    def text(self, frame: dict[str, Any]) -> str:
        words = [self.words[str(token)] for token in frame["ids"]]
        return "".join(word for word in words if isinstance(word, str))

    def _seen(self, frames: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for frame in frames:
            self.words |= frame["words"]
        return frames


def test_a_sudoku_forms_around_its_givens(client: httpx.Client) -> None:
    canvas = Canvas(client, sudoku=GIVENS, seed=1)
    assert canvas.frames[-1]["done"]
    for frame in canvas.frames:
        words = [canvas.words[str(token)] for token in frame["ids"]]
        assert all(a in (".", b) for a, b in zip(GIVENS, words, strict=False))
    text = canvas.text(frame)
    assert sudoku.is_valid_grid(text)
    assert [frame["at"] for frame in canvas.frames] == list(range(len(canvas.frames)))


def test_what_is_pinned_holds_and_what_is_freed_forms_again(client: httpx.Client) -> None:
    canvas = Canvas(client, prompt="count\n28 41", seed=1)
    assert canvas.text(canvas.frames[-1]) == " ".join(map(str, range(28, 42)))
    frames = canvas.order({"kind": "pin", "place": 0, "text": "77"}, strength=0.5)
    assert all(frame["pins"] == [0, 1] for frame in frames)
    assert all(canvas.text(frame).startswith("77") for frame in frames)
    assert frames[-1]["done"]
    frames = canvas.order({"kind": "free", "place": 0, "count": 2}, strength=0.0)
    assert frames[0]["pins"] == [] and frames[0]["nats"][:2] == [-1, -1]
    assert canvas.text(frames[-1]) == " ".join(map(str, range(28, 42)))


def test_a_span_is_renoised_and_no_more(client: httpx.Client) -> None:
    canvas = Canvas(client, prompt="count\n28 41", seed=1)
    before = canvas.frames[-1]
    changes = [
        {"kind": "pin", "place": 4, "token": before["ids"][4]},
        {"kind": "renoise", "place": 3, "count": 5, "strength": 1.0},
    ]
    (frame, *_, last) = canvas.order(*changes)
    noise = [place for place, nats in enumerate(frame["nats"]) if nats < 0]
    assert noise == [3, 5, 6, 7]
    kept = [place for place in range(64) if place not in noise]
    assert [frame["ids"][p] for p in kept] == [before["ids"][p] for p in kept]
    assert canvas.text(last) == canvas.text(before)


def test_an_earlier_step_goes_on_as_another_branch(client: httpx.Client) -> None:
    canvas = Canvas(client, prompt="sudoku", seed=1)
    whole = canvas.frames
    assert len(whole) > 4
    path = f"/v1/page/canvases/{canvas.name}"
    told = lines(client.post(path, json={"at": 1}))
    assert told[0] == {"back": 1}
    branch = [line for line in told if "ids" in line]
    assert branch[0]["at"] == 2
    assert [frame["ids"] for frame in branch] != [frame["ids"] for frame in whole[2:]]


def test_a_run_may_be_a_single_step_and_goes_on_to_the_same_end(client: httpx.Client) -> None:
    whole = Canvas(client, prompt="count\n28 41", seed=4).frames
    canvas = Canvas(client, prompt="count\n28 41", seed=4, run=0)
    frames = list(canvas.frames)
    assert len(frames) == 1 and all(nats == -1 for nats in frames[0]["nats"])
    while not frames[-1]["done"]:
        more = canvas.order(run=1)
        assert len(more) == 1
        frames += more
    assert [frame["ids"] for frame in frames] == [frame["ids"] for frame in whole]


def test_alternatives_are_those_that_the_place_allows(client: httpx.Client) -> None:
    canvas = Canvas(client, sudoku=GIVENS, seed=1)
    last = len(canvas.frames) - 1
    found = canvas.alternatives(last, 1)
    assert {each["word"] for each in found} == set("123456")
    assert sum(each["probability"] for each in found) == pytest.approx(1, abs=1e-4)
    assert found[0]["token"] == canvas.frames[-1]["ids"][1]
    chances = [each["probability"] for each in found]
    assert chances == sorted(chances, reverse=True)
    free = Canvas(client, prompt="count\n28 41", seed=1)
    assert len(free.alternatives(0, 63)) == 8


def test_a_canvas_begins_from_what_the_page_kept(client: httpx.Client) -> None:
    first = Canvas(client, prompt="count\n28 41", seed=1).frames[-1]
    pins = {"0": first["ids"][0]}
    canvas = Canvas(client, prompt="count\n28 41", ids=first["ids"], pins=pins, strength=0.5)
    assert canvas.frames[0]["ids"] == first["ids"] and canvas.frames[0]["pins"] == [0]
    assert canvas.text(canvas.frames[-1]) == " ".join(map(str, range(28, 42)))


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("canvases", {}, 400, "prompt is missing"),
        ("canvases", {"sudoku": "12"}, 400, "six rows of six"),
        ("canvases", {"prompt": "a", "ids": [1]}, 400, "64 tokens"),
        ("canvases", {"prompt": "a", "ids": [999] * 64}, 400, "token ids below 128"),
        ("canvases", {"prompt": "a", "pins": {"64": 1}}, 400, "outside the canvas"),
        ("canvases/none", {}, 404, "start it again"),
        ("rewrite", {"text": "a", "first": 2, "last": 2}, 400, "not in the text"),
        ("template", {"template": "none"}, 400, "no slot"),
        ("chat", {"messages": [{"role": "nobody", "content": ""}]}, 400, "role"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_line(
    client: httpx.Client, path: str, body: dict[str, Any], status: int, said: str
) -> None:
    response = client.post(f"/v1/page/{path}", json=body)
    assert response.status_code == status
    assert said in response.json()["error"]["message"]


def test_a_change_outside_the_canvas_is_refused(client: httpx.Client) -> None:
    canvas = Canvas(client, prompt="count\n1 2", run=0)
    for change, said in (
        ({"kind": "pin", "place": 63, "text": "ab"}, "outside"),
        ({"kind": "pin", "place": 0, "text": "é"}, "cannot write"),
        ({"kind": "free", "place": 64}, "outside"),
        ({"kind": "renoise", "place": 0, "strength": 2}, "from 0 to 1"),
    ):
        path = f"/v1/page/canvases/{canvas.name}"
        response = client.post(path, json={"changes": [change]})
        assert response.status_code == 400 and said in response.text, response.text


def test_the_files_of_the_page_allow_nothing_from_elsewhere(client: httpx.Client) -> None:
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    names = set(page._files())
    assert "/page/app.js" in response.text and "<style" not in response.text
    for name in names:
        found = client.get(f"/page/{name}")
        assert found.status_code == 200 and found.headers["x-content-type-options"] == "nosniff"
        again = client.get(f"/page/{name}", headers={"if-none-match": found.headers["etag"]})
        assert again.status_code == 304
    assert client.get("/page/../page.py").status_code == 404
    assert sum(len(content) for content, _ in page._files().values()) < 1_000_000


def test_what_is_of_others_is_as_they_published_it() -> None:
    content, _ = page._files()["preact-htm.js"]
    comment, _, published = content.partition(b" */\n")
    assert comment.startswith(b"/* htm 3.1.1 ")
    assert hashlib.sha256(published).hexdigest() == PREACT_AND_HTM
    licences = resources.files("mlx_diffgemma.server").joinpath("static/LICENSES.txt").read_text()
    assert "Preact" in licences and "Apache License" in licences


def test_the_canvases_used_least_recently_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    class Held(SimpleNamespace):
        nbytes = 10

    kept = live.LiveCanvases()
    monkeypatch.setattr(live, "MOST_BYTES", 35)
    for name in "abc":
        kept.keep(Held(name=name))  # type: ignore[arg-type]
    assert kept.get("a") is not None
    kept.keep(Held(name="d"))  # type: ignore[arg-type]
    assert [kept.get(name) is not None for name in "abcd"] == [True, False, True, True]
    kept.keep(Held(name="e", nbytes=1000))  # type: ignore[arg-type]
    assert [kept.get(name) is not None for name in "acde"] == [False, False, False, True]
    grows = Held(name="f")
    monkeypatch.setattr(live, "MOST_BYTES", 2000)
    kept.keep(grows)  # type: ignore[arg-type]
    grows.nbytes = 1500
    assert kept.get("e") is not None and kept.get("f") is None


def test_kept_slots_become_text_whatever_they_hold() -> None:
    template = "{{x}} {a:word} {b:late|on time} {c:/[A-Z]{2}/} {a}"
    assert _with_kept(template, {"a": "{}"}) == "{{x}} {{}} {b:late|on time} {c:/[A-Z]{2}/} {{}}"
    assert _with_kept(template, {"b": "late"}) == "{{x}} {a:word} late {c:/[A-Z]{2}/} {a}"


def test_the_text_around_a_change_is_whole_lines() -> None:
    text = "one\ntwo\nthree\n"
    assert _near(text, 100) == _near(text, 100, end=True) == text
    assert _near(text, 9) == "one\ntwo\n"
    assert _near(text, 7, end=True) == "three\n"
    assert _near("x" * 50, 10) == "x" * 10


def test_an_order_is_left_to_the_run_that_it_began(demo_engine: Engine) -> None:
    vocabulary = Vocabulary(demo_engine.tokenizer, demo_engine.model.config.text.vocab_size, (1,))
    canvas = live.Live(DiffusionConfig(), vocabulary, [2], 8, 0)
    first = canvas.offer(Order(steps=1))
    assert first is not None and len(canvas._taken(first)) == 1
    assert canvas.offer(Order(steps=2)) is None and not canvas._over(first)
    canvas.end(first)  # its client went away, while it goes on until its next pause
    second = canvas.offer(Order(steps=3))
    assert second is not None and canvas._taken(first) == [] and canvas._over(first)
    canvas.end(first)
    assert canvas._taken(second) == [Order(steps=3)]
    assert canvas.offer(Order(steps=4)) is None, "the second run goes on"
    assert not canvas._over(second) and canvas._taken(second) and canvas._over(second)


def test_no_answer_takes_more_steps_than_there_may_be(client: httpx.Client) -> None:
    asked = {"messages": [{"role": "user", "content": "hi"}], "steps": 1_000_000}
    refused = client.post("/v1/page/chat", json=asked)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "steps"

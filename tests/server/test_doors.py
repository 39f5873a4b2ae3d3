"""The doors of the server: who gets in, what is read, and how answers end."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from running import until
from serving import FakeEngine, exchange, post, serving, status

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.server import lifecycle, streams
from mlx_diffgemma.server.config import ServerSettings
from mlx_diffgemma.server.security import check_exposure


@pytest.fixture(scope="module")
def running() -> Iterator[SimpleNamespace]:
    with serving(allow_origin=("https://app.example",), max_messages=3) as running:
        yield running


def test_a_server_that_others_can_reach_needs_a_key() -> None:
    check_exposure(ServerSettings(host="127.0.0.1"))
    check_exposure(ServerSettings(host="::1"))
    check_exposure(ServerSettings(host="localhost"))
    check_exposure(ServerSettings(host="0.0.0.0", api_key="k"))
    for host in ("0.0.0.0", "::", "192.168.1.2", "mac.local", "localhost.evil.example"):
        with pytest.raises(UsageError, match="--api-key"):
            check_exposure(ServerSettings(host=host))
    for origin in ("app.example", "https://app.example/", "https:", ""):
        with pytest.raises(UsageError, match="origin"):
            check_exposure(ServerSettings(allow_origin=(origin,)))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", 200), ("127.0.0.1:8080", 200), ("[::1]:8080", 200), ("app.localhost", 200),
        ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("localhost@evil.example", 400),
        ("", 400), ("a b", 400),
    ],
)  # fmt: skip
def test_only_names_of_this_machine_are_answered(
    running: SimpleNamespace, host: str, expected: int
) -> None:
    assert status(exchange(running.port, post("/echo", {}, host=host))) == expected


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("https://app.example", 200), ("http://localhost", 200), ("https://evil.example", 403),
        ("null", 403), ("https://app.example.evil.example", 403), ("http://localhost:1", 403),
    ],
)  # fmt: skip
def test_pages_of_other_origins_may_not_even_ask(
    running: SimpleNamespace, origin: str, expected: int
) -> None:
    before = running.echo.begun
    found = exchange(running.port, post("/echo", {}, f"Origin: {origin}"))
    assert status(found) == expected
    assert running.echo.begun - before == (expected == 200)
    named = b"access-control-allow-origin: https://app.example" in found.lower()
    assert named == (origin == "https://app.example")


def test_a_preflight_is_answered_for_an_allowed_page_alone(running: SimpleNamespace) -> None:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    allowed = httpx.options(
        f"{running.url}/echo", headers={"origin": "https://app.example", **asks}
    )
    assert allowed.status_code == 204
    assert allowed.headers["access-control-allow-headers"] == "x-api-key"
    refused = httpx.options(
        f"{running.url}/echo", headers={"origin": "https://evil.example", **asks}
    )
    assert refused.status_code == 403
    assert "access-control-allow-origin" not in refused.headers


def test_a_key_opens_every_route_but_health() -> None:
    with serving(api_key="sesame") as running:
        for headers, expected in (
            ({}, 401), ({"authorization": "Bearer sesame"}, 200), ({"x-api-key": "sesame"}, 200),
            ({"authorization": "bearer  sesame"}, 200), ({"authorization": "Basic sesame"}, 401),
            ({"x-api-key": "sesam"}, 401), ({"x-api-key": "sesame\u00e9".encode("latin-1")}, 401),
            ({"x-api-key": ""}, 401),
        ):  # fmt: skip
            got = httpx.post(f"{running.url}/echo", json={}, headers=headers)
            assert got.status_code == expected, headers
        assert "key" in got.json()["echo error"]
        assert httpx.get(f"{running.url}/metrics").status_code == 401
        assert httpx.get(f"{running.url}/health").json()["status"] == "ok"
        assert running.echo.begun == 3


DEEP = b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", 400), (b"[]", 400), (b'"a"', 400), (b"{", 400), (b'{"a": 1,}', 400), (b"\xff{}", 400),
        (b'{"a": "\xed\xa0\x80"}', 400), (b'{"a": "\\ud800"}', 400), (b'{"\\udc00": 1}', 400),
        (b'{"a": "\\ud83e\\udd8a"}', 200), (b'{"a": NaN}', 400), (b'{"a": -Infinity}', 400),
        (b'{"a": 1e999}', 400), (b'{"a": [1' + b"0" * 400 + b"]}", 400),
        (b'{"a": 1' + b"0" * 5000 + b"}", 400), (DEEP, 400), (b"[" * 100_000, 400),
        (b'{"a":' * 100_000, 400), (b'{"messages": [1, 2, 3, 4]}', 400), (b'\xef\xbb\xbf{}', 200),
        (b'{"a": "' + b"x" * (23 << 20) + b'"}', 413), (b" " * (33 << 20), 413),
    ],
    ids=lambda value: None if isinstance(value, int) else repr(value[:24]),
)  # fmt: skip
def test_what_is_no_request_is_refused_in_the_shape_of_the_route(
    running: SimpleNamespace, body: bytes, expected: int
) -> None:
    got = httpx.post(f"{running.url}/echo", content=body)
    assert got.status_code == expected, got.text
    assert expected == 200 or got.json()["echo error"]


def test_errors_keep_the_servers_secrets(running: SimpleNamespace) -> None:
    got = httpx.get(f"{running.url}/broken")
    assert got.status_code == 500
    assert "secret" not in got.text and "Traceback" not in got.text
    assert got.json()["echo error"].startswith("something went wrong")
    missing = httpx.post(f"{running.url}/echo/nothing", json={})
    assert missing.status_code == 404 and "no such route" in missing.json()["echo error"]
    assert httpx.get(f"{running.url}/echo").status_code == 405


SMUGGLED = [
    b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n{}",
    b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n{}",
    b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    b"POST /echo HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    b"POST /echo HTTP/1.1\r\n\r\n",
    b"POST /echo HTTP/1.0\r\n\r\n",
    b"POST http://evil.example/echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n folded\r\n\r\n{}",
    b"POST /echo\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64 + b"\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 20_000 + b"\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\n"
    b"Content-Length: 2\r\n\r\n{}",
    b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
]


@pytest.mark.parametrize("sent", SMUGGLED, ids=lambda sent: repr(sent[:70]))
def test_what_is_no_http_is_refused(running: SimpleNamespace, sent: bytes) -> None:
    before = running.echo.begun
    assert 400 <= status(exchange(running.port, sent)) < 500
    assert running.echo.begun == before


def test_a_request_behind_a_refused_one_is_not_taken_for_one(running: SimpleNamespace) -> None:
    before = running.echo.begun
    both = (
        b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + post("/echo", {})
    )
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(both)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.count(b"HTTP/1.1") == 1 and status(received) == 400
    assert running.echo.begun == before


def test_slow_clients_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(streams, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(streams, "STALL_SECONDS", 0.3)
    with serving(max_connections=3) as running:
        for sent in (b"", b"POST /echo HTTP/1.1\r\nHost: lo"):  # no head
            assert exchange(running.port, sent) == b""
        late = post("/echo", {"a": "b"})[:-3]  # a body that never ends
        assert status(exchange(running.port, late)) == 408

        asked = {"as": "sse", "events": 10_000, "size": 100_000}
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as reader:
            reader.sendall(post("/echo", asked))
            until(lambda: running.echo.closed == 1)  # what nobody reads is not written on
            assert running.echo.ended == 0
        until(lambda: running.server.metrics.open == 0)

        several = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(3)]
        assert status(exchange(running.port, post("/echo", {}))) == 503
        for each in several:
            each.close()
        time.sleep(0.1)
        assert status(exchange(running.port, post("/echo", {}))) == 200


@pytest.mark.parametrize(
    "asked", [{"wait": 60}, {"as": "sse", "wait": 60}, {"as": "lines", "wait": 60}]
)
def test_a_client_that_goes_away_ends_the_work(
    running: SimpleNamespace, asked: dict[str, Any]
) -> None:
    echo, metrics = running.echo, running.server.metrics
    begun, ended, gone = echo.begun, echo.ended, metrics.vanished["/echo"]
    connection = socket.create_connection(("127.0.0.1", running.port))
    connection.sendall(post("/echo", asked))
    until(lambda: echo.begun == begun + 1)
    connection.close()
    until(lambda: echo.closed == echo.begun)
    assert echo.ended == ended
    until(lambda: metrics.vanished["/echo"] == gone + 1)
    assert metrics.open == 0


def test_streams_stay_alive_and_say_how_they_failed(
    running: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(**asked: Any) -> httpx.Response:
        return httpx.post(f"{running.url}/echo", json=asked)

    assert ask(**{"as": "sse", "events": 2}).text == (
        'data: {"number":0,"filler":""}\n\ndata: {"number":1,"filler":""}\n\n'
    )
    early = ask(**{"as": "sse", "fails at": 0})
    assert early.status_code == 400 and early.json()["echo error"] == "it was to fail."
    late = ask(**{"as": "lines", "events": 3, "fails at": 1})
    first, last = late.text.splitlines()
    assert late.status_code == 200 and json.loads(last)["echo error"] == "it was to fail."
    monkeypatch.setattr(streams, "KEEP_ALIVE_SECONDS", 0.05)
    silent = ask(**{"as": "sse", "wait": 0.3})
    assert ": keep-alive\n\n" in silent.text
    assert [line for line in ask(**{"as": "lines", "wait": 0.3}).text.splitlines() if line] == [
        first
    ]


def test_metrics_and_log_lines_hold_no_text_of_requests(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as running:
        with caplog.at_level("INFO", "mlx_diffgemma.server"):
            got = httpx.post(
                f"{running.url}/echo", json={"prompt": "a secret"}, headers={"x-request-id": "mine"}
            )
            httpx.get(f"{running.url}/forged%20path=/x%0A")
            httpx.request("MADEUP", f"{running.url}/echo")
            until(lambda: len(caplog.records) >= 3)
        assert got.headers["x-request-id"] == "mine"
        assert "id=mine" in caplog.messages[0] and "status=200" in caplog.messages[0]
        assert 'path="/forged path=/x' in caplog.messages[1]
        assert not any("secret" in message for message in caplog.messages)
        text = httpx.get(f"{running.url}/metrics").text
        assert 'mlx_diffgemma_http_requests_total{route="other",method="GET",status="404"}' in text
        assert "mlx_diffgemma_canvases_per_step 0" in text and "MADEUP" not in text
        samples = [line for line in text.splitlines() if not line.startswith("#")]
        assert all(
            len(line.rsplit(" ", 1)) == 2 and float(line.rsplit(" ", 1)[1]) >= 0 for line in samples
        )


def test_health_says_how_loading_goes() -> None:
    go_on = threading.Event()

    def load() -> Any:
        go_on.wait(20)
        return FakeEngine()

    with serving(load) as running:
        loading = httpx.get(f"{running.url}/health")
        assert loading.status_code == 503 and loading.json()["status"] == "loading"
        go_on.set()
        until(lambda: running.server.ready)
        assert httpx.get(f"{running.url}/health").json()["model"] == "fake"
        running.server.engine.alive = False
        assert httpx.get(f"{running.url}/health").json()["status"] == "failed"

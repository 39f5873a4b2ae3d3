"""The page in a browser: a server with the demo model that can go away, and Chromium."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import uvicorn
from playwright.sync_api import Browser, Page, Response, expect, sync_playwright

from mlx_diffgemma import load
from mlx_diffgemma.server.app import create_app
from mlx_diffgemma.server.config import ServerSettings
from mlx_diffgemma.server.engine import Engine

PICTURES = Path(__file__).parents[2] / "docs"
SECONDS = 30


@cache
def loaded() -> tuple[Any, Any]:
    return load("demo")


class Served:
    """A server that can go away and come back at the same port, having forgotten everything."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._listener.close()
        self.start()

    def start(self, **settings: Any) -> None:
        model, tokenizer = loaded()
        engine = Engine(model, tokenizer, name="demo")
        app = create_app(engine, ServerSettings(**settings))
        config = uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="warning",
                                timeout_graceful_shutdown=1)  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait(lambda: self._server.started)

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()


def wait(condition: Any) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.01)


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium; without it these tests fail."""
    path = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    )
    assert path, "there is no chromium: apt-get install chromium, or name one in CHROMIUM."
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Visitor:
    """One page in a browser of its own, which notes what goes wrong in it.

    Attributes:
        errors: of the console and of scripts.
    """

    def __init__(self, browser: Browser, url: str, **context: Any) -> None:
        context = {
            "viewport": {"width": 1180, "height": 860},
            "reduced_motion": "reduce",
            **context,
        }
        self.context = browser.new_context(**context)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(SECONDS * 1000)
        expect.set_options(timeout=SECONDS * 1000)
        self.errors: list[str] = []
        self.url = url
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _note(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.text} ({message.location})")

    def open(self, view: str) -> Page:
        self.page.goto(f"{self.url}/#{view}")
        expect(self.page.locator("h1")).to_be_visible()
        return self.page

    def picture(self, name: str) -> None:
        """A picture of the view for the docs, where one is asked for."""
        if os.environ.get("PICTURES"):
            self.page.mouse.move(0, 0)
            self.page.screenshot(path=PICTURES / f"page-{name}.png", full_page=True)


def told(response: Response) -> list[dict[str, Any]]:
    """The lines of an answer that came bit by bit."""
    response.finished()
    return [json.loads(line) for line in response.text().split("\n") if line]


def posted(page: Page, path: str) -> Any:
    """Expects an answer to a POST whose path begins so."""
    return page.expect_response(
        lambda response: response.request.method == "POST" and path in response.url
    )

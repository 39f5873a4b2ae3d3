"""Whatever is sent to a route: an answer or a refusal, never an error of the server, never a wait.

`FUZZ_EXAMPLES=10000` tries as many bodies on every route. Beyond a thousand, requests are read,
checked and encoded as ever, and then refused at the engine's door, which has seen enough by then.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from bodies import bodies, fields_of
from hypothesis import HealthCheck, given, settings
from mlx_lm.tokenizer_utils import TokenizerWrapper
from text.gemma_like import build
from tiny_models import make_config, make_model, make_weights

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import PromptError
from mlx_diffgemma.server.app import PROTOCOLS, create_app
from mlx_diffgemma.server.engine import Engine

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
ENGINE_SEES = 1000
SECONDS = 30.0  # after which an answer is taken for one that never comes


def refusing(work: Any, **_: Any) -> Any:
    raise PromptError("the engine takes nothing more.")


class Failures(logging.Handler):
    """Keeps what the server logs as its own errors, which streams would hide behind a 200."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Asker:
    """An application in an event loop of its own, without sockets between."""

    def __init__(self) -> None:
        raw = make_config(
            5, vocab_size=416, head_dim=8, hidden_size=36, max_position_embeddings=1024
        )
        raw |= {"canvas_length": 24, "generation_config": {"max_denoising_steps": 2}}
        config = ModelConfig.from_dict(raw)
        model, tokenizer = make_model(config, make_weights(config, 5)), build()
        self.loop = asyncio.new_event_loop()
        wrapped = TokenizerWrapper(tokenizer, eos_token_ids=[1, 5])
        self.engine = Engine(model, wrapped, name="tiny")
        if EXAMPLES > ENGINE_SEES:
            self.engine.submit = refusing  # type: ignore[method-assign]
        self.app = create_app(self.engine)
        self.failures = Failures()
        logging.getLogger("mlx_diffgemma").addHandler(self.failures)

    def ask(self, method: str, path: str, body: bytes = b"") -> SimpleNamespace:
        return self.loop.run_until_complete(
            asyncio.wait_for(self._ask(method, path, body), SECONDS)
        )

    async def _ask(self, method: str, path: str, body: bytes) -> SimpleNamespace:
        got = SimpleNamespace(status=0, body=b"")
        over = asyncio.Event()
        pending: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if pending:
                return pending.pop()
            await over.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            got.status = message.get("status", got.status)
            got.body += message.get("body", b"")

        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(),
            "query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1",
            "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8080), "state": {},
        }  # fmt: skip
        try:
            await self.app(scope, receive, send)
        finally:
            over.set()
        return got

    def close(self) -> None:
        logging.getLogger("mlx_diffgemma").removeHandler(self.failures)
        self.loop.run_until_complete(asyncio.to_thread(self.engine.stop, 5.0))
        self.loop.close()


@pytest.fixture(scope="module")
def asker() -> Iterator[Asker]:
    asker = Asker()
    yield asker
    asker.close()


def routes() -> list[tuple[str, str, str]]:
    """Every route that reads a body: its method, its path, and the module that it is of."""
    from importlib import import_module

    found = []
    for name in PROTOCOLS:
        module: Any = import_module(f"mlx_diffgemma.server.{name}")
        for route in module.routes(SimpleNamespace()):
            path = route.path.split("{")[0] + ("tiny" if "{" in route.path else "")
            found += [(method, path, name) for method in sorted(route.methods)]
    return found


@pytest.mark.parametrize(("method", "path", "module"), routes())
def test_no_body_breaks_a_route(asker: Asker, method: str, path: str, module: str) -> None:
    @settings(
        max_examples=EXAMPLES if method == "POST" else 5,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(bodies(module))
    def answered(body: bytes) -> None:
        asker.failures.records.clear()
        got = asker.ask(method, path, body)
        said = [record.getMessage() for record in asker.failures.records]
        assert not said, (said, asker.failures.records[0].exc_info)
        assert got.status in (200, 400, 404, 413), got.body

    answered()


def test_the_fields_of_a_module_are_found() -> None:
    assert fields_of("decisions").items() >= {"state": "get", "frame": "text"}.items()
    assert "assets" in fields_of("decisions")

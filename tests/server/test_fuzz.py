"""Whatever is sent to a route: an answer or a refusal, never an error of the server, never a wait.

`FUZZ_EXAMPLES=10000` tries as many bodies on every route. Beyond a hundred, the network is not
asked: what it would predict is guessed, and all else is as ever. Several bodies are sent at the
same time, as clients do, so that requests of all kinds share their steps.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from bodies import WHOLE, Bodies, fields_of
from mlx_lm.tokenizer_utils import TokenizerWrapper
from text import release_like
from tiny_models import make_config, make_model, make_weights

from mlx_diffgemma.config import FULL, SLIDING, ModelConfig
from mlx_diffgemma.diffusion.canvas import Canvas, Passed, Prediction
from mlx_diffgemma.diffusion.denoiser import Denoiser, Look
from mlx_diffgemma.diffusion.predict import Predictor
from mlx_diffgemma.server.app import PROTOCOLS, create_app
from mlx_diffgemma.server.engine import Engine

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
NETWORK_SEES = 100
AT_ONCE = 10
SECONDS = 30.0  # after which an answer is taken for one that never comes


class Failures(logging.Handler):
    """Keeps what the server logs as its own errors, which streams would hide behind a 200."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Guessing:
    """Predicts random tokens, or, where `guesses` is False, what the network predicts."""

    def __init__(self, model: Any, ends: tuple[int, ...]) -> None:
        self._network, self._ends = Predictor(model), ends
        self._width = model.config.text.hidden_size
        self._random = np.random.default_rng(5)
        self.guesses = False

    def __call__(self, canvases: Any, prefixes: Any) -> list[Passed]:
        if not self.guesses or any(each.settings.settled_after is not None for each in canvases):
            return self._network(canvases, prefixes)
        return [Passed(self._guess(each)) for each in canvases]

    def _guess(self, canvas: Canvas) -> Prediction:
        count, random = len(canvas), self._random
        tokens = random.integers(canvas.vocab, size=count)
        tokens[random.integers(count + 1) :] = random.choice(self._ends)
        if canvas.passes:  # so that it comes to rest
            tokens = np.where(canvas.draft >= 0, canvas.draft, tokens)
        if canvas.layout is not None:
            for place, mask in canvas.layout.masks(canvas.vocab).items():
                bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: canvas.vocab]
                if not bits[tokens[place]]:
                    tokens[place] = random.choice(np.flatnonzero(bits))
            tokens = np.where(canvas.layout.open, tokens, canvas.layout.fixed)
        drawn, nats = (
            mx.array(tokens.astype(np.int32)),
            mx.array(random.random(count) * 0.2 * (canvas.passes == 0)),
        )
        sure, soft = mx.exp(-nats), mx.zeros((count, self._width))
        return Prediction(drawn, sure, drawn, nats, sure, soft, mx.zeros(count))

    def look(self, denoiser: Denoiser, canvases: Any, prefixes: Any) -> list[Look]:
        """Takes the place of `Denoiser.look`."""
        if not self.guesses:
            return Guessing._look(denoiser, canvases, prefixes)
        return [Look(*-np.log(self._random.random((2, len(each))))) for each in canvases]

    _look = Denoiser.look


class Asker:
    """An application in an event loop of its own, without sockets between."""

    def __init__(self) -> None:
        own = release_like.build()
        ends = release_like.ends(own)
        raw = make_config(
            5, vocab_size=480, head_dim=8, hidden_size=36, max_position_embeddings=512,
            num_hidden_layers=2, layer_types=[SLIDING, FULL],
        )  # fmt: skip
        raw |= {"canvas_length": 24, "generation_config": {"max_denoising_steps": 2}}
        config = replace(ModelConfig.from_dict(raw), eos_token_ids=ends)
        model = make_model(config, make_weights(config, 5))
        self.loop = asyncio.new_event_loop()
        self.engine = Engine(model, TokenizerWrapper(own, eos_token_ids=ends), name="tiny")
        self.predict = Guessing(model, ends)
        self.engine._denoiser = Denoiser(model, self.predict)
        self.app = create_app(self.engine)
        self.failures = Failures()
        logging.getLogger("mlx_diffgemma").addHandler(self.failures)

    def ask(self, method: str, path: str, *bodies: bytes) -> list[SimpleNamespace]:
        """What comes back for each of some bodies, which are sent at the same time."""

        async def together() -> list[SimpleNamespace]:
            asked = [asyncio.wait_for(self._ask(method, path, body), SECONDS) for body in bodies]
            return await asyncio.gather(*asked)

        return self.loop.run_until_complete(together())

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

    def place(self, path: str) -> str:
        """A path with something in its gaps: a canvas that is kept, or the model's name."""
        if "{canvas}" in path:
            body = json.dumps({"prompt": "hi", "seed": 1, "run": 1}).encode()
            (got,) = self.ask("POST", "/v1/page/canvases", body)
            return path.replace("{canvas}", json.loads(got.body.splitlines()[0])["canvas"])
        before, gap, behind = path.partition("{")
        return before + ("tiny" + behind.partition("}")[2] if gap else "")

    def close(self) -> None:
        logging.getLogger("mlx_diffgemma").removeHandler(self.failures)
        self.loop.run_until_complete(asyncio.to_thread(self.engine.stop, 5.0))
        self.loop.close()


@pytest.fixture(scope="module")
def asker() -> Iterator[Asker]:
    asker = Asker()
    with pytest.MonkeyPatch.context() as patch:
        look = asker.predict.look
        patch.setattr(Denoiser, "look", lambda own, *given: look(own, *given))
        yield asker
    asker.close()


def routes() -> list[tuple[str, str, str]]:
    """Every route: its method, its path, and the module that it is of."""
    from importlib import import_module

    found = []
    for name in PROTOCOLS:
        module: Any = import_module(f"mlx_diffgemma.server.{name}")
        for route in module.routes(SimpleNamespace()):
            found += [(method, route.path, name) for method in sorted(route.methods)]
    return found


@pytest.mark.parametrize(("method", "path", "module"), routes())
def test_no_body_breaks_a_route(asker: Asker, method: str, path: str, module: str) -> None:
    bodies = Bodies(module, path, Random(f"{method} {path}"))
    count = EXAMPLES if method == "POST" else 5
    place = asker.place(path)
    seen: Counter[int] = Counter()
    for first in range(0, count, AT_ONCE):
        asker.predict.guesses = first >= NETWORK_SEES
        some = [bodies.body() for _ in range(min(AT_ONCE, count - first))]
        asker.failures.records.clear()
        for body, got in zip(some, asker.ask(method, place, *some), strict=True):
            assert got.status in (200, 202, 400, 404, 413, 422), (body, got.body)
            seen[got.status] += 1
        said = [record.getMessage() for record in asker.failures.records]
        assert not said, (some, said, asker.failures.records[0].exc_info)
    asker.predict.guesses = False
    print(f"{method} {path}: {dict(sorted(seen.items()))}")  # shown by -rP


@pytest.mark.parametrize("path", WHOLE)
def test_whole_requests_are_answered(asker: Asker, path: str) -> None:
    for body in WHOLE[path]:
        (got,) = asker.ask("POST", asker.place(path), json.dumps(body).encode())
        assert got.status in (200, 202) and b'"error"' not in got.body, (body, got.body)


def test_the_fields_of_a_module_are_found() -> None:
    assert fields_of("decisions").items() >= {"state": "get", "frame": "text"}.items()
    assert "assets" in fields_of("decisions")
    assert fields_of("page").items() >= {"prefill": "text", "changes": "objects"}.items()
    assert "diffusion_max_steps" in fields_of("ollama") or "diffusion_t_min" in fields_of("ollama")

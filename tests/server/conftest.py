"""Engines that the tests of this room share, and answers that say what they are told.

- `demo_engine`: the demo model. It answers at once and always the same for one seed.
- `calling_engine`: a random model with the release's markers and template, which knows tools and
  thoughts. What it writes of itself is noise; what a grammar makes it write is valid.
- `told`: `told.say(text("Hello"))` is what `asking.answer` then says, piece by piece, whatever it
  is asked; `told_url` is the URL of a server with no engine behind it.
- `script`: `script.canvases = [ids("Hello<turn|>")]` is what any engine then writes as free text,
  canvas by canvas, in this process; forms and gaps are still denoised. `ids` reads markers.

`demo_url` and `calling_url` are the URLs of servers around the engines; for another app, see
`running` in `running.py`; an app that ends also ends its engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from running import Told, running
from test_answers import Scripted
from text import release_like
from tiny_models import make_config, make_model, make_weights

from mlx_diffgemma import generation, load
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.server import asking
from mlx_diffgemma.server.app import create_app
from mlx_diffgemma.server.engine import Engine


@pytest.fixture(scope="session")
def demo_engine() -> Iterator[Engine]:
    """The demo model."""
    yield from _engine(*load("demo"), "demo")


@pytest.fixture(scope="session")
def calling_engine() -> Iterator[Engine]:
    """A random model with the release's markers."""
    own = release_like.build()
    ends = release_like.ends(own)
    raw = make_config(5, vocab_size=480, head_dim=8, hidden_size=36) | {"canvas_length": 32}
    config = replace(ModelConfig.from_dict(raw), eos_token_ids=ends)
    model = make_model(config, make_weights(config, 5))
    yield from _engine(model, TokenizerWrapper(own, eos_token_ids=ends), "calling")


@pytest.fixture(scope="package")
def demo_url(demo_engine: Engine) -> Iterator[str]:
    """A server around the demo model."""
    with running(create_app(demo_engine)) as url:
        yield url


@pytest.fixture(scope="package")
def calling_url(calling_engine: Engine) -> Iterator[str]:
    """A server around the model with markers."""
    with running(create_app(calling_engine)) as url:
        yield url


@pytest.fixture(scope="package")
def told_url() -> Iterator[str]:
    """The URL of a server whose engine is no more than a name."""
    with running(
        create_app(
            SimpleNamespace(
                name="demo",
                context=4096,
                model=SimpleNamespace(reads_pictures=False),
                stop=lambda seconds: None,
            )
        )
    ) as url:
        yield url


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What all answers say, and what was asked."""
    told = Told()
    monkeypatch.setattr(asking, "answer", told.answer)
    monkeypatch.setattr(asking, "count_tokens", told.count_tokens)
    return told


@pytest.fixture
def ids() -> Callable[[str], list[int]]:
    """The tokens of a text of `calling_engine`, in which spelt markers are markers."""
    own = release_like.build()
    return lambda text: release_like.ids(own, text)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """What free text is made of."""
    script = Scripted()
    monkeypatch.setattr(generation, "generate_canvases", script)
    return script


def _engine(model: Any, tokenizer: Any, name: str) -> Iterator[Engine]:
    engine = Engine(model, tokenizer, name=name)
    yield engine
    engine.stop(10)
    assert not engine._thread.is_alive() and engine.failure is None

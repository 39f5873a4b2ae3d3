from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="session")
def served() -> Iterator[Any]:
    from browsing import Served

    served = Served()
    yield served
    served.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from browsing import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture
def visitor(served: Any, browser: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A browser of its own; what its console says is a failure. Fresh seeds are the same in every
    run, since the demo model errs in a few of a hundred answers."""
    from browsing import Visitor

    from mlx_diffgemma.diffusion import noise

    seeds = count(4)
    fresh = SimpleNamespace(randbelow=lambda below: next(seeds) % below)
    monkeypatch.setattr(noise, "secrets", fresh)
    visitor = Visitor(browser, served.url)
    yield visitor
    visitor.context.close()
    assert visitor.errors == []

from __future__ import annotations

from collections.abc import Iterator
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
def visitor(served: Any, browser: Any) -> Iterator[Any]:
    """A browser of its own; what its console says is a failure."""
    from browsing import Visitor

    visitor = Visitor(browser, served.url)
    yield visitor
    visitor.context.close()
    assert visitor.errors == []

"""A server whose answers are told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from running import Told, running

from mlx_diffgemma.server import asking
from mlx_diffgemma.server.app import create_app


@pytest.fixture(scope="package")
def told_url():
    """The URL of a server whose engine is no more than a name."""
    with running(create_app(SimpleNamespace(name="demo", context=4096))) as url:
        yield url


@pytest.fixture
def told(monkeypatch):
    """What all answers say, and what was asked."""
    told = Told()
    monkeypatch.setattr(asking, "answer", told.answer, raising=False)
    monkeypatch.setattr(asking, "count_tokens", told.count_tokens, raising=False)
    return told

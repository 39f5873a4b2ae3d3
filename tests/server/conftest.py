"""A server whose answers are told."""

from __future__ import annotations

import pytest
from serving import serving
from telling import Told

from mlx_diffgemma.server import anthropic, asking, ollama


@pytest.fixture(scope="package")
def told_url():
    """The URL of a server that speaks to Anthropic's and Ollama's clients."""
    with serving(protocols=[anthropic, ollama]) as served:
        yield served.url


@pytest.fixture
def told(monkeypatch):
    """What all answers say, and what was asked."""
    told = Told()
    monkeypatch.setattr(asking, "answer", told.answer, raising=False)
    monkeypatch.setattr(asking, "count_tokens", told.count_tokens, raising=False)
    return told

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import convert_to, plan_of, write_tiny


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory) -> Path:
    """A small checkpoint in Hugging Face form; not to be written to."""
    return write_tiny(tmp_path_factory.mktemp("source") / "tiny-it")


@pytest.fixture(scope="session")
def tiny_4bit(tiny_source, tmp_path_factory) -> Path:
    """The same, converted with recipe 4bit; not to be written to."""
    target = tmp_path_factory.mktemp("converted") / "tiny-4bit"
    convert_to(target, plan_of(tiny_source))
    return target

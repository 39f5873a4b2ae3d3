"""Fixtures of the kernels' tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def emulator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled kernels are kept while the tests run."""
    return tmp_path_factory.mktemp("metal")

"""Fixtures shared by the rooms: random small configs and models."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# MLX reads this when it is loaded: a GPU's products in float32 are to be those of float32.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
# No test asks a server that happens to run on this machine.
os.environ["MLX_DIFFGEMMA_SERVER"] = ""

import mlx.core as mx
import pytest
from tiny_models import make_config, make_model, make_weights

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma


@pytest.fixture(autouse=True)
def unheard_server() -> Iterator[None]:
    """What a server logs that one test started is not heard in the next one."""
    yield
    for name in ("mlx_diffgemma.server", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()


@pytest.fixture
def tiny_config() -> Callable[..., dict[str, Any]]:
    """`tiny_config(seed=0, spelling="release" | "per_layer", **text_config)` -> a config.json."""
    return make_config


@pytest.fixture
def tiny_model() -> Callable[..., DiffusionGemma]:
    """`tiny_model(seed=0, gain=1.0, **text_config)` -> a float32 model with random weights."""

    def build(seed: int = 0, gain: float = 1.0, **text: Any) -> DiffusionGemma:
        config = ModelConfig.from_dict(make_config(seed, **text))
        return make_model(config, make_weights(config, seed, gain))

    return build


def pytest_configure(config: pytest.Config) -> None:
    """Tests press Ctrl-C in what they start, which would be ignored where the tests themselves run
    in the background of a shell: a program inherits it.

    On a machine with a GPU the tests run on its CPU, as everywhere else, unless those marked
    `metal` are asked for.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not _asks_for_metal(config.getoption("markexpr")):
        mx.set_default_device(mx.cpu)


def _asks_for_metal(expression: str) -> bool:
    """Whether a marker expression selects the tests that need a Metal GPU."""
    return re.search(r"(?<!not )\bmetal\b", " ".join(expression.split())) is not None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that import torch are not even read where their marker leaves them out."""
    left_out = "not reference" in config.getoption("markexpr")
    return True if left_out and collection_path.parent.name == "reference" else None

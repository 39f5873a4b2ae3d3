"""What editing holds beside the weights at a vocabulary of 262,144 words: never the logits.

On canvases of 16 tokens they would be 17 MB for each candidate, and the candidates are looked at
together. The environment variable CANVAS takes another length, such as the release's 256.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from big_vocabulary import EOS, SIZE, big

from mlx_diffgemma import cpu
from mlx_diffgemma.bench.presets import SMALL, config_like
from mlx_diffgemma.bench.random_model import random_model
from mlx_diffgemma.checkpoint.quantization import Recipe
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.editing.decide import decide
from mlx_diffgemma.editing.edit import edit
from mlx_diffgemma.editing.fill import fill
from mlx_diffgemma.editing.infill import infill

CANVAS = int(os.environ.get("CANVAS", "16"))
MOST = 45_000_000 if CANVAS == 16 else 200_000_000
SETTINGS: dict[str, Any] = {
    "raw": True,
    "seed": 0,
    "max_denoising_steps": 1,
    "canvas_length": CANVAS,
    "eos_token_ids": EOS,
}


@cache
def model() -> Any:
    made = random_model(
        ModelConfig.from_dict(config_like(SMALL)), Recipe("unquantized", ()), mx.float32
    )
    assert made.config.text.vocab_size == SIZE
    cpu.use(made)
    return made


RUNS: dict[str, Callable[..., object]] = {
    "infill with eight lengths": lambda of: infill(
        of, big(), "a [[?]] b", prompt="q", lengths=range(1, 9), **SETTINGS
    ),
    "edit with eight lengths": lambda of: edit(
        of, big(), "one\ntwo\nthree\n", "other", (2, 2), prompt="q", lengths=range(1, 9), **SETTINGS
    ),
    "fill with a choice of twelve": lambda of: fill(
        of,
        big(),
        f"It is {{it:{'|'.join(map(str, range(100, 112)))}}}.",
        prompt="q",
        lengths=(1, 2),
        **SETTINGS,
    ),
    "decide among sixteen": lambda of: decide(
        of,
        big(),
        "q",
        {"q": {"type": "choice", "criteria": dict.fromkeys(map(str, range(1000, 1016)))}},
        raw=True,
        seed=0,
        draws=4,
        canvas_length=CANVAS,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_no_run_holds_logits(name: str) -> None:
    of = model()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    RUNS[name](of)
    held = mx.get_peak_memory() - before
    print(f"\n{name}: {held / 1e6:.0f} MB")
    assert held <= MOST, f"{name}: {held / 1e6:.0f} MB"

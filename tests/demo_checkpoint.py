"""The demo model for tests: the checkpoint that ships with the package."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.checkpoint.locate import locate

CHECKPOINT = locate("demo")
_GRID = ("123456", "456123", "231564", "564231", "312645", "645312")


def demo_config() -> dict[str, Any]:
    """Its parsed `config.json`."""
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert not config.get("quantization"), "the comparison needs the weights as they were trained"
    return config


def demo_weights() -> dict[str, np.ndarray]:
    """Its text weights in float32, under our names."""
    weights = {}
    for file in sorted(CHECKPOINT.glob("*.safetensors")):
        for name, value in mx.load(str(file)).items():
            if ".vision_tower." in name or ".embed_vision." in name:
                continue
            weights[name] = np.array(value.astype(mx.float32))
    return weights


def two_puzzles(seed: int) -> list[int]:
    """The prompt of two sudokus, as token ids: its answer spans two canvases."""
    rng = np.random.default_rng([seed, 3])
    puzzles = []
    for _ in range(2):
        digits = dict(zip("123456", rng.permutation(list("123456")), strict=True))
        rows = ["".join(digits[cell] for cell in row) for row in _GRID]
        hidden = rng.random((6, 6)) < 0.45
        puzzles.append(
            "\n".join(
                "".join("." if blank else cell for blank, cell in zip(gone, row, strict=True))
                for gone, row in zip(hidden, rows, strict=True)
            )
        )
    vocab = json.loads((CHECKPOINT / "tokenizer.json").read_text())["model"]["vocab"]
    turn, end = vocab["<|turn>"], vocab["<turn|>"]
    question = [vocab[c] for c in "user\nsudoku\n" + "\n\n".join(puzzles)]
    newline = vocab["\n"]
    answer = [vocab[c] for c in "model\n"]
    return [vocab["<bos>"], turn, *question, end, newline, turn, *answer]

"""Small models with tokenizers for the tests of this room."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from text.gemma_like import build
from tiny_models import make_config, make_model, make_weights

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.generation import load

PIECES = [
    "a", " ", "  ", "\n", "\n\n", "\r\n", "\t", "ab", " ab", "é", "e\u0301", "🦊", "漢字", "▁",
    "x" * 9, "👩\U0001f3fd\u200d🚀", "\ufffd", "\x00", "<", "<|", "|>", "<table>", "\ue000",
    "\u202e", "\u2028", "\u00a0", "{", "}", "[[", "<turn|>", "<|turn>", "<bos>", "<eos>", "<pad>",
    "<unk>", "turn|>", "<0x41>", "<unused104>", "\ufeff", "\x0b", "\x85", "1", "\\", "'", '"',
]  # fmt: skip
"""Texts that tokenizers and splicing stumble over."""


@cache
def tiny(canvas: int = 24) -> tuple[Any, Any]:
    """A random model with a tokenizer of Gemma's kind: byte fallback and merges."""
    raw = make_config(5, vocab_size=416, head_dim=8, hidden_size=36) | {"canvas_length": canvas}
    config = ModelConfig.from_dict(raw)
    return make_model(config, make_weights(config, 5)), build()


@cache
def demo() -> tuple[Any, Any]:
    """The demo model; its tokenizer has one token a character."""
    return load("demo")


def vocabulary(model: Any, tokenizer: Any) -> Vocabulary:
    return Vocabulary(tokenizer, model.config.text.vocab_size, (1, 5))


def random_text(rng: np.random.Generator, pieces: int) -> str:
    return "".join(rng.choice(PIECES, pieces).tolist())

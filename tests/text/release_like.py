"""A small tokenizer that has the released model's markers, each a special token of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from text import gemma_like
from transformers import PreTrainedTokenizerFast

MARKERS = [
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<|think|>", "<|tool>",
    "<tool|>", "<tool_response|>",
]  # fmt: skip
TOOL_RESPONSE = 50  # its id in the release too
EOS = ("<eos>", "<turn|>", "<|tool_response>")
CASES = Path(__file__).parents[1] / "fixtures" / "answers.jsonl"


def build() -> PreTrainedTokenizerFast:
    controls = gemma_like.CONTROLS + MARKERS
    controls += [f"<unused{number}>" for number in range(TOOL_RESPONSE - len(controls))]
    return gemma_like.build(controls=[*controls, "<|tool_response>"], unflagged=[])


def ends(tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer."""
    return tuple(tokenizer.convert_tokens_to_ids(list(EOS)))


def ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text in which spelt markers are markers."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def cases() -> list[dict[str, Any]]:
    """What a model writes, and what is to be made of it."""
    return [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]

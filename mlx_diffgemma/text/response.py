"""From an answer to the token ids that a model would have written, for training on it."""

from __future__ import annotations

from typing import Any

from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.text.chat_template import render
from mlx_diffgemma.text.control_tokens import ControlTokens, unused_character
from mlx_diffgemma.text.tokenizer import hf_tokenizer


def encode_response(controls: ControlTokens, text: str, end: int) -> list[int]:
    """Token ids of an answer as it follows the opened turn: plain text, then the token `end`."""
    return [*controls.encode_text(text), end]


def end_of_turn(tokenizer: Any) -> int:
    """The token that ends an answer: the first eos that the chat template writes behind one, or the
    tokenizer's own eos where it writes none.

    Raises:
        CheckpointError: there is neither, or the template is missing or broken.
    """
    own = hf_tokenizer(tokenizer)
    mark = unused_character(str(own.chat_template))
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    behind = render(own, messages, open_turn=False).rpartition(mark)[2]
    ids = own.encode(behind, add_special_tokens=False)
    ends = set(tokenizer.eos_token_ids)
    return next((token for token in ids if token in ends), None) or end_of_text(tokenizer)


def end_of_text(tokenizer: Any) -> int:
    """The tokenizer's own eos.

    Raises:
        CheckpointError: it has none.
    """
    eos = hf_tokenizer(tokenizer).eos_token_id
    if eos is None:
        raise CheckpointError(
            "no token ends an answer: neither the chat template writes an eos behind one, nor has "
            "the tokenizer one of its own; mend tokenizer_config.json."
        )
    return int(eos)

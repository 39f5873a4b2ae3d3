"""The bytes that each token stands for, and the sets of tokens that constraints are made of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from mlx_diffgemma.diffusion.constraints import token_mask
from mlx_diffgemma.text.control_tokens import ControlTokens
from mlx_diffgemma.text.tokenizer import hf_tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_RESERVED = re.compile(r"<unused_?\d+>|\[unused\d+\]|<reserved_?\d+>")
_TURN_ENDS = ("<turn|>", "<end_of_turn>")
_SPACE = "\u2581"  # what sentencepiece writes for a space


class Vocabulary:
    """The tokens of a tokenizer as bytes.

    Args:
        tokenizer: mlx-lm's wrapper or a Hugging Face tokenizer.
        size: ids that the model knows, V; ids without a token stand for nothing.

    Attributes:
        pieces: [V] what each token stands for in a text; empty for control and reserved tokens.
        eos: the ids that end an answer.
        end: the one of them that ends a turn where the tokenizer has one, and what fills a canvas
            behind the answer.
    """

    def __init__(self, tokenizer: Any, size: int, eos: Sequence[int]) -> None:
        self._tokenizer = hf_tokenizer(tokenizer)
        self._controls = ControlTokens(self._tokenizer)
        self.size, self.eos = size, tuple(eos)
        self.end = next((token for token in self._turn_ends() if token in self.eos), self.eos[0])
        self.pieces = self._read_pieces()

    def encode(self, text: str) -> list[int]:
        """Tokens of a piece of text, none of which is a control token."""
        return self._controls.encode_text(text) if text else []

    def bytes_of(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self.pieces[token] for token in tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`; bytes that make up no character as U+FFFD."""
        return self.bytes_of(tokens).decode(errors="replace")

    def token_of(self, piece: bytes) -> int:
        """The first token that stands for `piece`; there must be one."""
        return self.pieces.index(piece)

    @cached_property
    def text(self) -> np.ndarray:
        """Mask of the tokens that stand for text."""
        return self.mask(lambda piece: True)

    def mask(self, holds: Callable[[bytes], bool]) -> np.ndarray:
        """Mask [W] of the text tokens whose bytes satisfy `holds`."""
        chosen = (token for token, piece in enumerate(self.pieces) if piece and holds(piece))
        return token_mask(chosen, self.size)

    def starting_with(self, piece: bytes) -> np.ndarray:
        """Mask [W] of the text tokens that begin with `piece`."""
        return self.mask(lambda other: other.startswith(piece))

    def ending_with(self, piece: bytes) -> np.ndarray:
        """Mask [W] of the text tokens that end with `piece`."""
        return self.mask(lambda other: other.endswith(piece))

    @cached_property
    def grammar_tokenizer(self) -> Any:
        """The same vocabulary for llguidance."""
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(
            TokenizerWrapper(_ForGrammars(self)), n_vocab=self.size, eos_token=list(self.eos)
        )

    def _turn_ends(self) -> list[int]:
        known = self._tokenizer.get_vocab()
        return [known[name] for name in _TURN_ENDS if name in known]

    def _read_pieces(self) -> list[bytes]:
        entries = self._tokenizer.get_vocab()
        added = self._tokenizer.added_tokens_decoder
        silent = set(self._tokenizer.all_special_ids) | set(self.eos)
        silent |= {token for token, entry in added.items() if entry.special}
        silent |= self._controls.ids
        to_bytes = _spelling(self._tokenizer, entries)
        pieces = [b""] * self.size
        for name, token in entries.items():
            if token in silent or token >= self.size or _RESERVED.fullmatch(name):
                continue
            pieces[token] = name.encode() if token in added else to_bytes(name)
        return pieces


class _ForGrammars:
    """What llguidance asks of a tokenizer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        # What a grammar forces is asked for again and again.
        self._encode = lru_cache(maxsize=4096)(vocabulary.encode)
        self.tokens = vocabulary.pieces
        self.eos_token_id = vocabulary.eos[0]
        self.bos_token_id = None
        self.special_token_ids = list(vocabulary.eos)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(self._encode(text.decode() if isinstance(text, bytes) else text))


def _spelling(tokenizer: Any, entries: dict[str, int]) -> Callable[[str], bytes]:
    """How the vocabulary spells bytes: sentencepiece's way, byte-level BPE's, or literally."""
    kinds: set[str] = set()
    if tokenizer.is_fast:
        layout = json.loads(tokenizer.backend_tokenizer.to_str())
        for part in ("decoder", "pre_tokenizer"):
            found = layout.get(part) or {}
            inner = found.get("decoders") or found.get("pretokenizers") or [found]
            kinds |= {item.get("type", "") for item in inner}
    if "ByteLevel" in kinds:
        table = _byte_level_table()
        return lambda name: bytes(table[c] for c in name if c in table)
    bytewise = all(f"<0x{byte:02X}>" in entries for byte in range(256))
    spaced = not tokenizer.is_fast or any(_SPACE in name for name in entries)

    def to_bytes(name: str) -> bytes:
        byte = _BYTE.fullmatch(name) if bytewise else None
        if byte:
            return bytes([int(byte[1], 16)])
        return (name.replace(_SPACE, " ") if spaced else name).encode()

    return to_bytes


def _byte_level_table() -> dict[str, int]:
    """The characters that byte-level BPE writes for the 256 bytes: printable ones for themselves,
    the others from U+0100 on in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(others)}

"""Committed canvases and drafts as text, as they come.

mlx-lm's streaming detokenizers print control tokens, and differ from the tokenizer's own decoding
where bytes do not make up characters. So what is shown here is a difference of two decodings of a
short tail: its text with the new tokens, less its text without them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, proxy

from mlx_diffgemma.text.tokenizer import hf_tokenizer

_INCOMPLETE = "\ufffd"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SHORT, _REMEMBERED = 4, 1 << 14  # tokens of a run, and runs, whose texts are remembered


class StreamingText:
    """Turns the tokens of one answer into text, canvas by canvas.

    All that `add` and `finish` return, joined, is the tokenizer's decoding of all tokens without
    the special ones. `tokenizer` is mlx-lm's wrapper or a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = hf_tokenizer(tokenizer)  # what is kept of it lives as long as it does
        self._kept = _kept_of(self._tokenizer)
        self._special = self._kept.skipped
        self._context: list[int] = []  # the last shown token: some decoders trim the first one
        self._context_text = ""
        self._held: list[int] = []

    def add(self, tokens: Sequence[int]) -> str:
        """Commit `tokens`, and return the text that became certain. A character is held back until
        all of it is there."""
        pending = self._held + self._visible(tokens)
        ready, text = self._certain(pending)
        if ready:
            self._go_on_behind(pending[ready - 1 : ready])
        self._held = pending[ready:]
        return text

    def finish(self) -> str:
        """Return the text that was held back, with incomplete characters as U+FFFD."""
        text = self._decode(self._held)
        if self._held:
            self._go_on_behind(self._held[-1:])
        self._held = []
        return text

    def peek(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` would add, with incomplete characters as U+FFFD; nothing is
        committed."""
        return self._decode(self._held + self._visible(tokens))

    def token_strings(self, tokens: Sequence[int]) -> list[str]:
        """`peek(tokens)` in one piece a token. A character of several tokens belongs to the last of
        them, and text that was held back so far belongs to the first token that has text. Special
        tokens have "", unless no other token is there to bear what was held back."""
        pieces = [""] * len(tokens)
        draft = copy(self)  # its lists are replaced, never changed
        shown = [index for index, token in enumerate(tokens) if token not in self._special]
        last = shown[0] if shown else 0
        for index in shown:
            held = draft.peek([])
            text = draft.add([tokens[index]])
            if held and text.startswith(held):
                pieces[last] += held
                text = text[len(held) :]
            pieces[index] += text
            last = index
        rest = draft.finish()
        if rest and pieces:
            pieces[last] += rest
        return pieces

    @property
    def holds(self) -> bool:
        """Whether tokens are held back."""
        return bool(self._held)

    def skips(self, token: int) -> bool:
        """Whether a token has no text."""
        return token in self._special

    def _visible(self, tokens: Sequence[int]) -> list[int]:
        return [int(token) for token in tokens if token not in self._special]

    def _decode(self, tokens: list[int]) -> str:
        """The text that `tokens` add behind the context."""
        if not tokens:
            return ""
        return self._plain_decode(self._context + tokens)[len(self._context_text) :]

    def _go_on_behind(self, context: list[int]) -> None:
        self._context, self._context_text = context, self._plain_decode(context)

    def _plain_decode(self, tokens: list[int]) -> str:
        return self._kept.decode(tuple(tokens))

    def _certain(self, pending: list[int]) -> tuple[int, str]:
        """How many of the `pending` tokens have a text that later ones cannot change, and that
        text.

        Byte tokens (`<0xF0>`) are decoded a run at a time: one byte too many makes the whole run
        U+FFFD. In other vocabularies a token may end within a character, which also shows as
        U+FFFD until the rest is there.
        """
        for ready in range(len(pending), 0, -1):
            if self._kept.is_byte(pending[ready - 1]):
                continue
            text = self._decode(pending[:ready])
            if not text.endswith(_INCOMPLETE):
                return ready, text
        return 0, ""


def token_strings(tokenizer: Any, tokens: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """The text of a draft in one piece a token, behind the committed tokens `before`."""
    committed = StreamingText(tokenizer)
    committed.add(before)
    return committed.token_strings(tokens)


class _Kept:
    """What is looked up once for a Hugging Face tokenizer, of which only a weak reference is kept.

    Attributes:
        skipped: the ids that the tokenizer leaves out of a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if tokenizer.is_fast:
            added = tokenizer.added_tokens_decoder
            self.skipped = frozenset(token for token, entry in added.items() if entry.special)
        else:
            self.skipped = frozenset(tokenizer.all_special_ids)
        self.is_byte = lru_cache(None)(self._is_byte)
        self._remembered = lru_cache(_REMEMBERED)(self._decode)

    def decode(self, tokens: tuple[int, ...]) -> str:
        """The text of `tokens`, none of which is left out. Short runs are remembered: a canvas is
        drawn again and again, and most of it stays the same."""
        return self._remembered(tokens) if len(tokens) <= _SHORT else self._decode(tokens)

    def _decode(self, tokens: tuple[int, ...]) -> str:
        text: str = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _is_byte(self, token: int) -> bool:
        return _BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or "") is not None


_KNOWN: WeakKeyDictionary[Any, _Kept] = WeakKeyDictionary()


def _kept_of(tokenizer: Any) -> _Kept:
    known = _KNOWN.get(tokenizer)
    if known is None:
        known = _KNOWN[tokenizer] = _Kept(proxy(tokenizer))
    return known

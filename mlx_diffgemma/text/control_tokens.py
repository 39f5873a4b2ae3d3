"""Keeps text that spells a control token (`<turn|>`) from becoming one.

The spelling is broken with a marker before the template is rendered. In the rendered text only the
template's own control tokens are whole: it is split at these, and the text between them is
tokenized without its markers and with control tokens switched off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

_PRIVATE_USE = range(0xE000, 0xF900)


class ControlTokens:
    """The control tokens of a Hugging Face tokenizer: its special tokens, and added tokens that
    look like them (`<|name>`, `<name|>`) though the checkpoint does not flag them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        names = set(tokenizer.all_special_tokens) | {
            name
            for name, token in added.items()
            if token.special or name.startswith("<|") or name.endswith("|>")
        }
        # Longest first: a token wins over those that it begins with, as in the tokenizer.
        spellings = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
        self._ids = {name.strip(): tokenizer.convert_tokens_to_ids(name) for name in spellings}
        self._forbidden = set(self._ids.values()) - {tokenizer.unk_token_id}
        self._prefixes = {name[:end] for name in spellings for end in range(1, len(name))}
        self._longest = max(map(len, spellings), default=0)
        self._starts = re.compile(f"(?={'|'.join(map(re.escape, spellings)) or '(?!)'})")
        patterns = (_pattern(name, added.get(name)) for name in spellings)
        self._whole = re.compile("|".join(patterns) or "(?!)")

    @property
    def ids(self) -> frozenset[int]:
        """The ids of all control tokens."""
        return frozenset(self._ids.values())

    def breaks(self, text: str) -> list[int]:
        """Where to break `text` so that it spells no control token, alone or joined to what may
        follow it: behind the first character of every spelling, and of the beginning of one at
        the end of the text."""
        places = {match.start() + 1 for match in self._starts.finditer(text)}
        stripped = text.rstrip()
        for start in range(max(0, len(stripped) - self._longest), len(stripped)):
            if stripped[start:] in self._prefixes:
                places.add(start + 1)
        return sorted(places)

    def mark(self, value: Any, marker: str, whole: Sequence[str] = ()) -> Any:
        """`value` (a message, a list of them, any JSON) with `marker` at the breaks of every
        string in it, the keys of objects among them. A text spells the control tokens `whole` as
        it did."""
        if isinstance(value, str):
            kept = {m.start() + 1 for name in whole for m in re.finditer(re.escape(name), value)}
            edges = [0, *(at for at in self.breaks(value) if at not in kept), len(value)]
            return marker.join(value[a:b] for a, b in pairwise(edges))
        if isinstance(value, Mapping):
            return {self.mark(key, marker): self.mark(item, marker) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(item, marker) for item in value]
        return value

    def encode_text(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Tokens of `text`, none of which is a control token, but for the bos and the like that
        `add_special_tokens` puts around it."""
        ids = self._encode(text)
        plain = ids
        if not self._forbidden.isdisjoint(ids):
            # The vocabulary has a spelling as a plain entry: its pieces cannot be that.
            edges = [0, *self.breaks(text), len(text)]
            pieces = (text[a:b] for a, b in pairwise(edges))
            plain = [token for piece in pieces for token in self._encode(piece)]
        if not add_special_tokens:
            return plain
        framed = self._encode(text, add_special_tokens=True)
        before = next(i for i in range(len(framed) + 1) if framed[i : i + len(ids)] == ids)
        return framed[:before] + plain + framed[before + len(ids) :]

    def encode_rendered(self, rendered: str, marker: str) -> list[int]:
        """Tokens of a rendered template whose user text was marked with `marker`."""
        ids: list[int] = []
        end = 0
        for match in self._whole.finditer(rendered):
            ids += self.encode_text(rendered[end : match.start()].replace(marker, ""))
            ids.append(self._ids[match[0].strip()])
            end = match.end()
        return ids + self.encode_text(rendered[end:].replace(marker, ""))

    def _encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer.encode(
            text, add_special_tokens=add_special_tokens, split_special_tokens=True
        )
        return ids


def unused_character(*texts: str) -> str:
    """A character that occurs in none of `texts` and means nothing in any."""
    used = set().union(*texts)
    return next(chr(code) for code in _PRIVATE_USE if chr(code) not in used)


def _pattern(name: str, token: Any) -> str:
    """What the tokenizer matches for an added token: some swallow the white space around them,
    some are only themselves between words."""
    pattern = re.escape(name)
    if getattr(token, "single_word", False):
        pattern = rf"(?<!\w){pattern}(?!\w)"
    before = r"\s*" if getattr(token, "lstrip", False) else ""
    after = r"\s*" if getattr(token, "rstrip", False) else ""
    return before + pattern + after

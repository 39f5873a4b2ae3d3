"""Keeps text that spells a control token (`<turn|>`) from becoming one.

The spelling is broken with a marker before the template is rendered. In the rendered text only the
template's own control tokens are whole: it is split at these, and the text between them is
tokenized without its markers and with control tokens switched off.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary, proxy

from mlx_diffgemma.text.tokenizer import hf_tokenizer

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
        # Templates change the case of some texts, so a spelling is one in any case.
        lower = [name.lower() for name in spellings]
        self._prefixes = {name[:end] for name in lower for end in range(1, len(name))}
        self._longest = max(map(len, spellings), default=0)
        every = "|".join(map(re.escape, spellings)) or "(?!)"
        self._starts = re.compile(f"(?={every})", re.IGNORECASE)
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
            if stripped[start:].lower() in self._prefixes:
                places.add(start + 1)
        return sorted(places)

    def spelled(self, text: str) -> list[str]:
        """The control tokens that a text spells, in their order."""
        return list(dict.fromkeys(match[0].strip() for match in self._whole.finditer(text)))

    def mark(self, value: Any, marker: str, whole: Sequence[str] = ()) -> Any:
        """`value` (a message, a list of them, any JSON) with `marker` at the breaks of every string
        in it, the keys of objects among them. The control tokens `whole` stay spelled as they
        are."""
        if isinstance(value, str):
            kept = {m.start() + 1 for name in whole for m in re.finditer(re.escape(name), value)}
            return _marked(value, (at for at in self.breaks(value) if at not in kept), marker)
        if isinstance(value, Mapping):
            keys = self._mark_keys(list(value), marker)
            items = (self.mark(item, marker, whole) for item in value.values())
            return dict(zip(keys, items, strict=True))
        if isinstance(value, (list, tuple)):
            return [self.mark(item, marker, whole) for item in value]
        return value

    def _mark_keys(self, keys: list[Any], marker: str) -> list[Any]:
        """Keys of one object with `marker` at their breaks. A key that begins with another up to
        one of its breaks has a marker there too, so that templates sort them as before."""
        texts = [key for key in keys if isinstance(key, str)]
        begun = {key[:at].lower() for key in texts for at in self.breaks(key)}
        if not begun:
            return keys
        lengths = sorted(set(map(len, begun)))
        return [
            _marked(
                key,
                (at for at in lengths if at <= len(key) and key[:at].lower() in begun),
                marker,
            )
            if isinstance(key, str)
            else key
            for key in keys
        ]

    def encode_text(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Tokens of `text`, none of which is a control token, but for the bos and the like that
        `add_special_tokens` puts around it."""
        ids = self._encode(text)
        plain = ids
        if not self._forbidden.isdisjoint(ids):
            # The vocabulary has a spelling as a plain entry, which the pieces of it are not.
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


_KNOWN: WeakKeyDictionary[Any, ControlTokens] = WeakKeyDictionary()


def control_tokens_of(tokenizer: Any) -> ControlTokens:
    """The control tokens of a Hugging Face tokenizer, looked up once."""
    known = _KNOWN.get(tokenizer)
    if known is None:
        # What is kept knows the tokenizer weakly, or neither would ever be freed.
        known = _KNOWN[tokenizer] = ControlTokens(proxy(tokenizer))
    return known


def spelled_in(tokenizer: Any, texts: Iterable[str]) -> list[str]:
    """The control tokens of a tokenizer (mlx-lm's wrapper or a Hugging Face tokenizer) that texts
    spell, in their order."""
    controls = control_tokens_of(hf_tokenizer(tokenizer))
    return list(dict.fromkeys(name for text in texts for name in controls.spelled(text)))


def _marked(text: str, places: Iterable[int], marker: str) -> str:
    edges = [0, *places, len(text)]
    return marker.join(text[a:b] for a, b in pairwise(edges))


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

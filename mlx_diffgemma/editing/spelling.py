"""The bytes that each token of a tokenizer stands for. Letter: V ids that the model knows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

_BYTE = rb"<0x[0-9A-Fa-f]{2}>"
_SPACE = "\u2581"  # what sentencepiece writes for a space
_APART = b"\xff"  # a byte that UTF-8 has no use for, so that it can stand between names
_APART_CODE = 0xDCFF  # what `surrogateescape` reads it as
_NO_SPACE = "\uffff"  # a noncharacter that takes the place of a space in names


class Names:
    """How a tokenizer writes each of its tokens: `names[token]` is UTF-8, empty where an id has no
    token.

    All names are kept in one piece, since what is done to 262,144 names one after another takes
    ten times as long.

    Args:
        tokenizer: a Hugging Face tokenizer.
        size: V.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        joined = _in_one_call(tokenizer, size) if tokenizer.is_fast else None
        self._keep(_joined(_one_by_one(tokenizer, size)) if joined is None else joined)
        if joined is not None:
            self._rename(tokenizer.added_tokens_decoder)

    def _keep(self, joined: bytes) -> None:
        self._joined = joined
        self._edges = np.flatnonzero(np.frombuffer(joined, np.uint8) == _APART[0])

    def _rename(self, added: Mapping[int, Any]) -> None:
        """Take in the names of added tokens, of which the model may know none."""
        given = {i: token.content.encode() for i, token in added.items() if i < len(self)}
        others = {i: name for i, name in given.items() if name != self[i]}
        if others:
            names = self.replaced([])
            for token, name in others.items():
                names[token] = name
            self._keep(_joined(names))

    def __len__(self) -> int:
        return len(self._edges) - 1

    def __getitem__(self, token: int) -> bytes:
        return self._joined[self._edges[token] + 1 : self._edges[token + 1]]

    def matching(self, pattern: bytes) -> list[int]:
        """The tokens whose whole name matches `pattern`."""
        found = re.finditer(b"%b(?:%b)(?=%b)" % (_APART, pattern, _APART), self._joined)
        return np.searchsorted(self._edges, [match.start() for match in found]).tolist()

    def replaced(self, texts: Iterable[tuple[str, str]]) -> list[bytes]:
        """All names [V], in which the first text of each pair gave way to the second."""
        joined = self._joined
        for text, other in texts:
            joined = joined.replace(text.encode(), other.encode())
        return joined.split(_APART)[1:-1]

    def byte_level(self) -> list[bytes]:
        """The bytes [V] of names that hold a character for every byte, as byte-level BPE writes
        them; a name with any other character, as an added token may have, stands for itself."""
        text = self._joined.decode(errors="surrogateescape")
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        table = _byte_level_table()
        values = np.full(max(map(ord, table)) + 2, 256, np.uint16)
        for character, byte in table.items():
            values[ord(character)] = byte
        found = values[np.minimum(codes, len(values) - 1)]
        spelled = found.astype(np.uint8).tobytes()
        edges = np.flatnonzero(codes == _APART_CODE)
        pieces = [spelled[start + 1 : stop] for start, stop in pairwise(edges.tolist())]
        others = np.setdiff1d(np.flatnonzero(found == 256), edges)
        for token in np.unique(np.searchsorted(edges, others) - 1).tolist():
            pieces[token] = self[token]
        return pieces


def spell(tokenizer: Any, names: Names) -> list[bytes]:
    """The bytes [V] that the tokenizer's decoder writes for each token in the middle of a text.
    Added tokens go the same way as all others: a run of spaces that is written as U+2581 too."""
    steps = _decoding(tokenizer)
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        return names.byte_level()
    texts: list[tuple[str, str]] = []
    for step in steps:
        if step.get("type") == "Metaspace":
            texts.append((step.get("replacement", _SPACE), " "))
        if step.get("type") == "Replace" and "String" in step["pattern"]:
            texts.append((step["pattern"]["String"], step["content"]))
    pieces = names.replaced(texts)
    if "ByteFallback" in kinds:
        for token in names.matching(_BYTE):
            pieces[token] = bytes.fromhex(names[token][3:5].decode())
    return pieces


def _in_one_call(tokenizer: Any, size: int) -> bytes | None:
    """The names [V] that the model of a fast tokenizer has, joined; None where an id below the
    number of names has none, or where a name holds a space."""
    from tokenizers import Tokenizer, decoders

    plain = Tokenizer(tokenizer.backend_tokenizer.model)
    # This decoder writes a space between two names, where no name has one any more.
    between = decoders.WordPiece(prefix=" ", cleanup=False)
    plain.decoder = decoders.Sequence([decoders.Replace(" ", _NO_SPACE), between])
    known = min(size, plain.get_vocab_size())
    text = plain.decode(list(range(known)), skip_special_tokens=False)
    if _NO_SPACE in text or text.count(" ") != known - 1:
        return None  # ids without a name are left out, so that all after them would be wrong
    names = text.encode().replace(b" ", _APART)
    return b"%b%b%b" % (_APART, names, _APART * (1 + size - known))


def _one_by_one(tokenizer: Any, size: int) -> list[bytes]:
    if tokenizer.is_fast:
        names = map(tokenizer.backend_tokenizer.id_to_token, range(size))
        return [(name or "").encode() for name in names]
    found = [b""] * size
    for name, token in tokenizer.get_vocab().items():
        if 0 <= token < size:
            found[token] = name.encode(errors="surrogatepass")
    return found


def _joined(names: Iterable[bytes]) -> bytes:
    """Names with `_APART` around each."""
    return _APART.join([b"", *names, b""])


def _decoding(tokenizer: Any) -> list[dict[str, Any]]:
    """The steps by which the tokenizer turns the names of tokens into text, as `tokenizer.json`
    describes them."""
    if not tokenizer.is_fast:
        spaces = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
        return [spaces, {"type": "ByteFallback"}]
    decoder = tokenizer.backend_tokenizer.decoder
    layout = {} if decoder is None else json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = layout.get("decoders") or [layout]
    return steps


def _byte_level_table() -> dict[str, int]:
    """The characters that byte-level BPE writes for the 256 bytes: printable ones for themselves,
    the others from U+0100 on in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(others)}

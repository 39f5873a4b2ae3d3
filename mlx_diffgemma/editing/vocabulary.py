"""A vocabulary for constraints: the bytes of its tokens, and the sets of tokens that slots hold.

A vocabulary is read once for a tokenizer: what is read is kept for as long as the tokenizer lives,
and every request shares it. Letters: V ids that the model knows, W = ⌈V / 32⌉ words of a bit mask.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from threading import RLock
from typing import Any, Literal

import numpy as np

from mlx_diffgemma.editing.spelling import Names, spell
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.text.control_tokens import ControlTokens
from mlx_diffgemma.text.tokenizer import hf_tokenizer

Kind = Literal["text", "line", "digits", "word"]

_RESERVED = rb"<unused_?\d+>|\[unused\d+\]|<reserved_?\d+>"
_TURN_ENDS = (rb"<turn\|>", b"<end_of_turn>")
_EDGE = 8  # bytes of a token's beginning and end that are kept as one number
_REMEMBERED = 128  # masks of 4W bytes each: 4 MB at 262,144 words

_DEEPEST = 1000  # bytes of a token; llguidance panics at one of more than 1,024


class Vocabulary:
    """The tokens of a tokenizer as bytes.

    Args:
        tokenizer: mlx-lm's wrapper or a Hugging Face tokenizer.
        size: ids that the model knows, V; ids without a token stand for nothing.

    Raises:
        UsageError: no id ends an answer.

    Attributes:
        pieces: [V] what each token stands for in a text; empty for control and reserved tokens.
        eos: the ids that end an answer.
        end: the id of `eos` that ends a turn, or the first of `eos` where none does; it fills a
            canvas behind the answer.
    """

    def __init__(self, tokenizer: Any, size: int, eos: Sequence[int]) -> None:
        if not eos:
            raise UsageError("eos_token_ids is empty, and an answer needs an end; name one.")
        # `_Kept` refers to the tokenizer weakly, or neither would ever be freed.
        self._tokenizer = hf_tokenizer(tokenizer)
        self._kept = _kept_for(self._tokenizer, size, tuple(eos))
        self.size, self.eos = size, tuple(eos)
        self.end, self.pieces = self._kept.end, self._kept.pieces

    def encode(self, text: str) -> list[int]:
        """Tokens of a piece of text, none of which is a control token."""
        return self._kept.encode(text)

    def bytes_of(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self.pieces[token] for token in tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, with U+FFFD for bytes that make up no character."""
        return self.bytes_of(tokens).decode(errors="replace")

    def spells(self, text: str) -> bool:
        """Whether the vocabulary has tokens for the whole of `text`."""
        return self.bytes_of(self.encode(text)) == text.encode()

    def token_of(self, piece: bytes) -> int:
        """The first token that stands for `piece`.

        Raises:
            ValueError: there is none.
        """
        return self._kept.token_of(piece)

    @property
    def single_bytes(self) -> dict[int, int]:
        """The first token that stands for each byte alone, as far as there is one."""
        return self._kept.single_bytes

    @property
    def text(self) -> np.ndarray:
        """Mask [W] of the tokens that stand for text."""
        return self.kind("text")

    def kind(self, kind: Kind) -> np.ndarray:
        """Mask [W] of the tokens that a slot of this kind may hold: any text, text without the end
        of a line, ASCII digits, or letters that make up whole characters."""
        return self._kept.kind(kind)

    def mask(self, holds: Callable[[bytes], bool]) -> np.ndarray:
        """Mask [W] of the text tokens whose bytes satisfy `holds`, remembered by that function."""
        return self._kept.mask(holds)

    def starting_with(self, piece: bytes) -> np.ndarray:
        """Mask [W] of the text tokens that begin with `piece`."""
        return self._kept.starting_with(piece)

    def ending_with(self, piece: bytes) -> np.ndarray:
        """Mask [W] of the text tokens that end with `piece`."""
        return self._kept.ending_with(piece)

    @property
    def grammar_tokenizer(self) -> Any:
        """This vocabulary for llguidance; a matcher needs the `Vocabulary` while it is used."""
        return self._kept.grammar_tokenizer

    @property
    def byte_tokenizer(self) -> Any:
        """For llguidance, a vocabulary of the bytes that occur in this one, and 256 for the end."""
        return self._kept.byte_tokenizer


class _Kept:
    """What is read and computed once for a tokenizer, read-only; `tokenizer` is a weak proxy.

    Attributes:
        lengths: [V] bytes of each token, 0 for those that are no text.
    """

    def __init__(self, tokenizer: Any, size: int, eos: tuple[int, ...]) -> None:
        self.size, self.eos = size, eos
        self._controls = ControlTokens(tokenizer)
        names = Names(tokenizer, size)
        turns = [token for name in _TURN_ENDS for token in names.matching(name)]
        self.end = next((token for token in turns if token in eos), eos[0])
        self.pieces = spell(tokenizer, names)
        for token in self._silent(tokenizer, names):
            self.pieces[token] = b""
        self.lengths = np.fromiter(map(len, self.pieces), np.int32, size)
        self.mask = lru_cache(_REMEMBERED // 4)(self._mask)
        self.kind = lru_cache(None)(self._kind)
        self.starting_with = lru_cache(_REMEMBERED // 4)(self._starting_with)
        self.ending_with = lru_cache(_REMEMBERED // 4)(self._ending_with)

    def encode(self, text: str) -> list[int]:
        return self._controls.encode_text(text) if text else []

    def token_of(self, piece: bytes) -> int:
        found = self._edged_with(piece, self._heads, bytes.startswith)
        same = found[self.lengths[found] == len(piece)]
        if not piece or not len(same):
            raise ValueError(f"no token stands for {piece!r}")
        return int(same[0])

    @cached_property
    def single_bytes(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for token in np.flatnonzero(self.lengths == 1).tolist():
            found.setdefault(self.pieces[token][0], token)
        return found

    @cached_property
    def grammar_tokenizer(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        pieces = self.pieces
        if self.lengths.max(initial=0) > _DEEPEST:  # a text under a grammar is spelt without them
            pieces = [piece if len(piece) <= _DEEPEST else b"" for piece in pieces]
        # Rust keeps this wrapper out of the garbage collector's sight: it must not lead back here.
        wrapper = TokenizerWrapper(_ForGrammars(pieces, self.eos, self._controls.encode_text))
        # "Slices", masks of runs of text made in advance, take longer than most answers are spared.
        return LLTokenizer(wrapper, n_vocab=self.size, eos_token=list(self.eos), slices=[])

    @cached_property
    def byte_tokenizer(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        occurring = set(np.flatnonzero(np.bincount(self._bytes, minlength=256)).tolist())
        pieces = [bytes([byte]) if byte in occurring else b"" for byte in range(256)] + [b""]
        wrapper = TokenizerWrapper(_ForGrammars(pieces, (256,), lambda text: list(text.encode())))
        return LLTokenizer(wrapper, n_vocab=257, eos_token=[256], slices=[])

    def _silent(self, tokenizer: Any, names: Names) -> Iterable[int]:
        """The tokens that stand for no text."""
        silent = {*tokenizer.all_special_ids, *self.eos, *self._controls.ids}
        silent |= {i for i, entry in tokenizer.added_tokens_decoder.items() if entry.special}
        silent |= set(names.matching(_RESERVED))
        return (token for token in silent if 0 <= token < self.size)

    def _mask(self, holds: Callable[[bytes], bool]) -> np.ndarray:
        return _packed([bool(piece) and bool(holds(piece)) for piece in self.pieces])

    def _kind(self, kind: Kind) -> np.ndarray:
        if kind == "text":
            return _packed(self.lengths > 0)
        if kind == "line":
            return _packed((self.lengths > 0) & ~self._holds(b"\r\n"))
        if kind == "digits":
            others = bytes(set(range(256)) - set(b"0123456789"))
            return _packed((self.lengths > 0) & ~self._holds(others))
        return _packed([piece.decode(errors="replace").isalpha() for piece in self.pieces])

    def _holds(self, some: bytes) -> np.ndarray:
        """[V] which tokens hold at least one of these bytes."""
        wanted = np.zeros(256, bool)
        wanted[list(some)] = True
        holding = np.zeros(self.size, bool)
        if len(self._bytes):
            texts = np.flatnonzero(self.lengths)
            starts = (self._stops - self.lengths)[texts]
            holding[texts] = np.logical_or.reduceat(wanted[self._bytes], starts)
        return holding

    def _starting_with(self, piece: bytes) -> np.ndarray:
        return self._packed_tokens(self._edged_with(piece, self._heads, bytes.startswith))

    def _ending_with(self, piece: bytes) -> np.ndarray:
        return self._packed_tokens(self._edged_with(piece, self._tails, bytes.endswith))

    def _edged_with(
        self, piece: bytes, edges: np.ndarray, holds: Callable[[bytes, bytes], bool]
    ) -> np.ndarray:
        """The text tokens that begin or end with `piece`, by their `edges` [V]: the bytes there as
        a number, the outermost in the highest place."""
        outermost = piece[:_EDGE] if holds is bytes.startswith else piece[: -_EDGE - 1 : -1]
        unseen = 8 * (_EDGE - len(outermost))
        same = self.lengths >= max(1, len(piece))
        if outermost:
            same &= edges >> np.uint64(unseen) == int.from_bytes(outermost, "big")
        found = np.flatnonzero(same)
        if len(piece) > _EDGE:
            found = found[[holds(self.pieces[token], piece) for token in found.tolist()]]
        return found

    def _packed_tokens(self, tokens: np.ndarray) -> np.ndarray:
        chosen = np.zeros(self.size, bool)
        chosen[tokens] = True
        return _packed(chosen)

    @cached_property
    def _bytes(self) -> np.ndarray:
        """The bytes of all tokens one after another, uint8."""
        return np.frombuffer(b"".join(self.pieces), np.uint8)

    @cached_property
    def _stops(self) -> np.ndarray:
        """[V] where each token ends in `_bytes`."""
        return np.cumsum(self.lengths)

    @cached_property
    def _heads(self) -> np.ndarray:
        """[V] uint64, the first bytes of each token, the first in the highest place."""
        return self._edges(self._stops - self.lengths, 1)

    @cached_property
    def _tails(self) -> np.ndarray:
        """[V] uint64, the last bytes of each token, the last in the highest place."""
        return self._edges(self._stops - 1, -1)

    def _edges(self, first: np.ndarray, step: int) -> np.ndarray:
        edges = np.zeros(self.size, np.uint64)
        for place in range(_EDGE):
            there = np.flatnonzero(self.lengths > place)
            found = self._bytes[first[there] + place * step].astype(np.uint64)
            edges[there] |= found << np.uint64(8 * (_EDGE - 1 - place))
        return edges


class _ForGrammars:
    """What llguidance asks of a tokenizer."""

    def __init__(
        self, pieces: list[bytes], eos: tuple[int, ...], encode: Callable[[str], list[int]]
    ) -> None:
        # What a grammar forces is asked for again and again.
        self._encode = lru_cache(maxsize=4096)(encode)
        self.tokens = pieces
        self.eos_token_id = eos[0]
        self.bos_token_id = None
        self.special_token_ids = list(eos)

    def __call__(self, text: bytes | str) -> list[int]:
        """Tokens that spell `text`, as far as the vocabulary can."""
        whole = text.encode() if isinstance(text, str) else text
        tokens, end = list[int](), 0
        for token in self._encode(whole.decode()) if whole else ():
            piece = self.tokens[token]
            if not piece or not whole.startswith(piece, end):
                break
            tokens.append(token)
            end += len(piece)
        return tokens


_lock = RLock()
_by_tokenizer: weakref.WeakKeyDictionary[Any, dict[Any, _Kept]] = weakref.WeakKeyDictionary()


def _kept_for(tokenizer: Any, size: int, eos: tuple[int, ...]) -> _Kept:
    """What is known of a tokenizer; read at the first call, and again when tokens were added."""
    key = size, eos, len(tokenizer)
    with _lock:
        kept = _by_tokenizer.setdefault(tokenizer, {})
        if key not in kept:
            kept[key] = _Kept(weakref.proxy(tokenizer), size, eos)
        return kept[key]


def _packed(chosen: Sequence[bool] | np.ndarray) -> np.ndarray:
    """A mask [W] uint32 of the tokens that are `chosen` [V]; nobody may write to it, since it is
    shared."""
    size = len(chosen)
    bits = np.zeros(-(-size // 32) * 32, bool)
    bits[:size] = chosen
    mask = np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)
    mask.setflags(write=False)
    return mask

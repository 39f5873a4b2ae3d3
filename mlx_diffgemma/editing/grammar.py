"""Grammars over token ids, by llguidance: JSON schemas, regular expressions, choices."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from mlx_diffgemma.diffusion.closing import Closer
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.errors import DiffGemmaError, UsageError

# What ends JSON, then what makes up short values and names, then all else that can be typed.
_ENDING = '"}]0,:1{[-.' + "".join(map(chr, range(0x20, 0x7F))) + "\n\t\r"


class GrammarMatcher:
    """Where a grammar stands; see `mlx_diffgemma.diffusion.matching.Matcher`."""

    def __init__(self, inner: Any, vocabulary: Vocabulary) -> None:
        # llguidance asks the tokenizer, which lives no longer than those who use the vocabulary.
        self._inner, self._vocabulary = inner, vocabulary

    @classmethod
    def start(cls, vocabulary: Vocabulary, grammar: str, what: str) -> GrammarMatcher:
        """A matcher before the first token.

        Raises:
            UsageError: the grammar is malformed or cannot be satisfied; `what` names it.
        """
        from llguidance import LLMatcher

        inner = LLMatcher(vocabulary.grammar_tokenizer, grammar, log_level=0)
        if inner.is_error():
            raise UsageError(f"{what} cannot be used: {_first_line(inner.get_error())}")
        return cls(inner, vocabulary)

    def matching(self, tokens: Sequence[int]) -> int:
        return int(self._inner.validate_tokens(list(tokens)))

    def advance(self, tokens: Sequence[int]) -> None:
        """Raises:
        DiffGemmaError: the grammar has grown too complex to follow.
        """
        self._inner.consume_tokens(list(tokens))
        if self._inner.is_error():
            raise DiffGemmaError(
                f"the constraint cannot be followed: {_first_line(self._inner.get_error())}"
            )

    def allowed(self) -> np.ndarray:
        mask = np.zeros(-(-self._vocabulary.size // 32), np.uint32)
        found = np.frombuffer(self._inner.compute_bitmask(), np.uint32)
        mask[: len(found)] = found[: len(mask)]
        return mask

    def forced(self) -> list[int]:
        return list(self._inner.compute_ff_tokens())

    def signature(self) -> Hashable:
        # In bytes: tokens would have to be encoded each time.
        return self._inner.compute_bitmask(), self._inner.compute_ff_bytes()

    @property
    def may_end(self) -> bool:
        return bool(self._inner.is_accepting())

    @property
    def must_end(self) -> bool:
        return bool(self._inner.is_stopped())

    def copy(self) -> GrammarMatcher:
        return GrammarMatcher(self._inner.deep_copy(), self._vocabulary)


def json_schema_matcher(vocabulary: Vocabulary, schema: Mapping[str, Any] | bool) -> GrammarMatcher:
    """JSON that validates against `schema`, on one line, as `json.dumps` spaces it.

    Raises:
        UsageError: the schema is malformed, unsatisfiable, or uses what cannot be enforced.
    """
    from llguidance import LLMatcher

    spacing: Any = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=spacing)
    except ValueError as error:
        raise UsageError(f"the JSON schema cannot be used: {_first_line(str(error))}") from None
    return GrammarMatcher.start(vocabulary, grammar, "the JSON schema")


def regex_matcher(
    vocabulary: Vocabulary, pattern: str, what: str = "the regular expression"
) -> GrammarMatcher:
    """Text that matches the whole of `pattern`, in Rust's regex syntax.

    Raises:
        UsageError: the pattern is malformed or uses what cannot be enforced.
    """
    from llguidance import LLMatcher

    return GrammarMatcher.start(vocabulary, LLMatcher.grammar_from_regex(pattern), what)


def choices_matcher(vocabulary: Vocabulary, choices: Sequence[str]) -> GrammarMatcher:
    """One of the `choices`.

    Raises:
        UsageError: there is none, one is empty, or the vocabulary lacks a character of one.
    """
    if not choices or not all(choices):
        raise UsageError("give at least one choice, and none of them empty.")
    for choice in choices:
        if not vocabulary.spells(choice):
            raise UsageError(
                f"the model's vocabulary cannot write the choice {choice!r}; choose another word."
            )
    pattern = "|".join(re.escape(choice) for choice in choices)
    return regex_matcher(vocabulary, f"({pattern})", "the list of choices")


def closer(vocabulary: Vocabulary) -> Closer:
    """Endings in tokens of one character, as far as the vocabulary has them."""
    ids = vocabulary.single_bytes
    return Closer([ids[ord(c)] for c in _ENDING if ord(c) in ids] + list(ids.values()))


def _first_line(message: str) -> str:
    return next((line.strip() for line in message.splitlines() if line.strip()), "no reason given")

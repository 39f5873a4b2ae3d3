"""Texts that patterns match, tried out before a grammar meets them.

A lexer of llguidance that has grown too complex fails for good, in all copies of its matcher. So
each text is tried in a grammar of its own.
"""

from __future__ import annotations

import json
from typing import Any

from mlx_diffgemma.editing.examples import example
from mlx_diffgemma.editing.vocabulary import Vocabulary

_FUEL = 4_000_000  # llguidance's measure of how complex a lexer grows: a million for `a{1000}`
_SIMPLE = 500  # characters that are hardly ever too complex
_LONG = 1500  # characters from which on a trial takes no more time: it has run out of fuel
_WORK = 20 * _LONG**2  # squares of characters that are tried, since that is how the time grows


class Trials:
    """Tries the patterns of one constraint.

    Args:
        vocabulary: the words that an answer is written in.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._work = _WORK

    def too_complex(self, pattern: str, grammar: str) -> int:
        """The length of a text that `pattern` matches, if that is more than the `grammar`, of JSON
        strings that match, can follow; else 0."""
        text = example(pattern) or ""
        if len(text) <= _SIMPLE:
            return 0
        trial = self._trial(grammar, json.dumps(text).encode())
        return len(text) if trial is not None and "lexer error" in trial.get_error() else 0

    def example(self, pattern: str, grammar: str, *, quoted: bool) -> bytes | None:
        """A short text that `pattern` matches, as it stands in quotes in JSON if `quoted`; None
        where there is none that the vocabulary writes and that the `grammar`, of this pattern only,
        takes."""
        found = example(pattern)
        if found is None:
            return None
        text = (json.dumps(found, ensure_ascii=False) if quoted else found).encode(errors="replace")
        trial = self._trial(grammar, text)
        if trial is None or trial.is_error() or not trial.is_accepting():
            return None
        return text[1:-1] if quoted else text

    def _trial(self, grammar: str, text: bytes) -> Any:
        """A matcher that has taken in `text` or is in error; None when too much was tried. It may
        use half of what an answer's matcher may, which has more than this pattern to follow."""
        self._work -= min(len(text), _LONG) ** 2
        if self._work < 0:
            return None
        trial = compiled(self._vocabulary.byte_tokenizer, grammar, _FUEL // 2)
        trial.consume_tokens(list(text))
        return trial


def compiled(tokenizer: Any, grammar: str, fuel: int = _FUEL) -> Any:
    """An `LLMatcher` of a grammar before the first token."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(initial_lexer_fuel=fuel, step_lexer_fuel=fuel)
    return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)

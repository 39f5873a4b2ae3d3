"""Grammars over token ids, by llguidance: JSON schemas, regular expressions, choices."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from mlx_diffgemma.diffusion.closing import Closer
from mlx_diffgemma.editing.ecma import without_nesting
from mlx_diffgemma.editing.endings import Endings
from mlx_diffgemma.editing.schemas import enforceable
from mlx_diffgemma.editing.trials import Trials, compiled
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.errors import DiffGemmaError, UsageError

_MASKS = 64  # masks that are remembered: 2 MB for a vocabulary of 262,144


class Masks:
    """The masks of one grammar by what was written, so that a draft that is read again, or a way
    that is looked ahead along again, needs no new mask. Letter: W words of a bit mask.

    Attributes:
        computed: how many masks were computed so far.
    """

    def __init__(self) -> None:
        self.computed = 0
        self._known: OrderedDict[tuple[int, ...], np.ndarray] = OrderedDict()

    def of(self, written: tuple[int, ...], compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The mask [W] after the tokens `written`; the array is read-only."""
        found = self._known.get(written)
        if found is None:
            found = self._known[written] = compute()
            found.setflags(write=False)
            self.computed += 1
            if len(self._known) > _MASKS:
                self._known.popitem(last=False)
        self._known.move_to_end(written)
        return found


class GrammarMatcher:
    """A `mlx_diffgemma.diffusion.matching.Matcher` of a grammar of llguidance.

    Attributes:
        masks: the masks that this matcher and its copies share.
    """

    def __init__(
        self,
        inner: Any,
        spelled: Any,
        endings: Endings,
        vocabulary: Vocabulary,
        masks: Masks,
        written: tuple[int, ...] = (),
    ) -> None:
        # The same state in tokens and in bytes, and the endings that all copies know.
        self._inner, self._spelled, self._endings = inner, spelled, endings
        self.masks, self._written = masks, written
        # llguidance asks the tokenizer, which lives no longer than those who use the vocabulary.
        self._vocabulary = vocabulary

    @classmethod
    def start(
        cls, vocabulary: Vocabulary, grammar: str, what: str, endings: Endings
    ) -> GrammarMatcher:
        """A matcher before the first token.

        Args:
            endings: what finds the ways out of this grammar.

        Raises:
            UsageError: the grammar is malformed or cannot be satisfied; `what` names it.
        """
        inner = compiled(vocabulary.grammar_tokenizer, grammar)
        if inner.is_error():
            raise UsageError(f"{what} cannot be used: {_reason(inner.get_error())}")
        spelled = compiled(vocabulary.byte_tokenizer, grammar)
        return cls(inner, spelled, endings, vocabulary, Masks())

    def matching(self, tokens: Sequence[int]) -> int:
        return int(self._inner.validate_tokens(list(tokens)))

    def advance(self, tokens: Sequence[int]) -> None:
        """Take in tokens that may follow.

        Raises:
            DiffGemmaError: the grammar has grown too complex to follow.
        """
        self._inner.consume_tokens(list(tokens))
        self._written += tuple(tokens)
        self._spelled.consume_tokens(list(self._vocabulary.bytes_of(tokens)))
        if self._inner.is_error():
            raise DiffGemmaError(
                f"the constraint cannot be followed: {_reason(self._inner.get_error())}"
            )

    def allowed(self) -> np.ndarray:
        return self.masks.of(self._written, self._mask)

    def _mask(self) -> np.ndarray:
        mask = np.zeros(-(-self._vocabulary.size // 32), np.uint32)
        found = np.frombuffer(self._inner.compute_bitmask(), np.uint32)
        mask[: len(found)] = found[: len(mask)]
        return mask

    def forced(self) -> list[int]:
        return list(self._inner.compute_ff_tokens())

    def signature(self) -> Hashable:
        # In bytes: a mask over all tokens takes a thousand times as long.
        return self._spelled.compute_bitmask(), self._spelled.compute_ff_bytes()

    @property
    def may_end(self) -> bool:
        return bool(self._inner.is_accepting())

    @property
    def must_end(self) -> bool:
        return bool(self._inner.is_stopped())

    def copy(self) -> GrammarMatcher:
        return GrammarMatcher(
            self._inner.deep_copy(),
            self._spelled.deep_copy(),
            self._endings,
            self._vocabulary,
            self.masks,
            self._written,
        )

    def way_out(self, most: int, *, thorough: bool = False) -> list[int] | None:
        """At most `most` tokens that complete what was taken in; None where none are found. If
        `thorough`, the search for them takes more steps."""
        if self.may_end:
            return []
        if most < 1:
            return None
        ways: list[list[int]] = []

        def length_of(ending: bytes) -> int | None:
            tokens = self._tokens_of(ending)
            if tokens is None:
                return None
            ways.append(tokens)
            return len(tokens)

        found = self._endings.find(self._spelled, length_of, most, thorough=thorough)
        return None if found is None else ways[-1]

    def _tokens_of(self, ending: bytes) -> list[int] | None:
        """The tokens of an ending, as the tokenizer splits it where the grammar takes that, or else
        byte by byte; None where the grammar takes neither."""
        vocabulary = self._vocabulary
        singly = [vocabulary.single_bytes.get(byte, -1) for byte in ending]
        try:
            own = vocabulary.encode(ending.decode())
        except UnicodeDecodeError:
            own = singly
        for tokens in (own, singly):
            if vocabulary.bytes_of(tokens) == ending and -1 not in tokens:
                whole = [*tokens, vocabulary.eos[0]]
                if self._inner.validate_tokens(whole) == len(whole):
                    return tokens
        return None


def json_schema_matcher(
    vocabulary: Vocabulary, schema: Mapping[str, Any] | bool, *, lenient: bool = False
) -> GrammarMatcher:
    """A matcher of JSON that validates against `schema`, on one line, as `json.dumps` spaces it; if
    `lenient`, keywords that cannot be enforced are ignored.

    Raises:
        UsageError: the schema is malformed, unsatisfiable or, unless `lenient`, uses what cannot
            be enforced.
    """
    from llguidance import LLMatcher

    trials = Trials(vocabulary)

    def fault(pattern: str) -> str | None:
        tried = _json_grammar({"type": "string", "pattern": pattern})
        error = LLMatcher.validate_grammar(tried, vocabulary.byte_tokenizer)
        if error:
            return None if "Unsatisfiable" in error else _reason(error).rstrip(".")
        length = trials.too_complex(pattern, tried)
        if not length:
            return None
        return (
            f"a text that matches takes {length:,} characters, which are too complex to follow; "
            "shorten it, or begin it with '^'"
        )

    grammar = _json_grammar(enforceable(schema, fault, lenient=lenient).schema)

    def written(pattern: str) -> bytes | None:
        alone = _json_grammar({"type": "string", "pattern": without_nesting(pattern)})
        return trials.example(pattern, alone, quoted=True)

    endings = Endings(_patterns(schema), written, quoted=True)
    return GrammarMatcher.start(vocabulary, grammar, "the JSON schema", endings)


def _json_grammar(schema: Mapping[str, Any]) -> str:
    from llguidance import LLMatcher

    spacing: Any = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=spacing)
    except ValueError as error:
        raise UsageError(f"the JSON schema cannot be used: {_reason(str(error))}") from None


def regex_matcher(
    vocabulary: Vocabulary, pattern: str, what: str = "the regular expression"
) -> GrammarMatcher:
    """A matcher of text that matches the whole of `pattern`, in Rust's regex syntax. An error calls
    the pattern `what`.

    Raises:
        UsageError: the pattern is malformed or uses what cannot be enforced.
    """
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_regex(pattern)

    def written(pattern: str) -> bytes | None:
        return Trials(vocabulary).example(pattern, grammar, quoted=False)

    return GrammarMatcher.start(
        vocabulary, grammar, what, Endings([pattern], written, quoted=False)
    )


def choices_matcher(vocabulary: Vocabulary, choices: Sequence[str]) -> GrammarMatcher:
    """A matcher of one of the `choices`.

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
    """What keeps the end of any grammar over `vocabulary` within reach."""
    return Closer()


def _patterns(schema: Any) -> list[str]:
    """The regular expressions in a schema, in the order in which it names them."""
    patterns: list[str] = []
    waiting = [schema]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Mapping):
            patterns += [item["pattern"]] if isinstance(item.get("pattern"), str) else []
            named = item.get("patternProperties")
            patterns += named if isinstance(named, Mapping) else []
            waiting += reversed([*item.values()])
        elif isinstance(item, (list, tuple)):
            waiting += reversed(item)
    return [pattern for pattern in patterns if isinstance(pattern, str)]


def _reason(message: str) -> str:
    """What went wrong, in one line; a regular expression's reason stands in the last of several."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no reason given"]
    reasons = [line.removeprefix("error: ") for line in lines[1:] if line.startswith("error: ")]
    if lines[0].endswith("regex parse error:") and reasons:
        return reasons[0]  # what comes before repeats the whole expression
    return lines[0]

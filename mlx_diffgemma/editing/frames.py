"""Canvases for typed questions: text that is pinned, with a place of one token for each answer.

Letters: C canvas, K options of a question.
"""

from __future__ import annotations

import string
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from mlx_diffgemma.diffusion.constraints import FREE, Layout
from mlx_diffgemma.editing.questions import Question
from mlx_diffgemma.editing.template import parse_template
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.text.tokenizer import hf_tokenizer

ROUND = 16  # positions by whose multiples canvases grow
_SIDES = [("yes", "no"), ("Yes", "No"), ("true", "false"), ("Y", "N"), ("1", "0")]
_LONGEST = 4  # most characters of a label that is taken from the vocabulary


@dataclass(frozen=True)
class Frame:
    """The text of one canvas, with a place left open for each answer.

    Attributes:
        tokens: token ids of the text, `FREE` where an answer stands, without what fills the canvas
            up.
        slots: by question, in the order of their places: the question's number, its place, and the
            token [K] of each option's label.
    """

    tokens: tuple[int, ...]
    slots: tuple[tuple[int, int, tuple[int, ...]], ...]

    def layout(self, length: int, end: int) -> Layout:
        """The canvas of `length` tokens, filled up with `end`."""
        tail = [end] * (length - len(self.tokens))
        return Layout(
            (*self.tokens, *tail), candidates={place: tokens for _, place, tokens in self.slots}
        )


def labels_for(
    tokenizer: Any, vocabulary: Vocabulary, questions: Sequence[Question]
) -> list[list[str]]:
    """A label for each option of each question, one token each where an answer stands: yes and no,
    the numbers of levels, letters, then digits and other short words of the vocabulary.

    Raises:
        UsageError: the vocabulary has too few labels for a question, which is named.
    """
    found = _labels_of(tokenizer)
    labels = []
    for question in questions:
        count = len(question.options)
        own = found.sides(vocabulary) if question.kind == "noul" else None
        if question.kind == "score":
            own = found.usable(vocabulary, question.options)
        own = own or found.first(vocabulary, count)
        if len(own) < count:
            raise UsageError(
                f"{question.title} has {count} options, and the model's vocabulary has labels of "
                f"one token for {len(own)}; give fewer."
            )
        labels.append(own)
    return labels


def lines(
    vocabulary: Vocabulary,
    questions: Sequence[Question],
    labels: Sequence[Sequence[str]],
    longest: int,
    *,
    separate: bool = False,
) -> list[Frame]:
    """A line for each question, its number and its label, in as few canvases as hold them, of at
    most `longest` tokens, one of which ends the answer; if `separate`, each in one of its own.

    Raises:
        UsageError: a question does not fit, which is named.
    """
    frames: list[Frame] = []
    tokens: list[int] = []
    slots: list[tuple[int, int, tuple[int, ...]]] = []
    text = ""
    for number, (question, own) in enumerate(zip(questions, labels, strict=True)):
        line, place, ids = _slot(vocabulary, question, f"{number + 1}: ", own, "\n")
        if slots and (separate or len(tokens) + len(line) >= longest):
            frames.append(_checked(vocabulary, text, tokens, slots, questions))
            tokens, slots, text = [], [], ""
        if len(line) >= longest:
            raise UsageError(
                f"{question.title}: its line takes {len(line)} tokens, and the canvas holds "
                f"{longest}; take a longer canvas_length."
            )
        slots.append((number, len(tokens) + place, ids))
        tokens += line
        text += f"{number + 1}: {own[0]}\n"
    return [*frames, _checked(vocabulary, text, tokens, slots, questions)]


def from_template(
    vocabulary: Vocabulary, template: str, questions: Sequence[Question], longest: int
) -> Frame:
    """A frame of the caller's own: the whole answer, with `{name}` where the answer to the question
    of that name stands. An option stands there by its name, so that must be one token.

    Raises:
        UsageError: the template is malformed, a question has not one place in it, a name is not one
            token there, or the frame does not fit in `longest` tokens.
    """
    literals, parsed = parse_template(template)
    names = [slot.name for slot in parsed]
    numbers = {question.name: number for number, question in enumerate(questions)}
    for slot in parsed:
        if slot.name not in numbers or slot.kind != "line":
            raise UsageError(
                f"the frame has a place '{slot.name}' that is not the bare name of a question."
            )
    for question in questions:
        if names.count(question.name) != 1:
            raise UsageError(
                f"{question.title} has {names.count(question.name)} places in the frame; give it "
                f"one, {{{question.name}}}."
            )
    asked = [questions[numbers[name]] for name in names]
    first = [question.options[0] for question in asked]
    tokens: list[int] = []
    slots = []
    for at, question in enumerate(asked):
        before = "".join(map("".join, zip(literals[:at], first[:at], strict=True))) + literals[at]
        rest = zip(first[at + 1 :], literals[at + 2 :], strict=True)
        after = literals[at + 1] + "".join(map("".join, rest))
        tokens, place, ids = _slot(vocabulary, question, before, question.options, after)
        slots.append((numbers[question.name], place, ids))
    if len(tokens) >= longest:
        raise UsageError(
            f"the frame takes {len(tokens)} tokens, and the canvas holds {longest}; shorten it."
        )
    for _, place, _ in slots:
        tokens[place] = FREE
    return Frame(tuple(tokens), tuple(slots))


def length_of(frame: Frame, longest: int) -> int:
    """How many tokens a canvas for a frame and the end behind it has: a multiple of `ROUND`, but
    at most `longest`."""
    return min(longest, -(-(len(frame.tokens) + 1) // ROUND) * ROUND)


def _checked(
    vocabulary: Vocabulary,
    text: str,
    tokens: Sequence[int],
    slots: Sequence[tuple[int, int, tuple[int, ...]]],
    questions: Sequence[Question],
) -> Frame:
    """The frame of lines that were tokenized one by one.

    Raises:
        UsageError: the whole text has other tokens.
    """
    whole = vocabulary.encode(text)
    if whole != list(tokens):
        same = next((n for n, (a, b) in enumerate(zip(whole, tokens, strict=False)) if a != b), 0)
        number = next((n for n, place, _ in slots if place >= same), slots[-1][0])
        raise UsageError(
            f"{questions[number].title}: the vocabulary joins its line with its neighbour's, so no "
            "label is a token of its own; ask with separate, or in a frame of your own."
        )
    pinned = list(tokens)
    for _, place, _ in slots:
        pinned[place] = FREE
    return Frame(tuple(pinned), tuple(slots))


def _slot(
    vocabulary: Vocabulary, question: Question, before: str, labels: Sequence[str], after: str
) -> tuple[list[int], int, tuple[int, ...]]:
    """The tokens of a text with the first label in it, the place of the label, and the token [K] of
    each label there.

    Raises:
        UsageError: a label is not one token there, or two are the same.
    """
    found, whole, at = list[int](), list[int](), -1
    for label in labels:
        seen = _single(vocabulary, before, label, after)
        if seen is None or (found and (seen[1] != at or _others(seen) != _others((whole, at)))):
            raise UsageError(
                f"{question.title}: {label!r:.60} is not one token of the model's vocabulary "
                "where it is to stand; name the option otherwise."
            )
        if not found:
            whole, at = seen
        found.append(seen[0][at])
    if len(set(found)) < len(found):
        raise UsageError(f"{question.title}: two options are the same token; name one otherwise.")
    return whole, at, tuple(found)


def _others(seen: tuple[list[int], int]) -> list[int]:
    return [*seen[0][: seen[1]], *seen[0][seen[1] + 1 :]]


def _single(
    vocabulary: Vocabulary, before: str, label: str, after: str
) -> tuple[list[int], int] | None:
    """The tokens of the text and the place of the one token that is the label, with no more than a
    space in front; None where it is no token of its own."""
    tokens = vocabulary.encode(f"{before}{label}{after}")
    if vocabulary.bytes_of(tokens) != f"{before}{label}{after}".encode():
        return None
    wanted, end = len(before.encode()), 0
    for place, token in enumerate(tokens):
        end += len(vocabulary.pieces[token])
        if end > wanted:
            spelled = vocabulary.pieces[token]
            fits = spelled in (label.encode(), b" " + label.encode())
            return (tokens, place) if fits and end == wanted + len(label.encode()) else None
    return None


class _Labels:
    """What is known of the labels of a tokenizer.

    The labels of one question are one token each in a line among others, and leave the tokens
    around them alike: where a vocabulary joins letters with the space before them, but not digits,
    a letter and a digit cannot be labels of one question.
    """

    def __init__(self) -> None:
        self._tried: list[tuple[str, int, tuple[int, ...]]] = []
        self._more: Iterator[str] | None = None
        self._sides: list[str] | None = None

    def sides(self, vocabulary: Vocabulary) -> list[str] | None:
        """The labels of true and false, if a pair of words can be written."""
        if self._sides is None:
            usable = (self.usable(vocabulary, pair) for pair in _SIDES)
            self._sides = next((pair for pair in usable if pair), [])
        return self._sides or None

    def usable(self, vocabulary: Vocabulary, labels: Sequence[str]) -> list[str] | None:
        """These labels, if they can be those of one question."""
        seen = [_in_a_line(vocabulary, label) for label in labels]
        found = [each for each in seen if each is not None]
        alike = len({around for _, around in found}) == 1
        different = len({token for token, _ in found}) == len(labels)
        return list(labels) if alike and different else None

    def first(self, vocabulary: Vocabulary, count: int) -> list[str]:
        """The first `count` labels of one question, or as many as there are."""
        groups: dict[tuple[int, ...], dict[int, str]] = {}
        for label, token, around in self._known(vocabulary):
            group = groups.setdefault(around, {})
            group.setdefault(token, label)
            if len(group) == count:
                return list(group.values())
        return list(max(groups.values(), key=len, default={}).values())

    def _known(self, vocabulary: Vocabulary) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        """Every label with its token and the tokens around it, in an order that is always the
        same."""
        yield from list(self._tried)
        if self._more is None:
            self._more = _candidates(vocabulary)
        for label in self._more:
            seen = _in_a_line(vocabulary, label)
            if seen is not None:
                self._tried.append((label, *seen))
                yield self._tried[-1]


def _in_a_line(vocabulary: Vocabulary, label: str) -> tuple[int, tuple[int, ...]] | None:
    """The token of a label in a line among others, and the tokens around it; None where the label
    is not one token."""
    seen = _single(vocabulary, "1: A\n2: ", label, "\n3: A\n")
    return None if seen is None else (seen[0][seen[1]], tuple(_others(seen)))


_by_tokenizer: weakref.WeakKeyDictionary[Any, _Labels] = weakref.WeakKeyDictionary()


def _labels_of(tokenizer: Any) -> _Labels:
    return _by_tokenizer.setdefault(hf_tokenizer(tokenizer), _Labels())


def _candidates(vocabulary: Vocabulary) -> Iterator[str]:
    """Labels to try: letters, digits, pairs of letters, then what the vocabulary holds."""
    yield from string.ascii_uppercase + string.ascii_lowercase + string.digits
    yield from map("".join, product(string.ascii_uppercase, repeat=2))
    for piece in list(vocabulary.pieces):
        label = piece.decode(errors="replace").strip()
        if len(label) <= _LONGEST and label.isascii() and label.isprintable() and ":" not in label:
            yield label

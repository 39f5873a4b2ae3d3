"""Typed questions about a state: what may be asked, how it is read from JSON, and how it is written
for the model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from mlx_diffgemma.checks import check_integer
from mlx_diffgemma.errors import PromptError, UsageError
from mlx_diffgemma.settings import Setting

KINDS = ("noul", "choice", "score")
LEAST, MOST = 2, 255
"""How many options a question may have."""
DEPTH = 64
"""Levels of lists and objects that a state or an instruction may have."""

_HEAD = "Questions about what stands above. Each has its possible answers below it."
_TAIL = (
    "Write one line for each question and nothing else: the number of the question, a colon, a "
    "space, and what stands before the colon of the answer, such as {example}"
)
_FIELDS = ("type", "instructions", "criteria")


_PANEL = "Questions"  # heading of a command's help


@dataclass(frozen=True)
class DecisionSettings:
    """How questions are asked; the annotation of a field says what it means.

    In the passes before the last the answers settle as those of a generation do: what the sampler
    accepts stays for the next pass, the rest is noise again, and the frame is pinned. Orders of
    the options are averaged in log space. A question with fewer options than another goes through
    all of its shifts as many whole times as it can.

    Raises:
        UsageError: a setting is out of range.
    """

    draws: Annotated[int, Setting("Number of canvases of noise to average over.", panel=_PANEL)] = 1
    steps: Annotated[
        int, Setting("Number of passes, over which the answers settle together.", panel=_PANEL)
    ] = 1
    separate: Annotated[
        bool,
        Setting(
            "Canvas of its own for each question, so that no answer sees another's place.",
            panel=_PANEL,
        ),
    ] = False
    rotate: Annotated[
        bool, Setting("Average over all cyclic shifts of the order of the options.", panel=_PANEL)
    ] = False
    canvas_length: Annotated[
        int | None,
        Setting(
            "Tokens of every canvas; as few as the frame needs, a multiple of 16, if left out.",
            panel=_PANEL,
        ),
    ] = None

    def __post_init__(self) -> None:
        check_integer("draws", self.draws, 1)
        check_integer("steps", self.steps, 1)
        if self.canvas_length is not None:
            check_integer("canvas_length", self.canvas_length, 2)


@dataclass(frozen=True)
class Question:
    """One question with its options.

    Attributes:
        name: what the answer is called by.
        kind: "noul" (whether a statement holds), "choice" (one of some names) or "score" (one of
            some levels).
        text: what is asked.
        options: names of the options, in the order given: true and false of a noul, the names of a
            choice, and the numbers from 0 on of a score, the lowest level first.
        meanings: what each option stands for; None where the name says it.
        legend: the levels of a score as they were given, by their number; empty otherwise.
    """

    name: str
    kind: str
    text: str
    options: tuple[str, ...]
    meanings: tuple[str | None, ...]
    legend: Mapping[str, Any]

    @property
    def title(self) -> str:
        """How an error calls the question."""
        return f"question '{self.name}'"

    def shifted(self, shift: int) -> list[int]:
        """The order in which the options are listed after a cyclic shift."""
        count = len(self.options)
        return [(place + shift) % count for place in range(count)]

    def index_of(self, answer: Any) -> int:
        """The number of the option that an answer means: true or false, the name of a choice, or
        the number of a level.

        Raises:
            UsageError: the answer is no option.
        """
        name = answer
        if self.kind == "noul" and isinstance(answer, bool):
            name = "true" if answer else "false"
        elif self.kind == "score" and isinstance(answer, int) and not isinstance(answer, bool):
            name = str(answer)
        if name not in self.options:
            raise UsageError(
                f"{self.title}: the answer {answer!r:.60} is none of its options; give "
                f"{_answers[self.kind]}."
            )
        return self.options.index(name)


_answers = {
    "noul": "true or false",
    "choice": "the name of one of its criteria",
    "score": "the number of a level, from 0",
}

Questions: TypeAlias = "Mapping[str, Mapping[str, Any] | Question]"


class _Object(dict[str, Any]):
    """An object of JSON that knows which of its keys stood there twice."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs)
        self.repeated = [key for key, count in counts.items() if count > 1]


class NotJsonError(UsageError):
    """A text is no JSON at all."""


def parse_json(text: str, what: str) -> Any:
    """JSON in which a key that stands twice is remembered, for `read_questions` to refuse.

    Raises:
        NotJsonError: the text is no JSON; the message calls it `what`.
        UsageError: the JSON is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_Object)
    except RecursionError:
        raise UsageError(f"{what} is nested more than {DEPTH} levels deep; flatten it.") from None
    except ValueError as error:
        place = ""
        if isinstance(error, json.JSONDecodeError):
            place = f": line {error.lineno}, column {error.colno}: {error.msg}"
        raise NotJsonError(f"{what} is not JSON{place}.") from None


def read_questions(given: Any) -> list[Question]:
    """The questions of an object of questions by name, each checked.

    Raises:
        UsageError: there is no question, or one is malformed; the message names it.
    """
    if not isinstance(given, Mapping) or not given:
        raise UsageError(
            'no question: give an object of them by name, such as {"spam": {"type": "noul", '
            '"instructions": "The message is spam."}}.'
        )
    for name in getattr(given, "repeated", ()):
        raise UsageError(f"question '{name}' is asked twice; give each a name of its own.")
    return [
        question if isinstance(question, Question) else _read(str(name), question)
        for name, question in given.items()
    ]


def state_text(state: Any) -> str:
    """A state as the model reads it: a text as it is, other JSON on one line, its keys in the order
    given, so that a state that grows at its end begins as it did before.

    Raises:
        PromptError: the state is empty.
        UsageError: the state is nested too deeply, or is no JSON.
    """
    text = state if isinstance(state, str) else _json_text(state, "the state")
    if state is None or state == {} or state == [] or not text.strip():
        raise PromptError("the state is empty; say what the questions are about.")
    return text


def listing(questions: Sequence[Question], labels: Sequence[Sequence[str]], shift: int = 0) -> str:
    """The questions with their options, as they stand behind the state. `labels` are those of each
    question's options, by their place in its order; `shift` lists the options from a later one on,
    the first ones at the end."""
    parts = [_HEAD]
    for number, (question, own) in enumerate(zip(questions, labels, strict=True), 1):
        lines = [f"{number}. {question.text}"]
        order = question.shifted(shift)
        for label, option in zip(own_labels(question, own, shift), order, strict=True):
            meaning, name = question.meanings[option], question.options[option]
            said = [name] if question.kind == "choice" else []
            said += [] if meaning is None else [meaning]
            lines.append(f"{label}: {': '.join(said) or name}")
        parts.append("\n".join(lines))
    parts.append(_TAIL.format(example=f"1: {labels[0][0]}"))
    return "\n\n".join(parts)


def own_labels(question: Question, labels: Sequence[str], shift: int) -> list[str]:
    """The labels in the order of the listing. The labels of a choice mean nothing and belong to the
    places of the list; the labels of a noul and of a score belong to the options."""
    if question.kind == "choice":
        return list(labels)
    return [labels[option] for option in question.shifted(shift)]


def _read(name: str, given: Any) -> Question:
    title = f"question '{name}'"
    if not name.strip():
        raise UsageError("a question has no name; give it one to find its answer by.")
    if not isinstance(given, Mapping):
        raise UsageError(f"{title} must be an object with a type, not {given!r:.60}.")
    kind, criteria = given.get("type"), given.get("criteria")
    if kind not in KINDS:
        raise UsageError(f"{title}: type {kind!r:.40} is unknown; known are {', '.join(KINDS)}.")
    for field in given:
        if field not in _FIELDS:
            raise UsageError(f"{title}: '{field}' is unknown; known are {', '.join(_FIELDS)}.")
    instructions = given.get("instructions")
    text = name if instructions is None else _said(instructions, title).strip() or name
    if kind == "noul":
        return _noul(name, title, text, criteria)
    if kind == "choice":
        return _choice(name, title, text, criteria)
    return _score(name, title, text, criteria)


def _noul(name: str, title: str, text: str, criteria: Any) -> Question:
    criteria = {} if criteria is None else criteria
    if not isinstance(criteria, Mapping) or not set(criteria) <= {"true", "false"}:
        raise UsageError(f"{title}: the criteria of a noul are an object of 'true' and 'false'.")
    meanings = [_meaning(criteria.get(side), title) for side in ("true", "false")]
    if meanings[0] is not None and meanings[0] == meanings[1]:
        raise UsageError(f"{title}: true and false are described alike; tell them apart.")
    return Question(name, "noul", text, ("true", "false"), tuple(meanings), {})


def _choice(name: str, title: str, text: str, criteria: Any) -> Question:
    if not isinstance(criteria, Mapping):
        raise UsageError(
            f"{title}: the criteria of a choice are an object of names and descriptions or null."
        )
    options = [str(option).strip() for option in criteria]
    _check_options(title, [*options, *map(str, getattr(criteria, "repeated", ()))])
    meanings = tuple(_meaning(each, title) for each in criteria.values())
    return Question(name, "choice", text, tuple(map(str, criteria)), meanings, {})


def _score(name: str, title: str, text: str, criteria: Any) -> Question:
    if not isinstance(criteria, Sequence) or isinstance(criteria, str):
        raise UsageError(f"{title}: the criteria of a score are a list of levels, lowest first.")
    levels = [_said(level, title).strip() for level in criteria]
    _check_options(title, levels)
    numbers = tuple(map(str, range(len(levels))))
    legend = dict(zip(numbers, criteria, strict=True))
    return Question(name, "score", text, numbers, tuple(levels), legend)


def _check_options(title: str, options: Sequence[str]) -> None:
    if not LEAST <= len(options) <= MOST:
        what = "1 option" if len(options) == 1 else f"{len(options)} options"
        raise UsageError(f"{title} has {what}; give {LEAST} to {MOST}.")
    seen: set[str] = set()
    for option in options:
        if not option:
            raise UsageError(f"{title}: an option has no name; give it one.")
        if option in seen:
            raise UsageError(f"{title} has two options alike, {option!r:.60}; tell them apart.")
        seen.add(option)


def _meaning(given: Any, title: str) -> str | None:
    said = None if given is None else _said(given, title).strip()
    return said or None


def _said(given: Any, title: str) -> str:
    """A text as it is, other JSON on one line."""
    return given if isinstance(given, str) else _json_text(given, title)


def _json_text(value: Any, what: str) -> str:
    waiting = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, (Mapping, list, tuple)):
            if depth > DEPTH:
                raise UsageError(f"{what} is nested more than {DEPTH} levels deep; flatten it.")
            inner = item.values() if isinstance(item, Mapping) else item
            waiting += [(each, depth + 1) for each in inner]
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what} is not JSON: {error}.") from None

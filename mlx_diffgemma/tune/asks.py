"""What is asked while rules are compared, and how it is known whether an answer holds."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from mlx_diffgemma.editing.files import read_text
from mlx_diffgemma.editing.validated import validator
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.reading import shown

CHECKS = ("regex", "json-schema", "command")
_COMMAND_SECONDS = 60


@dataclass(frozen=True)
class Ask:
    """A prompt, as text or as messages, and the only right answer where there is one."""

    prompt: str | list[dict[str, Any]]
    answer: str | None = None


Holds = Callable[[str], bool]
"""Whether an answer is a good one."""


def read_asks(path: Path) -> list[Ask]:
    """The prompts of JSON lines: `{"prompt": ...}` or `{"messages": [...]}`, with an `answer` (or a
    `completion`, as in data to train on) where it is known. Messages may end with the answer.

    Raises:
        FileError: the file cannot be read.
        UsageError: a line is no such object, or only some lines have an answer.
    """
    asks = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            asks.append(_ask(line, f"{path}, line {number}"))
    if not asks:
        raise UsageError(f"{path} has no prompts; give one JSON object a line.")
    known = sum(ask.answer is not None for ask in asks)
    if 0 < known < len(asks):
        raise UsageError(
            f"{path}: {known} of {len(asks)} lines have an answer; give one to all or to none."
        )
    return asks


def _ask(line: str, where: str) -> Ask:
    try:
        found = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise UsageError(f"{where} is not JSON.") from None
    if not isinstance(found, dict):
        raise UsageError(f"{where} is {shown(found)}; write an object with a prompt.")
    answer = found.get("answer", found.get("completion"))
    messages = found.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
        if messages[-1].get("role") == "assistant":
            answer = messages[-1].get("content") if answer is None else answer
            messages = messages[:-1]
        prompt: Any = messages
    else:
        prompt = found.get("prompt")
    if not prompt or not isinstance(prompt, (str, list)):
        raise UsageError(f'{where} has no prompt; write {{"prompt": "..."}}.')
    if answer is not None and not isinstance(answer, str):
        raise UsageError(f"{where} has an answer that is no text; write it as one.")
    return Ask(prompt, answer)


def check_of(given: str) -> Holds:
    """The check that `KIND:VALUE` names: `regex:PATTERN` (the whole answer matches),
    `json-schema:FILE` (it is JSON that the schema allows) or `command:LINE` (a shell command that
    reads the answer from stdin exits with 0).

    Raises:
        FileError: the file with the schema cannot be read.
        UsageError: the kind is unknown, or its value is no pattern or schema.
    """
    kind, _, value = given.partition(":")
    if kind not in CHECKS or not value:
        raise UsageError(
            f"--check {shown(given)} is none; write {', '.join(f'{k}:...' for k in CHECKS)}."
        )
    if kind == "regex":
        try:
            pattern = re.compile(value, re.DOTALL)
        except re.error as error:
            raise UsageError(f"--check: the pattern {shown(value)} is wrong: {error}.") from None
        return lambda text: pattern.fullmatch(text.strip()) is not None
    if kind == "json-schema":
        return _schema_check(Path(value))
    return lambda text: _succeeds(value, text)


def _schema_check(path: Path) -> Holds:
    try:
        schema = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError):
        raise UsageError(f"--check: {path} is not JSON; give a JSON schema.") from None
    if not isinstance(schema, (dict, bool)):
        raise UsageError(f"--check: {path} holds {shown(schema)}, which is no JSON schema.")
    try:
        fault = validator(schema)
        fault(None)  # what the schema refers to is looked for
    except UsageError as error:
        raise UsageError(f"--check: {path}: {error}") from None

    def holds(text: str) -> bool:
        try:
            return not fault(json.loads(text))
        except (json.JSONDecodeError, RecursionError):
            return False

    return holds


def _succeeds(command: str, text: str) -> bool:
    try:
        done = subprocess.run(
            command,
            shell=True,
            input=text.encode("utf-8", "surrogatepass"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_COMMAND_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


@dataclass(frozen=True)
class Judge:
    """How answers are marked, from 0 to 1.

    Attributes:
        name: the way of marking, which is "check", "exact" or "agreement".
        seeds: how often the reference answers each prompt, each time from another seed.
        check: what an answer must pass; None where an answer must be a given text, or agree with
            the answers of the reference.
    """

    name: str
    seeds: int
    check: Holds | None = None

    @classmethod
    def of(cls, asks: Sequence[Ask], check: Holds | None, seeds: int) -> Judge:
        """Marking by the check where one is given, by the exact answers where they are known, and
        else by agreement with the reference's answers from `seeds` seeds.

        Raises:
            UsageError: agreement would be marked, for which `seeds` must be 2 at least.
        """
        if check is not None:
            return cls("check", 1, check)
        if all(ask.answer is not None for ask in asks):
            return cls("exact", 1)
        if seeds < 2:
            raise UsageError(f"--seeds must be at least 2 to compare answers, not {seeds}.")
        return cls("agreement", seeds)

    @property
    def candidate_seed(self) -> int:
        """The seed of a candidate's answers. It is the reference's own, so that answers from the
        same noise are compared; where agreement counts, which must not come from the same noise, it
        is a seed that no answer of the reference has.
        """
        return self.seeds if self.name == "agreement" else 0

    def marks(self, ask: Ask, text: str, reference: Sequence[str]) -> float:
        """The mark, from 0 to 1, of a candidate's answer, given the answers of the reference."""
        if self.check is not None:
            return float(self.check(text))
        if self.name == "exact":
            return float(text.strip() == (ask.answer or "").strip())
        return float(np.mean([agreement(text, other) for other in reference]))

    def own_marks(self, ask: Ask, reference: Sequence[str]) -> float:
        """The mark, from 0 to 1, of the reference itself; where agreement counts, the mean
        agreement of its answers with each other."""
        if self.name != "agreement":
            return self.marks(ask, reference[0], reference)
        return float(np.mean([agreement(*pair) for pair in combinations(reference, 2)]))


def agreement(one: str, other: str) -> float:
    """The share of two texts that is the same words in the same order, by difflib's ratio. It is 1
    only for equal texts."""
    if one == other:
        return 1.0
    a, b = one.split(), other.split()
    return min(SequenceMatcher(None, a, b, autojunk=False).ratio(), 1 - 1e-6)

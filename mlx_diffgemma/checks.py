"""Checks of settings, for the frozen dataclasses that hold them: each failure is one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.reading import shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")


LARGEST = (1 << 63) - 1
"""The largest integer of a setting: arrays and files count in 64 bits."""


def numbers_in(option: str, text: str) -> tuple[float, ...]:
    """The numbers above 0 in a text, between commas, colons or spaces.

    Raises:
        UsageError: it is no list of such numbers; `option` names it.
    """
    try:
        numbers = tuple(float(part) for part in re.split(r"[\s,:]+", text.strip(" \t\n,:")))
    except (TypeError, ValueError, AttributeError):
        numbers = ()
    if not numbers or not all(0 < number < inf for number in numbers):
        raise UsageError(f"{option} {shown(text)} must be numbers above 0, such as 2,1.")
    return numbers


def check_integer(name: str, value: Any, least: int, most: int = LARGEST) -> None:
    """Raise UsageError unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} must be an integer of at least {least}, not {shown(value)}.")
    if value > most:
        raise UsageError(f"{name} must be an integer of at most {most}, not {shown(value)}.")


def check_flag(name: str, value: Any) -> None:
    """Raise UsageError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be true or false, not {shown(value)}.")


def check_text(name: str, value: Any) -> None:
    """Raise UsageError unless `value` is a text that can be encoded."""
    if not isinstance(value, str):
        raise UsageError(f"{name} must be a text, not {shown(value)}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{name} is not valid Unicode at character {error.start + 1}; give text in UTF-8."
        ) from None


def check_texts(name: str, value: Any) -> None:
    """Raise UsageError unless `value` is a list of texts; a single text is not taken for one."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise UsageError(f"{name} must be a list of texts, not {shown(value)}.")
    for place, each in enumerate(value):
        check_text(f"{name}: number {place + 1}", each)


def check_sequence(name: str, value: Any) -> None:
    """Raise UsageError unless `value` is a list; a text is not taken for one."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise UsageError(f"{name} must be a list, not {shown(value)}.")


def check_lengths(name: str, value: Any) -> None:
    """Raise UsageError unless `value` is a list of integers of at least 1."""
    check_sequence(name, value)
    for each in value:
        check_integer(f"one of {name}", each, 1)


def check_callable(name: str, value: Any) -> None:
    """Raise UsageError unless `value` is None or can be called."""
    if value is not None and not callable(value):
        raise UsageError(f"{name} must be a function, not {shown(value)}.")


def check_number(name: str, value: Any, bound: float, *, inclusive: bool = False) -> None:
    """Raise UsageError unless `value` is a finite number above `bound`, or equal if `inclusive`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # An integer beyond the largest float is as good as infinite.
    finite = number and -sys.float_info.max <= value <= sys.float_info.max
    if not finite or not (value >= bound if inclusive else value > bound):
        sign = "at least" if inclusive else "above"
        raise UsageError(f"{name} must be a number {sign} {bound:g}, not {shown(value)}.")


def check_share(name: str, value: Any, *, below: bool = False) -> None:
    """Raise UsageError unless `value` is between 0 and 1, 1 left out if `below`."""
    check_number(name, value, 0.0, inclusive=True)
    if value > 1 or (below and value == 1):
        raise UsageError(f"{name} must be {'below' if below else 'at most'} 1, not {shown(value)}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise UsageError unless `value` is one of the choices."""
    if value not in choices:
        raise UsageError(f"{name} {shown(value)} is unknown; known are {', '.join(choices)}.")


def overridden(settings: Settings, given: Mapping[str, Any]) -> Settings:
    """A copy of a dataclass with the fields that are given, and not None, replaced.

    Raises:
        UsageError: a field is unknown, or the dataclass refuses a value.
    """
    known = {field.name for field in fields(settings)}
    for name in given:
        if name not in known:
            raise UsageError(f"unknown setting '{name}'; known are {', '.join(sorted(known))}.")
    changes = {name: value for name, value in given.items() if value is not None}
    return replace(settings, **changes)

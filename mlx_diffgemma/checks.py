"""Checks of settings, for the frozen dataclasses that hold them: each failure is one line."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from mlx_diffgemma.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise UsageError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} must be an integer of at least {least}, not {value!r}.")


def check_number(name: str, value: Any, bound: float, *, inclusive: bool = False) -> None:
    """Raise UsageError unless `value` is a finite number above `bound`, or equal if `inclusive`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # An integer beyond the largest float is as good as infinite.
    finite = number and -sys.float_info.max <= value <= sys.float_info.max
    if not finite or not (value >= bound if inclusive else value > bound):
        sign = "at least" if inclusive else "above"
        raise UsageError(f"{name} must be a number {sign} {bound:g}, not {value!r}.")


def check_share(name: str, value: Any, *, below: bool = False) -> None:
    """Raise UsageError unless `value` is between 0 and 1, 1 left out if `below`."""
    check_number(name, value, 0.0, inclusive=True)
    if value > 1 or (below and value == 1):
        raise UsageError(f"{name} must be {'below' if below else 'at most'} 1, not {value!r}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise UsageError unless `value` is one of the choices."""
    if value not in choices:
        raise UsageError(f"{name} '{value}' is unknown; known are {', '.join(choices)}.")


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

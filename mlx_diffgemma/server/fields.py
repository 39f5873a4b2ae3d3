"""The fields of a request, read one by one: an error about a field names its path."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mlx_diffgemma.reading import kind_of, shown
from mlx_diffgemma.server.refusals import RefusedError

IGNORED_HEADER = "x-ignored-fields"
"""A header of answers that names the fields of the request that had no effect."""

_PLAIN = re.compile(r"[\w.\-$]{1,40}", re.ASCII)
_MOST_NAMED = 16


class Fields:
    """A JSON object of a request. A field that is null counts as left out.

    Args:
        data: the object as it was parsed.
        path: path of the object within the request, "" for the request itself.
        ignored: list that takes in the paths of ignored fields; None makes a new one.

    Attributes:
        ignored: paths of fields that have no effect, of this object and of those within it.

    Raises:
        RefusedError: `data` is no object, or, from every reading method, a field is not of the
            type that the method reads (400).
    """

    def __init__(self, data: Any, path: str = "", ignored: list[str] | None = None) -> None:
        if not isinstance(data, Mapping):
            raise RefusedError(400, f"{path} must be an object, not {kind_of(data)}.", path)
        self.data, self.path = data, path
        self.ignored: list[str] = [] if ignored is None else ignored
        self._read: set[str] = set()

    def name(self, key: str) -> str:
        """The full path of a field."""
        return f"{self.path}.{key}" if self.path else key

    def refused(self, key: str, why: str) -> RefusedError:
        """The error for a field; its message is the field's path and `why`."""
        return RefusedError(400, f"{self.name(key)} {why}", self.name(key))

    def get(self, key: str, required: bool = False) -> Any:
        """A value of any type; None where it is left out.

        Raises:
            RefusedError: it is required, and left out.
        """
        self._read.add(key)
        value = self.data.get(key)
        if value is None and required:
            raise self.refused(key, "is missing.")
        return value

    def text(self, key: str, *, required: bool = False) -> str | None:
        """The text in a field; None where it is left out."""
        return self._of(key, required, "a text", lambda value: isinstance(value, str))

    def flag(self, key: str, default: bool = False) -> bool:
        """The boolean in a field; `default` where it is left out."""
        value = self._of(key, False, "true or false", lambda value: isinstance(value, bool))
        return default if value is None else bool(value)

    def integer(self, key: str, least: int, *, required: bool = False) -> int | None:
        """The integer in a field, of at least `least`; a float that is whole counts as one."""

        def fits(value: Any) -> bool:
            return _is_number(value) and value == int(value) and least <= value < 1 << 63

        value = self._of(key, required, f"an integer of at least {least}", fits)
        return None if value is None else int(value)

    def number(self, key: str, least: float) -> float | None:
        """The number in a field, of at least `least`; None where it is left out."""
        return self._of(
            key, False, f"a number of at least {least:g}", lambda v: _is_number(v) and v >= least
        )

    def choice(self, key: str, choices: Iterable[str], *, required: bool = False) -> str | None:
        """The text in a field, which must be one of `choices`; None where it is left out."""
        known = tuple(choices)
        listed = f"one of {', '.join(known)}"
        return self._of(key, required, listed, lambda v: isinstance(v, str) and v in known)

    def mapping(self, key: str, *, required: bool = False) -> dict[str, Any] | None:
        """The object in a field as it was parsed; None where it is left out."""
        return self._of(key, required, "an object", lambda value: isinstance(value, dict))

    def within(self, key: str, *, required: bool = False) -> Fields | None:
        """The object in a field, as `Fields` of its own; None where it is left out."""
        value = self.mapping(key, required=required)
        return None if value is None else Fields(value, self.name(key), self.ignored)

    def texts(self, key: str) -> tuple[str, ...]:
        """The texts in a field that holds a list of texts or a single one."""

        def fits(value: Any) -> bool:
            return isinstance(value, str) or (
                isinstance(value, list) and all(isinstance(each, str) for each in value)
            )

        value = self._of(key, False, "a list of texts", fits)
        return (value,) if isinstance(value, str) else tuple(value or ())

    def objects(self, key: str, *, required: bool = False) -> list[Fields]:
        """The objects in a field that holds a list, each as `Fields` of its own."""
        value = self._of(key, required, "a list", lambda value: isinstance(value, list))
        return [
            Fields(each, f"{self.name(key)}.{place}", self.ignored)
            for place, each in enumerate(value or ())
        ]

    def settle(self, refused: Mapping[str, str], harmless: Iterable[str] = ()) -> None:
        """Refuse what is known and cannot be honoured, and note what else was given but not read.

        Args:
            refused: by the names of fields, what is said of one that is neither null, false nor
                empty.
            harmless: fields that need not be noted.

        Raises:
            RefusedError: one of `refused` is given.
        """
        quiet = self._read.union(harmless)
        for key, value in self.data.items():
            if key in refused and key not in self._read and value not in (None, False, "", [], {}):
                raise self.refused(key, refused[key])
            if key not in quiet and key not in refused and value is not None:
                self.ignored.append(self.name(key))

    def headers(self) -> dict[str, str]:
        """A header that names what is ignored, if anything is."""
        names = [name for name in self.ignored if _PLAIN.fullmatch(name)][:_MOST_NAMED]
        return {IGNORED_HEADER: ", ".join(names)} if names else {}

    def _of(self, key: str, required: bool, what: str, fits: Callable[[Any], bool]) -> Any:
        value = self.get(key, required)
        if value is not None and not fits(value):
            raise self.refused(key, f"must be {what}, not {shown(value)}.")
        return value


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return is_integer(value)


def is_integer(value: Any) -> bool:
    """Whether a value of JSON is a whole number, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)

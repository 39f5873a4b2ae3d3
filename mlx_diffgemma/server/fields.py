"""The fields of a request, read one by one: what is wrong with one is said with its path."""

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
        data: the object.
        path: what it is called, "" for the request itself.

    Attributes:
        ignored: paths of fields that have no effect, of this object and of those within it.
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
        """The error for a field: its path, and what is wrong with it."""
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
        """A text."""
        return self._of(key, required, "a text", lambda value: isinstance(value, str))

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self._of(key, False, "true or false", lambda value: isinstance(value, bool))
        return default if value is None else bool(value)

    def integer(self, key: str, least: int, *, required: bool = False) -> int | None:
        """An integer from `least` on; a float that is whole is one."""

        def fits(value: Any) -> bool:
            return _is_number(value) and value == int(value) and least <= value < 1 << 63

        value = self._of(key, required, f"an integer of at least {least}", fits)
        return None if value is None else int(value)

    def number(self, key: str, least: float) -> float | None:
        """A number from `least` on."""
        return self._of(
            key, False, f"a number of at least {least:g}", lambda v: _is_number(v) and v >= least
        )

    def choice(self, key: str, choices: Iterable[str], *, required: bool = False) -> str | None:
        """One of some texts."""
        known = tuple(choices)
        listed = f"one of {', '.join(known)}"
        return self._of(key, required, listed, lambda v: isinstance(v, str) and v in known)

    def mapping(self, key: str, *, required: bool = False) -> dict[str, Any] | None:
        """An object, as it is."""
        return self._of(key, required, "an object", lambda value: isinstance(value, dict))

    def within(self, key: str, *, required: bool = False) -> Fields | None:
        """An object whose fields are read in turn."""
        value = self.mapping(key, required=required)
        return None if value is None else Fields(value, self.name(key), self.ignored)

    def texts(self, key: str) -> tuple[str, ...]:
        """Texts in a list, or one alone."""

        def fits(value: Any) -> bool:
            return isinstance(value, str) or (
                isinstance(value, list) and all(isinstance(each, str) for each in value)
            )

        value = self._of(key, False, "a list of texts", fits)
        return (value,) if isinstance(value, str) else tuple(value or ())

    def objects(self, key: str, *, required: bool = False) -> list[Fields]:
        """Objects in a list, whose fields are read in turn."""
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
    return isinstance(value, int) and not isinstance(value, bool)

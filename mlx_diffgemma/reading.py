"""Files of a checkpoint, read so that whatever is wrong with one is a line that names file and key.

Nothing that stands in a file is used before its type is known: a file is read as a JSON object, and
a `Section` hands out its values by key, each of the type and size that is asked for.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_diffgemma.errors import CheckpointError, ConfigError

AGAIN = "fetch the file again"
LARGEST_SIZE = 1 << 24  # of one axis of a tensor
LARGEST_LENGTH = (1 << 31) - 1  # of positions, which are counted in 32 bits
_LARGEST_NUMBER = 1e30  # well inside float32, in which the model computes
_DEEPEST = 64  # objects and lists inside one another
_SHOWN = 60  # characters of a value in a message

_COPY = "copy config.json from the original checkpoint"
_REQUIRED = object()


def read_text(path: Path, *, mend: str = AGAIN) -> str:
    """A text file in UTF-8.

    Raises:
        CheckpointError: the file is missing, is a folder, cannot be read, or is not text; `mend`
            says what to do about damage.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is damaged (it is not UTF-8 text); {mend}.") from None
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; name the folder of a whole checkpoint."
        ) from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder, where a file is needed; {mend}.") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise CheckpointError(
            f"{path} cannot be read ({os_reason(error)}); check the path and who may read it."
        ) from None


def os_reason(error: Exception) -> str:
    """What an error of the file system says, in one line."""
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "its symbolic links lead round in a circle"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(reason).split())


def is_there(path: Path) -> bool:
    """Whether there is anything at `path`: a file that cannot be read, a folder or a link that
    leads nowhere is there, and reading it says what is wrong."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return True


def read_json(path: Path, *, mend: str = AGAIN) -> Any:
    """The content of a JSON file, of any type.

    Raises:
        CheckpointError: as for `read_text`, or the file is no JSON.
    """
    return _parsed(read_text(path, mend=mend), path, mend)


def _parsed(text: str, where: Path, mend: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        why = "it is nested too deep"
    except ValueError as error:
        why = str(error)
    raise CheckpointError(f"{where} is damaged ({why}); {mend}.") from None


def read_object(path: Path, *, mend: str = AGAIN) -> dict[str, Any]:
    """The content of a JSON file that holds an object.

    Raises:
        CheckpointError: as for `read_json`, or the file holds something else, or is nested deeper
            than any file of a checkpoint.
    """
    return parse_object(read_text(path, mend=mend), path, mend=mend)


def parse_object(text: str, where: Path, *, mend: str = AGAIN) -> dict[str, Any]:
    """A JSON object from a text that stands in the file `where`.

    Raises:
        CheckpointError: the text is no JSON, no object, or nested deeper than any file of a
            checkpoint.
    """
    content = _parsed(text, where, mend)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{where} is damaged (it holds {kind_of(content)}, not an object); {mend}."
        )
    if _is_deeper(content, _DEEPEST):
        raise CheckpointError(f"{where} is damaged (it is nested too deep); {mend}.")
    return content


def _is_deeper(content: Any, most: int) -> bool:
    level = [content]
    for _ in range(most):
        inside: list[Any] = []
        for each in level:
            inside += each.values() if isinstance(each, dict) else each
        level = [each for each in inside if isinstance(each, (dict, list))]
        if not level:
            return False
    return True


def kind_of(value: Any) -> str:
    """The type of a JSON value in words, with its article."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, (list, tuple)):
        return "a list"
    names = {bool: "a boolean", str: "a text", type(None): "null"}
    return names.get(type(value), "a number")


def shown(value: Any) -> str:
    """A value for a message, cut where it is long; objects and lists are only named."""
    if isinstance(value, (Mapping, list, tuple)) and len(value) > 8:
        return f"{kind_of(value)} of {len(value)}"
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested deep, or an integer of thousands of digits
        return kind_of(value)
    if not text.isprintable():
        text = ascii(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class Section:
    """One JSON object of a file, read key by key. Where a value is missing or not as asked for, the
    methods raise a ConfigError that names the key's full path.

    Args:
        data: the object.
        path: where the object stands in the file.
        file: what errors call the file.
        mend: what the error advises where a key is missing.
    """

    def __init__(
        self, data: Any, path: str = "", file: str = "config.json", mend: str = _COPY
    ) -> None:
        if not isinstance(data, Mapping):
            where = f"'{path}'" if path else "the top level"
            raise ConfigError(f"{file}: {where} must be an object, not {kind_of(data)}.")
        self.data, self.path, self.file, self.mend = data, path, file, mend

    def name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def fail(self, key: str, why: str) -> ConfigError:
        return ConfigError(f"{self.file}: '{self.name(key)}' {why}.")

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of a key, of any type; null counts as missing."""
        value = self.data.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self.fail(key, f"is missing; {self.mend}")
            return default
        return value

    def has(self, key: str) -> bool:
        return self.data.get(key) is not None

    def size(self, key: str, default: Any = _REQUIRED, *, most: int = LARGEST_SIZE) -> int:
        """The positive integer of a key, at most `most`."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(key, f"must be a positive integer, not {shown(value)}")
        if value > most:
            raise self.fail(key, f"must be at most {most}, not {shown(value)}")
        return value

    def number(
        self,
        key: str,
        default: Any = _REQUIRED,
        *,
        above: float = 0.0,
        most: float = _LARGEST_NUMBER,
    ) -> float:
        """The number of a key, above `above` and at most `most`."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > above:
            raise self.fail(key, f"must be a number above {above:g}, not {shown(value)}")
        if not value <= most:
            raise self.fail(key, f"must be at most {most:g}, not {shown(value)}")
        return float(value)

    def count(self, key: str) -> int:
        """The integer of a key, at least 0 and below 2^63."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
            raise self.fail(key, f"must be an integer of at least 0, not {shown(value)}")
        return value

    def text(self, key: str) -> str:
        """The text of a key."""
        value = self.get(key)
        if not isinstance(value, str):
            raise self.fail(key, f"must be a text, not {shown(value)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """The boolean of a key."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, not {shown(value)}")
        return value

    def section(self, key: str, default: Any = _REQUIRED) -> Section:
        """The JSON object of a key, as a section."""
        return Section(self.get(key, default), self.name(key), self.file, self.mend)

    def ids(self, key: str, vocab_size: int | None = None) -> tuple[int, ...]:
        """The token ids of a key, one or a list; below `vocab_size`, where that is given."""
        value = self.get(key, [])
        ids = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.fail(key, f"must be a token id or a list of them, not {shown(value)}")
        for token in ids:
            if vocab_size is not None and token >= vocab_size:
                raise self.fail(key, f"is {shown(token)}, and ids go from 0 to {vocab_size - 1}")
        return tuple(ids)

    def token(self, key: str, vocab_size: int) -> int | None:
        """The token id of a key, below `vocab_size`, or None where the key is missing."""
        if isinstance(self.data.get(key), (list, tuple)):
            raise self.fail(key, f"must be one token id, not {shown(self.data[key])}")
        return next(iter(self.ids(key, vocab_size)), None)

"""Notes on the fields of settings dataclasses, written once and read by every command line."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Setting:
    """The annotation of a field that users may set: `name: Annotated[int, Setting("...")] = 1`.

    Attributes:
        help: one sentence that begins with a noun.
        flags: names of the option; an empty tuple stands for the field's own name with dashes.
        panel: heading in a command's `--help`.
        default: what `--help` shows as the default where the field's own default says nothing.
    """

    help: str
    flags: tuple[str, ...] = ()
    panel: str | None = None
    default: str | None = None


def settings_of(cls: type[DataclassInstance]) -> dict[str, tuple[Any, Setting]]:
    """The fields of a dataclass that carry a `Setting`: name to (type, setting), in order."""
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for field in fields(cls):
        kind, *notes = get_args(hints[field.name]) or (hints[field.name],)
        for note in notes:
            if isinstance(note, Setting):
                found[field.name] = (kind, note)
    return found

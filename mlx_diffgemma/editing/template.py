"""Templates with named slots: `Dear {name}, your order {id:digits} is {state:late|on time}.`"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlx_diffgemma.errors import UsageError

KINDS = ("line", "text", "word", "digits")
_NAME = re.compile(r"[^\W\d][\w-]*")


@dataclass(frozen=True)
class Slot:
    """A named place in a template.

    Attributes:
        kind: one of `KINDS`, "choices" or "regex".
        choices: for "choices".
        pattern: for "regex", in Rust's syntax.
    """

    name: str
    kind: str = "line"
    choices: tuple[str, ...] = ()
    pattern: str = ""


def parse_template(template: str) -> tuple[list[str], list[Slot]]:
    """The text around the slots, one piece more than there are slots, and the slots.

    A slot is `{name}`, `{name:kind}`, `{name:one|other}` or `{name:/regex/}`; `{{` and `}}` stand
    for braces. A name that returns stands for the same text.

    Raises:
        UsageError: the template is malformed; the place is named.
    """
    literals, slots = [""], list[Slot]()
    place = 0
    while place < len(template):
        character = template[place]
        if template[place : place + 2] in ("{{", "}}"):
            literals[-1] += character
            place += 2
        elif character == "{":
            inner, end = _inner(template, place)
            slots.append(_slot(inner, template, place))
            literals.append("")
            place = end
        elif character == "}":
            raise UsageError(f"{_where(template, place)}: '}}' without '{{'; write '}}}}'.")
        else:
            literals[-1] += character
            place += 1
    if not slots:
        raise UsageError("the template has no slot; write one as {name}.")
    described: dict[str, Slot] = {}
    for index, slot in enumerate(slots):
        known = described.setdefault(slot.name, slot)
        if slot not in (known, Slot(slot.name)):
            raise UsageError(
                f"slot '{slot.name}' is described twice, and differently; name one otherwise."
            )
        slots[index] = known
    return literals, slots


def _inner(template: str, start: int) -> tuple[str, int]:
    """The text between the braces of a slot that begins at `start`, and the place behind it."""
    regex = re.compile(r"\{[^{}:/]*:/(.*?)/\}", re.DOTALL).match(template, start)
    if regex:
        return template[start + 1 : regex.end() - 1], regex.end()
    end = template.find("}", start)
    if end < 0:
        raise UsageError(f"{_where(template, start)}: '{{' without '}}'; write '{{{{'.")
    return template[start + 1 : end], end + 1


def _slot(inner: str, template: str, place: int) -> Slot:
    name, colon, kind = inner.partition(":")
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{_where(template, place)}: '{name}' is no name for a slot; begin it with a letter, "
            "or write '{{' for a brace."
        )
    if not colon:
        return Slot(name)
    if len(kind) > 2 and kind.startswith("/") and kind.endswith("/"):
        return Slot(name, "regex", pattern=kind[1:-1])
    if "|" in kind:
        choices = tuple(kind.split("|"))
        if not all(choices) or len(set(choices)) < len(choices):
            raise UsageError(f"{_where(template, place)}: choices must be different, none empty.")
        return Slot(name, "choices", choices=choices)
    if kind not in KINDS:
        raise UsageError(
            f"{_where(template, place)}: '{kind}' is unknown; known are {', '.join(KINDS)}, "
            "one|other and /regex/."
        )
    return Slot(name, kind)


def _where(template: str, place: int) -> str:
    line = template.count("\n", 0, place)
    column = place - (template.rfind("\n", 0, place) + 1)
    return f"template, line {line + 1}, column {column + 1}"

"""What a survey found, as a table in Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_diffgemma.survey.facts import without_names

_FORMAT = 1  # version of the JSON
_HEAD = ("part", "what", "result", "beside")


@dataclass(frozen=True)
class Row:
    """One thing that was found.

    Attributes:
        part: name of the part of the survey.
        what: what was checked or measured.
        result: what came out.
        beside: what the result is to be seen with: a bound, another result, a reason.
        ok: whether a check held; None where nothing was checked.
        values: the numbers behind it; times in seconds, sizes in bytes.
    """

    part: str
    what: str
    result: str
    beside: str = ""
    ok: bool | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


def failed(part: str, what: str, error: BaseException) -> Row:
    """The row of something that raised an error, whose names and paths are hidden."""
    return Row(part, what, "failed", error_text(error), ok=False)


def error_text(error: BaseException) -> str:
    """What an error says, on one line without names and paths."""
    return without_names(f"{type(error).__name__}: {error}".removesuffix(": "))[:300]


def as_markdown(rows: Sequence[Row]) -> str:
    """A table with a line for every row."""
    lines = [_line(_HEAD), _line(["---"] * len(_HEAD))]
    before = ""
    for row in rows:
        result = f"**{row.result}**" if row.ok is False else row.result
        lines.append(_line([row.part if row.part != before else "", row.what, result, row.beside]))
        before = row.part
    return "\n".join(lines)


def as_json(rows: Sequence[Row], *, complete: bool, seconds: float) -> str:
    """One JSON object on one line: `complete` says whether the survey came to its end, after
    `seconds`."""
    found = {
        "format": _FORMAT,
        "complete": complete,
        "seconds": seconds,
        "rows": [asdict(row) for row in rows],
    }
    return json.dumps(found)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """A text as a cell, in which nothing ends the cell and nothing is a tag."""
    text = " ".join(text.split())
    for mark in "\\|<":
        text = text.replace(mark, f"\\{mark}")
    return text

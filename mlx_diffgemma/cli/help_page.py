"""The page that `--help` prints: plain text, its options under the headings of their panels.

Typer draws such pages with rich, whose import takes as long as the rest of a page.
"""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperCommand

PLAIN: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"max_content_width": 100},
}
"""How every `typer.Typer` of this program is made."""

_ARGUMENTS, _OPTIONS = "Arguments", "Options"


class PlainCommand(TyperCommand):
    """A command whose help page is plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and options of the command."""
        write_options(self, ctx, formatter)


def write_options(command: Any, ctx: Any, formatter: Any) -> None:
    """Write the arguments of a command, then its options by their panels; those of no panel are the
    last."""
    panels: dict[str, list[tuple[str, str]]] = {_ARGUMENTS: []}
    plain: list[tuple[str, str]] = []
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is None:
            continue
        panel = getattr(parameter, "rich_help_panel", None)
        if parameter.param_type_name == "argument":
            rows = panels[_ARGUMENTS]
        else:
            rows = plain if panel is None else panels.setdefault(panel, [])
        rows.append(_tidied(*record))
    for heading, rows in [*panels.items(), (_OPTIONS, plain)]:
        write_section(formatter, heading, rows)


def write_section(formatter: Any, heading: str, rows: list[tuple[str, str]]) -> None:
    """Write rows of two columns under a heading, which is bold on a terminal."""
    if rows:
        with formatter.section(typer.style(heading, bold=True)):
            formatter.write_dl(rows)


def _tidied(names: str, says: str) -> tuple[str, str]:
    """A row as it reads best: an option that may be repeated takes one value at a time, and a
    default stands without parentheses."""
    return re.sub(r"<list\[(\w+)\]>", r"<\1>", names), re.sub(
        r"\[default: \((.*)\)\]$", r"[default: \1]", says, flags=re.DOTALL
    )

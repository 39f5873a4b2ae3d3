"""Sudoku grids of six by six cells, drawn as text with box lines."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

SIDE = 6
BOX_ROWS, BOX_COLUMNS = 2, 3

_TOP, _MIDDLE, _BOTTOM = ("┌", "┬", "┐"), ("├", "┼", "┤"), ("└", "┴", "┘")
_LINES = "dim"
_GAP = "   "
_GIVEN, _RIGHT, _WRONG = "bold", "green", "bold red"


def grids(text: str) -> list[list[str]]:
    """The rows of each grid in a prompt's or an answer's text; blank lines part grids."""
    blocks = text.strip("\n").split("\n\n")
    return [block.removeprefix("sudoku\n").split("\n") for block in blocks]


def is_grid(rows: Sequence[str]) -> bool:
    """Whether these are six rows of six."""
    return len(rows) == SIDE and all(len(row) == SIDE for row in rows)


def mistakes(answer: Sequence[str], solution: Sequence[str]) -> int:
    """How many cells of the answer differ from the solution."""
    return sum(
        a != b for rows in zip(answer, solution, strict=True) for a, b in zip(*rows, strict=True)
    )


def marked(answer: Sequence[str], givens: Sequence[str], solution: Sequence[str]) -> list[Text]:
    """The answer's rows: givens bold, what the model found green, its mistakes red."""
    rows = []
    for cells in zip(answer, givens, solution, strict=True):
        row = Text()
        for column, cell in enumerate(cells[0]):
            given, right = cells[1][column], cells[2][column]
            row.append(cell, _WRONG if cell != right else _GIVEN if given != "." else _RIGHT)
        rows.append(row)
    return rows


def solved(answer: Sequence[str], givens: Sequence[str], solution: Sequence[str]) -> Text:
    """An answer with its cells marked, as `marked` does it, in a frame."""
    return framed(marked(answer, givens, solution))


def framed(rows: Sequence[Text]) -> Text:
    """Rows with box lines around them. A row that is too long extends beyond the lines."""
    lines = [_rule(_TOP)]
    for number, row in enumerate(rows):
        if number and number % BOX_ROWS == 0:
            lines.append(_rule(_MIDDLE))
        lines.append(_row(row))
    lines.append(_rule(_BOTTOM))
    return Text("\n").join(lines)


def framed_text(text: Text) -> Text:
    """A text, which may still be forming, with a frame around every block of lines between blank
    ones; the frames stand next to each other."""
    blocks: list[list[Text]] = [[]]
    for line in text.split("\n", allow_blank=True):
        if line.plain:
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return beside([framed(block) for block in blocks if block])


def beside(frames: Sequence[Text]) -> Text:
    """Frames next to each other."""
    columns = [frame.split("\n") for frame in frames]
    widths = [max(line.cell_len for line in column) for column in columns]
    lines = []
    for number in range(max(map(len, columns), default=0)):
        line = Text()
        for column, width in zip(columns, widths, strict=True):
            cell = column[number] if number < len(column) else Text()
            gap = _GAP if line else ""
            line.append(gap).append_text(cell).append(" " * (width - cell.cell_len))
        lines.append(line)
    return Text("\n").join(lines)


def puzzle(rows: Sequence[str]) -> Text:
    """A puzzle in a frame, with dots for its blanks."""
    return framed([Text(row.replace(".", "·"), _GIVEN) for row in rows])


def _row(row: Text) -> Text:
    wall = Text("│", _LINES)
    line = Text()
    for start in range(0, SIDE, BOX_COLUMNS):
        cells = [row[column : column + 1] for column in range(start, start + BOX_COLUMNS)]
        line.append_text(wall).append(" ")
        for cell in cells:
            line.append_text(cell if cell.plain else Text(" ")).append(" ")
    return line.append_text(wall).append_text(row[SIDE:])


def _rule(corners: tuple[str, str, str]) -> Text:
    left, middle, right = corners
    dashes = "─" * (2 * BOX_COLUMNS + 1)
    return Text(left + middle.join([dashes] * (SIDE // BOX_COLUMNS)) + right, _LINES)

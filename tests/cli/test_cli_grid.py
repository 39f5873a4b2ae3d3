"""Sudoku grids as text."""

from __future__ import annotations

from rich.text import Text

from mlx_diffgemma.cli import grid

SOLUTION = ["123456", "456123", "234561", "561234", "345612", "612345"]
PUZZLE = ["1.3.5.", "456123", "234561", "561234", "345612", "612345"]


def test_a_grid_has_box_lines():
    assert grid.puzzle(PUZZLE).plain.splitlines() == [
        "┌───────┬───────┐",
        "│ 1 · 3 │ · 5 · │",
        "│ 4 5 6 │ 1 2 3 │",
        "├───────┼───────┤",
        "│ 2 3 4 │ 5 6 1 │",
        "│ 5 6 1 │ 2 3 4 │",
        "├───────┼───────┤",
        "│ 3 4 5 │ 6 1 2 │",
        "│ 6 1 2 │ 3 4 5 │",
        "└───────┴───────┘",
    ]


def test_givens_findings_and_mistakes_look_different():
    row = grid.marked(["124456", *SOLUTION[1:]], PUZZLE, SOLUTION)[0]
    styles = [(row.plain[span.start : span.end], span.style) for span in row.spans]
    assert styles == [
        ("1", "bold"),
        ("2", "green"),
        ("4", "bold red"),
        ("4", "green"),
        ("5", "bold"),
        ("6", "green"),
    ]


def test_grids_are_read_from_prompts_and_answers():
    text = "\n".join(PUZZLE)
    assert grid.grids(f"sudoku\n{text}\n\n{text}") == [PUZZLE, PUZZLE]
    assert grid.grids("\n".join(SOLUTION)) == [SOLUTION]


def test_mistakes_are_counted():
    assert grid.mistakes(SOLUTION, SOLUTION) == 0
    assert grid.mistakes(PUZZLE, SOLUTION) == 3


def test_what_is_a_grid():
    assert grid.is_grid(SOLUTION)
    assert not grid.is_grid(SOLUTION[:5])
    assert not grid.is_grid([*SOLUTION[:5], "12345"])


def test_a_draft_is_framed_as_far_as_it_goes():
    draft = Text("12\n123456789\n\n\n4", "red")
    assert grid.framed_text(draft).plain.splitlines() == [
        "┌───────┬───────┐      ┌───────┬───────┐",
        "│ 1 2   │       │      │ 4     │       │",
        "│ 1 2 3 │ 4 5 6 │789   └───────┴───────┘",
        "└───────┴───────┘                       ",
    ]
    assert grid.framed_text(Text("")).plain == ""

"""Filling in, rewriting, and templates: what the demo model knows, and every error."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
from small_models import demo, tiny

from mlx_diffgemma import generate, generate_structured
from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.editing.decide import decide
from mlx_diffgemma.editing.edit import edit
from mlx_diffgemma.editing.fill import fill
from mlx_diffgemma.editing.infill import infill
from mlx_diffgemma.editing.template import Slot, parse_template
from mlx_diffgemma.errors import UsageError

GRID = sudoku.make_puzzle(np.random.default_rng(6)).solution
BARE = {"prompt": sudoku.BARE_PROMPT}


def test_infill_finds_length_and_content():
    model, tokenizer = demo()
    for start, length in [(0, 4), (9, 6), (20, 3), (35, 6)]:
        text = GRID[:start] + "[[?]]" + GRID[start + length :]
        done = infill(model, tokenizer, text, lengths=range(2, 9), seed=1, **BARE)
        assert done.text == GRID
        (hole,) = done.holes
        assert hole.text == GRID[start : start + length]
        assert max(hole.scores, key=hole.scores.get) == length
        assert len(hole.tokens) == len(hole.entropy) > 0


def test_infill_several_holes_of_unknown_length_together():
    model, tokenizer = demo()
    text = GRID[:3] + "??" + GRID[8:20] + "??" + GRID[23:]
    done = infill(model, tokenizer, text, hole="??", lengths=[2, 3, 5, 6], seed=1, **BARE)
    assert done.text == GRID
    assert [len(hole.text) for hole in done.holes] == [5, 3]


def test_infill_takes_a_length_for_each_hole():
    model, tokenizer = tiny()
    done = infill(
        model, tokenizer, "a?b?c", hole="?", lengths=[[2], [3, 4]], prompt="x", raw=True, seed=0,
        max_denoising_steps=2,
    )  # fmt: skip
    assert len(done.holes[0].tokens) == 2 + 2  # and the ends that it shares with what is around
    assert done.holes[0].scores == {} and set(done.holes[1].scores) == {3, 4}


def test_infill_says_how_much_was_cut():
    model, tokenizer = tiny()
    short = infill(model, tokenizer, "a[[?]]" + "b" * 10, lengths=[2], prompt="x", raw=True)
    long = infill(model, tokenizer, "a[[?]]" + "1" * 50, lengths=[2], prompt="x", raw=True)
    assert short.cut == 0
    assert long.cut == 1 + 2 + 50 - model.config.canvas_length


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("no hole", {}, "the text has no hole; mark one with [[?]]."),
        ("a", {"hole": ""}, "the mark of a hole is empty; give some characters, such as [[?]]."),
        ("[[?]]", {"lengths": [0]}, "one of lengths must be an integer of at least 1, not 0."),
        ("[[?]]", {"lengths": []}, "a hole takes at least 1 token; its lengths are []."),
        (
            "[[?]][[?]]",
            {"lengths": [[1], [2], [3]]},
            "lengths for 3 holes were given, and the text has 2; give as many.",
        ),
        (
            "[[?]]",
            {"lengths": [99]},
            "a gap of 99 tokens does not fit in the canvas of 24; make it shorter, or take a "
            "longer --canvas-length.",
        ),
        (
            "[[?]]b[[?]]",
            {"lengths": [[2], [10**12]]},
            "a gap of 1000000000000 tokens does not fit in the canvas of 24; make it shorter, or "
            "take a longer --canvas-length.",
        ),
        (
            "[[?]]",
            {"lengths": [99, 100]},
            "a gap of 99 tokens does not fit in the canvas of 24; make it shorter, or take a "
            "longer --canvas-length.",
        ),
    ],
)
def test_infill_errors(text, settings, message):
    model, tokenizer = tiny()
    with pytest.raises(UsageError) as error:
        infill(model, tokenizer, text, prompt="x", raw=True, **settings)
    assert str(error.value) == message


def test_edit_repairs_a_line_of_the_demo_model():
    model, tokenizer = demo()
    lines = GRID.split("\n")
    broken = "\n".join([lines[0], lines[0], *lines[2:]])
    done = edit(model, tokenizer, broken, "repair", (2, 2), seed=1, **BARE)
    assert done.text == GRID
    assert done.diff("grid") == (
        f"--- a/grid\n+++ b/grid\n@@ -1,5 +1,5 @@\n {lines[0]}\n-{lines[0]}\n+{lines[1]}\n"
        + "".join(f" {line}\n" for line in lines[2:5])
    )


def test_strength_says_how_much_of_the_present_stays():
    model, tokenizer = demo()
    lines = GRID.split("\n")
    wrong = lines[1][:2] + lines[1][3] + lines[1][2] + lines[1][4:]
    broken = "\n".join([lines[0], wrong, *lines[2:]])
    settings = {"seed": 2, **BARE}
    unchanged = edit(model, tokenizer, broken, "repair", (2, 2), strength=0.0, **settings)
    assert (unchanged.text, unchanged.passes) == (broken, 0)
    half = edit(model, tokenizer, broken, "repair", (2, 2), strength=0.5, **settings)
    assert half.text == GRID
    short = edit(
        model, tokenizer, broken, "repair", (2, 2), strength=0.1, max_denoising_steps=20, **settings
    )
    assert short.passes <= 2  # a tenth of the schedule


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        ((0, 1), {}, "one of lines must be an integer of at least 1, not 0."),
        ((2, 1), {}, "the range 2:1 is not in the text, which has 2 lines; ranges count from 1."),
        ((2, 3), {}, "the range 2:3 is not in the text, which has 2 lines; ranges count from 1."),
        ((1, 1), {"strength": 1.5}, "strength must be at most 1, not 1.5."),
    ],
)
def test_edit_errors(lines, settings, message):
    model, tokenizer = tiny()
    with pytest.raises(UsageError) as error:
        edit(model, tokenizer, "a\nb\n", "x", lines, **settings)
    assert str(error.value) == message


def test_fill_keeps_to_every_kind():
    model, tokenizer = tiny()
    template = "{d:digits}<{w:word}<{c:one|two}<{r:/[A-C]{2}-[0-9]+/}<{l}<{w}"
    for seed in range(5):
        done = fill(
            model, tokenizer, template, lengths=[2, 4, 6], prompt="x", raw=True, seed=seed,
            max_denoising_steps=2, canvas_length=40,
        )  # fmt: skip
        slots = done.slots
        assert re.fullmatch(r"[0-9]+", slots["d"])
        assert slots["w"].isalpha()
        assert slots["c"] in ("one", "two")
        assert re.fullmatch(r"[A-C]{2}-[0-9]+", slots["r"])
        assert not {"\n", "\r"} & set(slots["l"])
        middle = "<".join(slots[name] for name in "dwcrl")
        assert done.text == f"{middle}<{slots['w']}"


def test_fill_chooses_what_fits_on_the_demo_model():
    model, tokenizer = demo()
    template = (
        GRID[:7]
        + "{row:digits}"
        + GRID[13:30]
        + "{cell:1|2|3|4|5|6}"
        + GRID[31:35]
        + "{last:/[1-6]{6}/}"
    )
    done = fill(model, tokenizer, template, lengths=[4, 5, 6, 7], seed=1, **BARE)
    assert done.text == GRID
    assert done.slots == {"row": GRID[7:13], "cell": GRID[30], "last": GRID[35:]}
    assert done.filled["last"].scores == {}  # a pattern of one length leaves no choice


def test_templates_are_read():
    literals, slots = parse_template("a{{b}} {x} {y:/[a]{2}|}/} {z:1|2}{x}")
    assert literals == ["a{b} ", " ", " ", "", ""]
    regex = Slot("y", "regex", pattern="[a]{2}|}")
    assert slots == [Slot("x"), regex, Slot("z", "choices", ("1", "2")), Slot("x")]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("none", "the template has no slot; write one as {name}."),
        ("a\nb{x", "template, line 2, column 2: '{' without '}'; write '{{'."),
        ("a}", "template, line 1, column 2: '}' without '{'; write '}}'."),
        (
            "{1}",
            "template, line 1, column 1: '1' is no name for a slot; begin it with a letter, or "
            "write '{{' for a brace.",
        ),
        (
            "{a:b}",
            "template, line 1, column 1: 'b' is unknown; known are line, text, word, digits, "
            "one|other and /regex/.",
        ),
        ("{a:b||c}", "template, line 1, column 1: choices must be different, none empty."),
        ("{a:word}{a:digits}", "slot 'a' is described twice, and differently; name one otherwise."),
    ],
)
def test_template_errors(template, message):
    with pytest.raises(UsageError) as error:
        parse_template(template)
    assert str(error.value) == message


def test_a_pattern_that_cannot_fit():
    model, tokenizer = tiny()
    with pytest.raises(UsageError) as error:
        fill(model, tokenizer, "{a:/(/}", prompt="x", raw=True)
    assert str(error.value).startswith("the pattern of slot 'a' cannot be used: ")
    found = fill(model, tokenizer, "{a:/[0-9]{9}/}", lengths=[2, 3], prompt="x", raw=True)
    assert len(found.filled["a"].tokens) == 9  # what the pattern needs, whatever lengths says


@pytest.mark.parametrize(
    "run",
    [
        partial(infill, text="a [[?]] b", prompt="x"),
        partial(edit, text="a\nb", instruction="shorter", lines=(1, 1), prompt="x"),
        partial(fill, template="a {name:word}", prompt="x"),
        partial(generate_structured, prompt="x", regex="[a-z]+"),
        partial(decide, state="x", questions={"wet": {"type": "noul", "instructions": "Wet."}}),
        partial(generate, prompt="x"),
    ],
    ids=["infill", "edit", "fill", "structured", "decide", "generate"],
)
def test_a_canvas_longer_than_the_context_is_refused_before_it_is_laid_out(run):
    # A list of as many tokens has no place in any memory.
    with pytest.raises(UsageError, match="canvas_length"):
        run(*tiny(), canvas_length=10**13)

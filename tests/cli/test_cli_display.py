"""What is drawn of a canvas."""

from __future__ import annotations

import io

import pytest
from cli_fakes import EOS, FakeTokenizer, Script, characters, rendered
from rich.console import Console
from rich.text import Text

from mlx_diffgemma.cli import display
from mlx_diffgemma.cli.outcome import pieces_of
from mlx_diffgemma.text import detokenize


def responses(*canvases: str, steps: int = 2):
    options = {"on_prefill": lambda done, total: None}
    return list(Script(list(canvases), steps).stream_generate(None, None, "hi", **options))


def pieces(response):
    return text_pieces("" if id == EOS else chr(id) for id in response.canvas)


def text_pieces(texts):
    return [("text", text) for text in ("", *texts)]


def drawn(view, width=40, height=12) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, height=height, _environ={})
    console.print(view)
    return rendered(file.getvalue())


@pytest.mark.parametrize(
    ("entropy", "style"),
    [(0.0, ""), (0.049, ""), (0.05, "yellow"), (0.99, "dark_orange3"), (1.5, "red"),
     (2.0, "dim red"), (12.5, "dim red"), (float("inf"), "dim red"), (float("nan"), "dim red")],
)  # fmt: skip
def test_the_scale(entropy, style):
    assert display.tint(entropy) == style


def test_the_draft_is_tinted_and_the_committed_text_is_not():
    text = display.draft_text("sure ", text_pieces("ab"), [0.0, 3.0])
    assert text.plain == "sure ab"
    assert [(span.start, span.end, span.style) for span in text.spans] == [(6, 7, "dim red")]


def test_control_characters_become_pictures():
    assert display.printable("a\x1b[31m\x07\r\x00\x7f\x9b\n\té🙂\ud800") == (
        "a␛[31m␇␍␀␡\ufffd\n\té🙂\ufffd"
    )


def test_markup_and_emoji_names_are_shown_as_they_are():
    view = display.CanvasView(pieces)
    view.add(responses("[red]x[/] :smile:", steps=1)[0])
    assert drawn(view)[0] == "[red]x[/] :smile:"


def test_only_the_end_of_a_long_text_is_drawn():
    view = display.CanvasView(pieces)
    for response in responses("".join(f"line {n}\n" for n in range(100)), "the end", steps=1)[:3]:
        view.add(response)
    lines = drawn(view, height=6)
    assert lines[:4] == ["line 97", "line 98", "line 99", "the end"]
    assert lines[4].startswith("canvas 2 · step 1 · mean entropy 0.009 ·")
    assert len(lines) == 5


def test_a_long_line_is_wrapped_and_cropped():
    text = Text("abcdefghij" * 10)
    assert [row.plain for row in display.tail(text, Console(), 10, 3)] == ["abcdefghij"] * 3


def test_wide_characters_take_two_columns():
    rows = display.tail(Text("漢字漢字🙂🙂"), Console(), 4, 5)
    assert [row.plain for row in rows] == ["漢字", "漢字", "🙂🙂"]


def test_a_canvas_keeps_its_height():
    texts = {1: "a\nb\nc", 2: "abc__", 0: ""}
    view = display.CanvasView(lambda response: text_pieces(texts[response.step]))
    tall, flat, committed = responses("1234", steps=2)
    view.add(tall)
    assert drawn(view)[:3] == ["a", "b", "c"]
    assert drawn(view)[3].startswith("canvas 1 · step 1")
    view.add(flat)
    assert drawn(view)[:3] == ["abc__", "", ""]
    assert drawn(view)[3].startswith("canvas 1 · step 2")
    view.add(committed)
    assert drawn(view) == ["1234", "canvas 1 · 4 tokens committed"]


def test_the_prefill_is_shown():
    view = display.CanvasView(pieces)
    view.prefill = (512, 2048)
    assert drawn(view) == ["reading the prompt 512/2048 tokens"]


def test_the_live_display_leaves_nothing_behind_and_the_cursor_on():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=40, height=12, _environ={})
    with display.CanvasDisplay(console, display.CanvasView(pieces), seconds_per_step=0.001) as live:
        for response in responses("one\ntwo", "three"):
            live.show(response)
    written = file.getvalue()
    assert "t?r?e" in written.replace("\x1b[2;31m", "").replace("\x1b[0m", "")
    assert rendered(written) == []
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_the_cursor_comes_back_after_an_error():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=40, height=12, _environ={})
    with (
        pytest.raises(KeyboardInterrupt),
        display.CanvasDisplay(console, display.CanvasView(pieces)) as live,
    ):
        live.show(responses("one")[0])
        raise KeyboardInterrupt
    assert rendered(file.getvalue()) == []
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")


def test_fast_steps_are_not_all_drawn():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=40, height=12, _environ={})
    with display.CanvasDisplay(console, display.CanvasView(pieces)) as live:
        for response in responses("text", steps=2000):
            live.show(response)
    assert 1 <= file.getvalue().count("canvas 1") < 500


def test_nothing_is_shown_from_the_eos_on(monkeypatch):
    monkeypatch.setattr(detokenize, "token_strings", characters)
    response = responses("ab")[0]
    object.__setattr__(response, "canvas", [97, EOS, 98, 99])
    assert pieces_of(FakeTokenizer())(response) == text_pieces(["a", "", "", ""])


@pytest.mark.parametrize(
    ("thoughts", "shown"),
    [
        (display.Thoughts.FOLDED, ["thought: and more", "Paris.call:f{}"]),
        (display.Thoughts.SHOWN, ["thought: plan", "and more", "Paris.call:f{}"]),
        (display.Thoughts.HIDDEN, ["Paris.call:f{}"]),
    ],
)
def test_what_is_drawn_of_a_thought_and_a_call(thoughts, shown):
    drafted = [("text", ""), ("thought", "\nand "), ("thought", "more"), ("text", "Paris.")]
    view = display.CanvasView(lambda response: [*drafted, ("call", "call:f{}")], thoughts=thoughts)
    view.thought = "plan"
    view.add(responses("abc", steps=1)[0])  # three tokens and the eos
    assert drawn(view)[:-1] == shown

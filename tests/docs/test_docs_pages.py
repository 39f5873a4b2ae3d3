"""What the documentation makes of the program: pages of commands, and pictures of a run."""

from __future__ import annotations

import re
import sys
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import docs_pages
import draw_concepts
import pytest


def test_every_option_stands_on_the_page_of_its_command() -> None:
    pages = docs_pages.command_pages()
    for words, made in docs_pages.commands():
        path = f"commands/{'-'.join(words)}.md"
        assert f"]({'-'.join(words)}.md)" in pages["commands/index.md"]
        page = unescape(pages[path])
        for parameter in made.params:
            if parameter.param_type_name == "option" and not parameter.hidden:
                for flag in [*parameter.opts, *parameter.secondary_opts]:
                    assert re.search(rf"(?<![\w-]){flag}(?![\w-])", page), f"{path}: {flag}"
        for example in getattr(made.callback, "examples", ()):
            assert f"\n{example}\n" in pages[path]


def test_what_markdown_reads_is_shown_as_it_is() -> None:
    assert docs_pages._prose("a|b <c> *d* of `e<f>`, --g") == (
        "a&#124;b &#60;c&#62; &#42;d&#42; of <code>e&#60;f&#62;</code>, <code>--g</code>"
    )


def test_the_pages_of_commands_take_their_place_in_the_navigation() -> None:
    nav = [{"Reference": [{"Commands": "commands/"}, {"Python": "python.md"}]}]
    docs_pages._replace(nav, ["commands/index.md", {"fill": "commands/fill.md"}])
    assert nav == [
        {"Reference": [{"Commands": ["commands/index.md", {"fill": "commands/fill.md"}]},
                       {"Python": "python.md"}]}
    ]  # fmt: skip


def test_a_run_becomes_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["draw_concepts.py", str(tmp_path)])
    monkeypatch.setattr(draw_concepts, "PROMPT", "record\npet: mule")
    draw_concepts.main()
    texts = {
        path.stem: "".join(ElementTree.parse(path).getroot().itertext()).replace("\n", "")
        for path in tmp_path.iterdir()
    }
    assert '{"pet":"mule"}' in texts["concept-steps"].replace(" ", "")
    assert re.search(r"\d+ positions are accepted", texts["concept-entropy"])
    assert set(texts) == {
        f"concept-{name}" for name in ("steps", "entropy", "passes", "visibility")
    }

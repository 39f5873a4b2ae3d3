"""Pages of the documentation that are made while it is built, as hooks of mkdocs.

Each command has a page made of what its `--help` prints, and the changelog is a page as it is. So
nothing of either is written twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import typer

from mlx_diffgemma.cli.help_page import write_options
from mlx_diffgemma.cli.main import app
from mlx_diffgemma_convert.cli import app as converter

ROOT = Path(__file__).parents[1]
COMMANDS = "commands/"  # the entry of the navigation that stands for all pages of commands
_STYLE = re.compile(r"\x1b\[[0-9;]*m")  # what makes a heading bold on a terminal


class Markdown:
    """What writes a help page, as a page of Markdown."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Write a heading over what is written inside."""
        self.lines += ["", f"## {_STYLE.sub('', name)}", ""]
        yield

    def write_dl(self, rows: list[tuple[str, str]]) -> None:
        """Write rows of two columns as a table."""
        self.lines += ["| | |", "|---|---|"]
        self.lines += [f"| {_code(names)} | {_prose(says)} |" for names, says in rows]


def command_pages() -> dict[str, str]:
    """Every page of a command: its path in the site and its text."""
    pages = {}
    rows = []
    for words, made in commands():
        name = "-".join(words)
        pages[f"{COMMANDS}{name}.md"] = command_page(words, made)
        summary = (made.help or "").partition("\n\n")[0]
        rows.append(f"| [`{' '.join(words)}`]({name}.md) | {_prose(summary)} |")
    index = [
        "# Commands",
        "",
        "Each page is made of what `mlx-diffgemma COMMAND --help` prints. An error is one line on "
        "stderr, with exit code 2 where the command was written wrongly and 1 otherwise; `--debug` "
        "shows the traceback. Ctrl-C ends with 130.",
        "",
        "| `mlx-diffgemma` | |",
        "|---|---|",
        *rows,
        "",
    ]
    return {f"{COMMANDS}index.md": "\n".join(index), **pages}


def commands() -> Iterator[tuple[list[str], Any]]:
    """Every command: the words that call it, and the command as typer made it."""
    program = typer.main.get_command(app)
    for name in program.list_commands(None):
        if name == "convert":  # a program of its own
            made = typer.main.get_command(converter)
        else:
            made = program.get_command(None, name)
        yield [name], made
        if hasattr(made, "list_commands"):
            for inner in made.list_commands(None):
                yield [name, inner], made.get_command(None, inner)


def command_page(words: list[str], made: Any) -> str:
    """The page of a command: its summary, its examples, more about it, and all its options."""
    with made.make_context(" ".join(["mlx-diffgemma", *words]), [], resilient_parsing=True) as ctx:
        summary, *paragraphs = (made.help or "").split("\n\n")
        page = Markdown()
        usage = " ".join([ctx.command_path, *made.collect_usage_pieces(ctx)])
        page.lines = [f"# {' '.join(words)}", "", _prose(summary), ""]
        for paragraph in paragraphs:
            if paragraph.startswith("\b\nExamples:"):
                examples = [line.strip() for line in paragraph.splitlines()[2:]]
                page.lines += ["```sh", *examples, "```", ""]
            else:
                page.lines += [_prose(paragraph), ""]
        page.lines += ["```text", f"Usage: {usage}", "```"]
        write_options(made, ctx, page)
    return "\n".join(page.lines) + "\n"


def _code(text: str) -> str:
    """Text in the type of code, in a cell of a table."""
    return f"<code>{escape(text, quote=False).replace('|', '&#124;').replace('*', '&#42;')}</code>"


def _prose(text: str) -> str:
    """A paragraph as it is written, with options and what stands in backquotes as code."""
    parts = " ".join(text.split()).split("`")
    for n, part in enumerate(parts):
        shown = re.sub(r"[<>&|*_{}\[\]\\]", lambda found: f"&#{ord(found[0])};", part)
        if n % 2:
            parts[n] = f"<code>{shown}</code>"
        else:
            parts[n] = re.sub(r"(?<![\w-])(--?[a-z][\w-]*)", r"<code>\1</code>", shown)
    return "".join(parts)


def on_config(config: Any) -> Any:
    """Put the pages of the commands into the navigation."""
    listed = [path for path in command_pages() if not path.endswith("index.md")]
    entries: list[Any] = [f"{COMMANDS}index.md"]
    entries += [{Path(path).stem.replace("-", " "): path} for path in listed]
    _replace(config.nav, entries)
    return config


def _replace(nav: list[Any], entries: list[Any]) -> None:
    for entry in nav:
        for name, inner in entry.items() if isinstance(entry, dict) else ():
            if inner == COMMANDS:
                entry[name] = entries
            elif isinstance(inner, list):
                _replace(inner, entries)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    changelog = (ROOT / "CHANGELOG.md").read_text().replace("](docs/", "](")
    made = {**command_pages(), "changelog.md": changelog}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Mark what is short in the type of code, so that no line ends inside an option."""
    return re.sub(r"(?<!<span></span>)<code>(?=[^<]{1,30}</code>)", '<code class="short">', html)

"""The code blocks of Markdown pages, and what can be said of one without running it.

A block is run unless a comment stands before it that names the reason:

    <!-- not run: needs the released weights -->

A block whose fence says `title="NAME"` is a file that the following blocks find under that name. A
block `text` right behind one of `sh` or `python` is what that one prints, and in a block `console`
the lines behind `$ COMMAND` are; `…` stands there for any text. Commands that the reader need not
see stand in a comment that begins with `<!-- run`.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import docs_pages
import typer
import yaml

ROOT = Path(__file__).parents[2]
PROGRAMS = ("mlx-diffgemma", "mlx-diffgemma-convert")
LANGUAGES = {"sh", "console", "python", "text", "json", "yaml", "toml", "ini", "diff", "html"}
_FENCE = re.compile(r"^( *)(`{3,})([\w-]*)([^`\n]*)$")
_TITLE = re.compile(r'title="([^"]+)"')
_SEPARATES = re.compile(r"^[();|&]+$|^[0-9]*[<>]+&?$")


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        where: page and line of its first line of code.
        line: that line.
        language: the word behind its fence.
        text: its lines, without the indentation of the fence.
        title: name of the file that it is.
        not_run: why it is not run.
        output: what it prints, where the page says so.
    """

    where: str
    line: int
    language: str
    text: str
    title: str | None = None
    not_run: str | None = None
    output: str | None = None

    def steps(self) -> Iterator[tuple[str, str | None]]:
        """The commands of a block for a shell, each with what it prints, where that is told."""
        if self.language == "sh":
            for command in commands(self.text):
                yield command, None
            return
        for said in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            lines = said.splitlines()
            count = next(n for n in range(1, len(lines) + 1) if _whole("\n".join(lines[:n])))
            yield "\n".join(lines[:count]), "\n".join(lines[count:])


def blocks_of(text: str, name: str) -> list[Block]:
    """The blocks of a page, in order."""
    found: list[Block] = []
    lines = text.splitlines()
    at, reason, last = 0, None, -1
    while at < len(lines):
        line = lines[at].strip()
        if line.startswith("<!--"):
            end = next(n for n in range(at, len(lines)) if "-->" in lines[n])
            said = "\n".join(lines[at : end + 1]).strip()[4:].partition("-->")[0].strip()
            if said.startswith("not run:"):
                reason = " ".join(said[8:].split())
                assert reason, f"{name}:{at + 1}: say why the block is not run"
            elif re.match(r"run\n", said):
                hidden = inspect.cleandoc("\n" + said[4:])
                found.append(Block(f"{name}:{at + 2}", at + 2, "sh", hidden))
                last = -1
            at = end + 1
            continue
        fence = _FENCE.match(lines[at])
        if fence is None:
            if line:
                reason, last = None, -1
            at += 1
            continue
        indent, ticks, language, rest = fence.groups()
        end = next(n for n in range(at + 1, len(lines)) if lines[n].strip() == ticks)
        code = "\n".join(line.removeprefix(indent) for line in lines[at + 1 : end])
        title = _TITLE.search(rest)
        block = Block(
            f"{name}:{at + 2}", at + 2, language, code, title[1] if title else None, reason
        )
        if language == "text" and not title and last >= 0:
            found[last] = replace(found[last], output=code)
        found.append(block)
        last = len(found) - 1 if language in ("sh", "python") else -1
        at, reason = end + 1, None
    return found


def commands(text: str) -> list[str]:
    """The commands of a script, each with all its lines; comments and empty lines are left out."""
    found: list[str] = []
    waiting: list[str] = []
    for line in text.splitlines():
        if not waiting and (not line.strip() or line.lstrip().startswith("#")):
            continue
        waiting.append(line)
        if _whole("\n".join(waiting)):
            found.append("\n".join(waiting))
            waiting = []
    assert not waiting, f"a command does not end: {waiting[0]}"
    return found


def _whole(command: str) -> bool:
    """Whether a shell would run these lines, not wait for more."""
    if command.endswith("\\"):
        return False
    here = re.search(r"<<-?\s*['\"]?(\w+)", command)
    if here is not None:
        return re.search(rf"^\s*{here[1]}$", command, re.MULTILINE) is not None
    if not re.search(r"['\"`(]|^\s*(for|while|if|case)\b", command):
        return True
    said = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
    return said.returncode == 0 and not said.stderr


def words_of(command: str) -> list[list[str]]:
    """The words of each simple command in a line of a shell, without redirections."""
    command = re.sub(r"<<-?\s*'?(\w+)'?.*?\n\1$", "", command, flags=re.DOTALL | re.MULTILINE)
    lexer = shlex.shlex(command.replace("\\\n", " "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    simple: list[list[str]] = [[]]
    words = iter(list(lexer))
    for word in words:
        if not _SEPARATES.match(word):
            simple[-1].append(word)
        elif set(word) & set("<>"):
            next(words, None)  # the file
        else:
            simple.append([])
    return [each for each in simple if each]


def check_shell(command: str, where: str) -> int:
    """Check the options of every command in a line that is this program or one of its scripts.
    Returns how many there were."""
    count = 0
    for words in words_of(command):
        called = [n for n, word in enumerate(words) if Path(word).name in PROGRAMS]
        script = next((word for word in words if word.startswith("scripts/")), None)
        if script is not None:
            assert (ROOT / script).is_file(), f"{where}: there is no {script}"
            for word in words[words.index(script) + 1 :]:
                option = word.partition("=")[0]
                assert not option.startswith("--") or is_of_scripts(option), (
                    f"{where}: {script} has no {option}"
                )
            count += 1
        elif called and "install" not in words[: called[-1]]:
            first = called[0] if "uvx" not in words else called[-1]
            check_arguments(Path(words[first]).name, words[first + 1 :], where)
            count += 1
    return count


def is_of_scripts(option: str) -> bool:
    """Whether a script has an option, as a literal or as a field that it is made of."""
    field = rf"^    {option[2:].replace('-', '_')}:"
    return any(
        f'"{option}"' in source or re.search(field, source, re.MULTILINE) for source in _scripts()
    )


@cache
def _scripts() -> list[str]:
    paths = [*(ROOT / "scripts").glob("*.py"), ROOT / "tests/kernels/force_kernels.py"]
    return [path.read_text() for path in paths]


def check_arguments(program: str, arguments: list[str], where: str) -> None:
    """Check the arguments of the program or the converter as it would read them itself."""
    if program == "mlx-diffgemma-convert":
        arguments = ["convert", *arguments]
    while arguments and arguments[0] == "--debug":
        arguments = arguments[1:]
    if not arguments or arguments[0].startswith("--"):
        assert not arguments or arguments[0] in ("--help", "--version", "--show-completion"), where
        return
    known = {tuple(words): made for words, made in docs_pages.commands()}
    count = len(arguments[:2]) if tuple(arguments[:2]) in known else 1
    made = known.get(tuple(arguments[:count]))
    assert made is not None, f"{where}: there is no command {arguments[0]}"
    try:
        made.make_context(arguments[count - 1], arguments[count:])
    except typer.Exit:  # of --help
        pass
    except Exception as error:
        raise AssertionError(f"{where}: {' '.join(arguments)}: {error}") from None


def check_python(text: str, where: str) -> None:
    """Check that a script parses, and that what it imports of the program and names in calls is
    there."""
    tree = ast.parse(text, where)
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_diffgemma"):
            home = import_module(str(node.module))
            for alias in node.names:
                assert hasattr(home, alias.name), f"{where}: {node.module} has no {alias.name}"
                known[alias.asname or alias.name] = getattr(home, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            takes = inspect.signature(known[node.func.id]).parameters
            if not any(each.kind is each.VAR_KEYWORD for each in takes.values()):
                named = {keyword.arg for keyword in node.keywords} - {None}
                assert named <= set(takes), f"{where}: {node.func.id} has no {named - set(takes)}"


def check(block: Block) -> None:
    """Check a block without running it."""
    assert block.language in LANGUAGES, f"{block.where}: a block says what it is: {LANGUAGES}"
    if block.language in ("sh", "console"):
        for command, _ in block.steps():
            check_shell(command, block.where)
    elif block.language == "python":
        check_python(block.text, block.where)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        yaml.safe_load(block.text)


def matches(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed, `…` in it standing for any text."""
    parts = [re.escape(part) for part in _trimmed(shown).split("…")]
    return re.fullmatch(".*".join(parts), _trimmed(printed), re.DOTALL) is not None


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())

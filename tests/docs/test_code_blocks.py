"""Every code block of the README and of the documentation: those that can be run are run on the
demo model, and the commands, options and names of all others are looked up in the program."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import docs_pages
import pytest
from docs.blocks import ROOT, Block, blocks_of, check, check_shell, commands, is_of_scripts, matches
from docs.page_runner import PageRunner

from mlx_diffgemma.cli.main import COMMANDS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OF_MLX = {"--auto-setup", "--env"}  # options of mlx.distributed_config and mlx.launch
COMPARED = sys.platform == "linux"  # a seed gives the same answer on one kind of machine


def pages() -> list[object]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES]


@pytest.mark.parametrize("page", pages())
def test_code_blocks_of(page: Path, tmp_path: Path) -> None:
    found = blocks_of(page.read_text(), str(page.relative_to(ROOT)))
    with PageRunner(tmp_path, compare=COMPARED) as runner:
        for block in found:
            runner.run(block)


@pytest.mark.parametrize("page", pages())
def test_options_in_the_text_of(page: Path) -> None:
    """Options that stand between the words of a page are those of a command or a script, and
    commands are there."""
    said = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    known = options() | OF_MLX
    for code in re.findall(r"`(--[a-z][\w-]*)", said):
        assert code in known or is_of_scripts(code), f"{page.name}: nothing has {code}"
    for name in re.findall(r"`mlx-diffgemma ([a-z]+)", said):
        assert name in COMMANDS, f"{page.name}: there is no command {name}"


def options() -> set[str]:
    """All options of all commands."""
    return {
        flag
        for _, made in docs_pages.commands()
        for parameter in made.params
        for flag in [*parameter.opts, *parameter.secondary_opts]
    }


def test_the_readme_names_every_command_and_is_read_in_one_sitting() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160
    assert [name for name in COMMANDS if f"mlx-diffgemma {name}" not in text] == []


def test_the_python_page_describes_every_public_name() -> None:
    import mlx_diffgemma

    text = (ROOT / "docs/python.md").read_text()
    assert set(re.findall(r"^::: mlx_diffgemma\.(\w+)$", text, re.MULTILINE)) == set(
        mlx_diffgemma.__all__
    )


@pytest.mark.parametrize(
    "block",
    [
        Block("x:1", 1, "sh", "mlx-diffgemma generate --nonsense"),
        Block("x:1", 1, "sh", "echo a | mlx-diffgemma edit --instruction"),
        Block("x:1", 1, "sh", "mlx-diffgemma nonsense"),
        Block("x:1", 1, "sh", "python scripts/nonsense.py"),
        Block("x:1", 1, "sh", "python scripts/measure_demo.py --nonsense"),
        Block("x:1", 1, "console", "$ mlx-diffgemma-convert --nonsense\nx"),
        Block("x:1", 1, "python", "from mlx_diffgemma import nonsense"),
        Block("x:1", 1, "python", "from mlx_diffgemma import load\nload('demo', nonsense=1)"),
        Block("x:1", 1, "json", "{1: 2}"),
        Block("x:1", 1, "bash", "true"),
    ],
    ids=lambda block: block.text[:40],
)
def test_what_is_not_there_is_found(block: Block) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check(block)


def test_what_is_printed_is_compared(tmp_path: Path) -> None:
    page = """
```sh
printf 'a  \\nb\\n'
```

```text
a
b
```

<!-- not run: it is an example -->
```sh
mlx-diffgemma generate --steps 3
```

- in a list

    ```python title="said.py"
    print(6 * 7)
    ```

<!-- run
x=1
-->

```console
$ python said.py
4…
$ mlx-diffgemma generate --nonsense
error: no such option: --nonsense…
```
"""
    said, shown, skipped, file, hidden, console = blocks_of(page, "x")
    assert (said.output, skipped.not_run, hidden.text) == ("a\nb", "it is an example", "x=1")
    with PageRunner(tmp_path) as runner:
        ran = [runner.run(block) for block in (said, shown, skipped, file, hidden, console)]
        assert ran == [True, False, False, False, True, True]
        with pytest.raises(AssertionError, match="but this is printed"):
            runner.run(Block("x:1", 1, "console", "$ echo a\nb"))
        with pytest.raises(AssertionError, match="ended with 1"):
            runner.run(Block("x:1", 1, "sh", "false"))
    assert not matches("a … c", "a b")


def test_a_shell_s_lines_are_told_apart() -> None:
    text = "# no\ncat > f <<'E'\nmlx-diffgemma nonsense\nE\na \\\n  b\nfor x in 1; do\n  $x\ndone"
    assert [each.splitlines()[0] for each in commands(text)] == [
        "cat > f <<'E'", "a \\", "for x in 1; do",
    ]  # fmt: skip
    assert check_shell("A=1 mlx-diffgemma demo --seed 7 > f && uvx mlx-diffgemma demo", "x") == 2
    assert check_shell("pip install mlx-diffgemma", "x") == 0

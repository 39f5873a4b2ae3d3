"""No module of the program or of its scripts imports itself by way of others, not for types either.

The contracts of `pyproject.toml` say which rooms may know which; this is about files.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("mlx_diffgemma", "convert/mlx_diffgemma_convert", "scripts")


def modules() -> dict[str, Path]:
    """Every file by its import name; a script is imported by its bare name."""
    named = {}
    for source in SOURCES:
        base = ROOT / source if source == "scripts" else (ROOT / source).parent
        for path in (ROOT / source).rglob("*.py"):
            parts = path.relative_to(base).with_suffix("").parts
            named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imports(tree: ast.AST, known: set[str]) -> set[str]:
    """The known modules that a file names, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner if inner <= known else {node.module, *inner}
    return found & known


def bound(tree: ast.AST) -> set[str]:
    """The names that a file binds anywhere, and where it makes names on demand, those it spells."""
    found, spelled = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            spelled.add(node.value)
    return found | spelled if "__getattr__" in found else found


def missing(tree: ast.AST, known: dict[str, set[str]]) -> set[str]:
    """What a file imports of our modules, here with the names that they bind, that there is not."""
    packages, wrong = {name.partition(".")[0] for name in known}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wrong |= {alias.name for alias in node.names} - set(known)
        elif isinstance(node, ast.ImportFrom):
            module = str(node.module)
            names = {f"{module}.{alias.name}" for alias in node.names}
            there = {f"{module}.{name}" for name in known.get(module, ())} | set(known)
            wrong |= names - there
    return {name for name in wrong if name.partition(".")[0] in packages}


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_imports_in_circles():
    named = modules()
    assert {"mlx_diffgemma.cli.main", "mlx_diffgemma_convert.cli", "train_demo"} <= set(named)
    graph = {
        name: imports(ast.parse(path.read_text()), set(named)) - {"mlx_diffgemma"}
        for name, path in named.items()
    }
    assert "mlx_diffgemma.cli.editing" in graph["mlx_diffgemma.cli.structured"]
    assert circle(graph) == []


def test_all_that_is_imported_of_ours_exists():
    """In scripts too, whose imports inside of functions no test may run."""
    known = {name: bound(ast.parse(path.read_text())) for name, path in modules().items()}
    files = [*modules().values(), *(ROOT / "tests").rglob("*.py")]
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in files
        if (found := missing(ast.parse(path.read_text()), known))
    }
    assert wrong == {}


def test_what_is_gone_is_found():
    known = {"a": {"b"}, "a.c": {"__getattr__", "lazy"}}
    source = "import os, a.x\ndef f():\n    from a.d import e\nfrom a import b, c, g\n"
    assert missing(ast.parse(source + "from a.c import lazy"), known) == {"a.x", "a.d.e", "a.g"}


@pytest.mark.parametrize("indent", ["", "if TYPE_CHECKING:\n    ", "def f():\n    "])
def test_a_circle_is_found(indent):
    known = {"a", "b.c"}
    graph = {
        "a": imports(ast.parse(f"{indent}from b import c"), known),
        "b.c": imports(ast.parse("import a"), known),
    }
    assert set(circle(graph)) == known


@pytest.mark.parametrize("module", ["mlx_diffgemma_convert.converting", "mlx_diffgemma.cli.main"])
def test_what_needs_no_model_starts_without_its_libraries(module):
    """They take seconds to read: transformers reads torch where that is there."""
    told = f"import sys, {module}; print({{'mlx_lm', 'transformers', 'torch'}} & {{*sys.modules}})"
    ran = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"

"""Bodies for every route, made from what its module says of its fields, so that a new route or
field is tried by itself."""

from __future__ import annotations

import ast
import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

import mlx_diffgemma.server as room

READERS = (
    "text", "flag", "integer", "number", "choice", "mapping", "within", "texts", "objects", "get",
)  # fmt: skip
"""How a module reads a field; what follows is its name."""

SPELLED = [
    "", "hi", "sort: 3 1 2", "user", "assistant", "system", "tool", "auto", "none", "required",
    "any", "function", "text", "json_object", "json_schema", "json", "object", "string", "tiny",
    "<|turn>user\n", "<turn|>", "<eos>", "<|channel>thought\n", "<|image|>", "\x00", "🦊", "\u202e",
    "def f(x):\n    return [[?]]\n", "{name:word}", "{a:/[0-9]+/}", "/etc/passwd", "high",
    "https://evil.example/x.png", "data:image/png;base64,AAAA", "{{ 7 * 7 }}", "[a-z]{2}", "(",
    "noul", "choice", "score", "enabled", "disabled", "tool_use", "tool_result", "1:2",
    "<|current_file_content|>\n<|code_to_edit|>\na\n<|cursor|>\n<|/code_to_edit|>\n"
    "<|/current_file_content|>", "<|original_code|>a<|/original_code|>",
]  # fmt: skip
NUMBERS = [0, 1, 2, 3, -1, 7, 64, 10**6, 2**31, 2**63, 2**64, 10**40, 0.5, 0.0, -0.5, 1e-9, 1e300]
USUAL: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "prompt": "hi",
    "max_tokens": 8,
    "text": "a [[?]] b",
    "template": "a {name:word}",
    "instruction": "shorter",
    "lines": [1, 1],
    "state": "it rains",
    "questions": {"wet": {"type": "noul", "instructions": "It is wet."}},
}
"""What makes a request whole on one route or another."""


@cache
def fields_of(module: str) -> dict[str, str]:
    """The names that a module gives to fields, and how each is read ("" where that is unknown)."""
    tree = ast.parse((Path(room.__file__).parent / f"{module}.py").read_text())
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            first = node.args[0]
            name = _name_in(first)
            if node.func.attr in READERS and name:
                found[name] = node.func.attr
    for node in tree.body:  # tables of the module
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            for each in ast.walk(node.value):
                name = _name_in(each)
                if name:
                    found.setdefault(name, "")
    return found


def _name_in(node: ast.AST) -> str | None:
    """The name of a field that a node of the source spells, if it spells one."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return None
    return node.value if node.value.isidentifier() and len(node.value) < 40 else None


scalars = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(SPELLED),
    st.integers(-3, 12), st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)  # fmt: skip
junk = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(SPELLED), inner, max_size=3)
    ),
    max_leaves=6,
)


def objects(fields: dict[str, str], deep: int) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of the fields, each mostly of the kind that is read."""
    if not fields:
        return st.dictionaries(st.sampled_from(SPELLED), junk, max_size=3)

    def value(name: str) -> st.SearchStrategy[Any]:
        usual = [st.just(USUAL[name])] * 3 if name in USUAL else []
        inner = objects(fields, deep - 1) if deep else st.just({})
        kinds: dict[str, st.SearchStrategy[Any]] = {
            "text": st.sampled_from(SPELLED),
            "choice": st.sampled_from(SPELLED),
            "flag": st.booleans(),
            "integer": st.sampled_from(NUMBERS[:8]),
            "number": st.sampled_from(NUMBERS),
            "texts": st.lists(st.sampled_from(SPELLED), max_size=3),
            "objects": st.lists(inner, max_size=3),
            "within": inner,
            "mapping": inner,
        }
        return st.one_of(*usual, kinds.get(fields[name], junk), junk)

    return st.lists(st.sampled_from(sorted(fields)), max_size=5, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: value(name) for name in names})
    )


def bodies(module: str) -> st.SearchStrategy[bytes]:
    """Requests for the routes of a module: most of them nearly right, some broken as JSON."""
    fields = fields_of(module)
    usual = st.lists(st.sampled_from(sorted(USUAL)), max_size=4, unique=True).map(
        lambda missing: {name: value for name, value in USUAL.items() if name not in missing}
    )
    whole = st.tuples(usual, objects(fields, 2)).map(lambda both: _encoded({**both[0], **both[1]}))
    return st.one_of(
        whole,
        whole,
        whole,
        whole,
        _broken(whole),
        junk.map(_encoded),
    )


def _encoded(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _broken(whole: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """A body that is cut, or has some bytes in the place of others."""
    return st.builds(
        lambda body, start, length, put: body[:start] + put + body[start + length :],
        whole, st.integers(0, 200), st.integers(0, 40), st.binary(max_size=6),
    )  # fmt: skip

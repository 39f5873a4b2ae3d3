"""Bodies for every route, made from what its module says of its fields, so that a new route or
field is tried by itself; and from whole requests, some parts of which are others.

Everything follows from the random numbers that a body is made with, so its seed repeats it.
"""

from __future__ import annotations

import ast
import copy
import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import mlx_diffgemma.server as room
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.settings import settings_of

READERS = (
    "text", "flag", "integer", "number", "choice", "mapping", "within", "texts", "objects", "get",
)  # fmt: skip
"""How a module reads a field; what follows is its name."""

SPELLED = [
    "", "hi", "sort: 3 1 2", "user", "assistant", "system", "tool", "auto", "none", "required",
    "any", "function", "text", "json_object", "json_schema", "json", "object", "string", "tiny",
    "<|turn>user\n", "<turn|>", "<eos>", "<|channel>thought\n", "<|image|>", "\x00", "🦊", "\u202e",
    "4..613\n61.42.\n.6...4\n134...\n3265.1\n5...6.",
    "def f(x):\n    return [[?]]\n", "{name:word}", "{a:/[0-9]+/}", "/etc/passwd", "high",
    "https://evil.example/x.png", "data:image/png;base64,AAAA", "{{ 7 * 7 }}", "[a-z]{2}", "(",
    "noul", "choice", "score", "enabled", "disabled", "tool_use", "tool_result", "1:2", "pin",
    "<|current_file_content|>\n<|code_to_edit|>\na\n<|cursor|>\n<|/code_to_edit|>\n"
    "<|/current_file_content|>", "<|original_code|>a<|/original_code|>", "é\u0301", "a" * 300,
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

_SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Bergen"]}, "sure": {"type": "boolean"}},
    "required": ["city"],
    "additionalProperties": False,
}
_TOOL = {"name": "look", "description": "Looks.", "parameters": _SCHEMA}
_TOOLS = [{"type": "function", "function": _TOOL}]
_CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
_OWN_CALL = {"function": {"name": "look", "arguments": {}}}
_HI = [{"role": "user", "content": "hi"}]
WHOLE: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": _HI, "tools": _TOOLS, "tool_choice": "required", "stream": True, "n": 2,
         "max_tokens": 48},
        {"messages": _HI, "tools": _TOOLS, "max_tokens": 48,
         "tool_choice": {"type": "function", "function": {"name": "look"}}},
        {"messages": [*_HI, {"role": "assistant", "tool_calls": [_CALL]},
                      {"role": "tool", "tool_call_id": "a", "content": "5"}],
         "tools": _TOOLS, "max_tokens": 8, "reasoning_effort": "high", "n": 2},
        {"messages": [{"role": "system", "content": [{"type": "text", "text": "be kind"}]}, *_HI],
         "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 8, "seed": 1,
         "logprobs": True, "top_logprobs": 1, "diffusion_frames": True, "stop": ["a", "b"]},
        {"messages": _HI, "response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": _SCHEMA, "strict": True}}, "temperature": 0.0, "max_tokens": 48},
        {"messages": _HI, "response_format": {"type": "regex", "pattern": "[0-9]{2,3}"}},
    ],
    "/v1/completions": [
        {"prompt": ["a", "b"], "max_tokens": 8, "n": 2, "stream": True, "echo": True},
        {"prompt": [9, 10, 11], "max_tokens": 8, "logprobs": 1, "seed": 3},
        {"prompt": "a", "suffix": "b", "max_tokens": 4, "stop": "c"},
    ],
    "/v1/fim/completions": [{"prompt": "a", "suffix": "b", "max_tokens": 4, "stream": True}],
    "/v1/messages": [
        {"model": "tiny", "max_tokens": 48, "messages": _HI, "stream": True, "system": "be kind",
         "tools": [{"name": "look", "input_schema": _SCHEMA}], "tool_choice": {"type": "any"}},
        {"model": "tiny", "max_tokens": 8, "thinking": {"type": "enabled", "budget_tokens": 4},
         "messages": [*_HI, {"role": "assistant", "content": [
             {"type": "thinking", "thinking": "well", "signature": "s"},
             {"type": "tool_use", "id": "a", "name": "look", "input": {}}]},
             {"role": "user", "content": [
                 {"type": "tool_result", "tool_use_id": "a", "is_error": True, "content": "no"},
                 {"type": "text", "text": "so?"}]}]},
        {"model": "tiny", "max_tokens": 8, "stop_sequences": ["a"], "messages": [
            *_HI, {"role": "assistant", "content": "well,"}]},
    ],
    "/api/chat": [
        {"model": "tiny", "messages": [*_HI, {"role": "assistant", "tool_calls": [_OWN_CALL]},
                                       {"role": "tool", "tool_name": "look", "content": "5"}],
         "tools": _TOOLS, "options": {"num_predict": 8, "seed": 1, "stop": ["a"]}, "think": True},
        {"model": "tiny", "messages": _HI, "format": _SCHEMA, "stream": False,
         "options": {"temperature": 0.5, "num_predict": 48}},
    ],
    "/api/generate": [
        {"model": "tiny", "prompt": "a", "suffix": "b", "options": {"num_predict": 4}},
        {"model": "tiny", "prompt": "a", "raw": True, "options": {"num_predict": 8}},
    ],
    "/v1/edit/completions": [
        {"model": "tiny", "messages": [{"role": "user", "content": next(
            each for each in SPELLED if "code_to_edit" in each)}], "max_tokens": 8},
    ],
    "/v1/apply/completions": [
        {"model": "tiny", "max_tokens": 8, "messages": [{"role": "user", "content":
         "<|original_code|>a<|/original_code|><|update_snippet|>b<|/update_snippet|>"}]},
    ],
    "/v1/infill": [{"text": "a [[?]] b [[?]]", "lengths": [2, 4], "prompt": "x", "seed": 1}],
    "/v1/fill": [{"template": "{a:word} and {b:yes|no} {c:/[0-9]{2}/}", "prompt": "x"}],
    "/v1/edit": [{"text": "a\nb\nc\n", "instruction": "x", "lines": [2, 2], "strength": 0.5}],
    "/v1/canvas": [
        {"messages": _HI, "stream": True, "pins": {"3": 9}, "diffusion_max_steps": 3, "changes": [
            {"after": 1, "pins": {"3": None}, "noise": {"start": 1, "stop": 9, "strength": 0.5},
             "seed": 8, "step": 2}]},
        {"prompt": "hi", "diffusion_read_only": True, "top": 3, "logprob_token_ids": [9, 10]},
        {"prompt": "hi", "diffusion_seed_canvas": [9] * 24, "diffusion_pinned": [1, 2],
         "diffusion_constrained": True, "logprob_token_ids": [9, 10], "canvas_index": 1},
    ],
    "/v1/canvas/alternatives": [{"prompt": "hi", "step": 2, "position": 3, "top": 3}],
    "/v1/systemone": [
        {"model": "tiny", "state": {"a": 1}, "draws": 2, "rotate": True, "questions": {
            "b": {"type": "choice", "instructions": "?", "criteria": {"x": None, "y": "why"}},
            "c": {"type": "score", "criteria": ["low", "high"]}}},
    ],
    "/v1/page/canvases": [
        {"prompt": "hi", "steps": 3, "run": 1, "pins": {"2": 9}, "seed": 1},
        {"prompt": "hi", "ids": [9] * 24, "strength": 0.5, "run": 2},
    ],
    "/v1/page/canvases/{canvas}": [
        {"run": 1, "at": 0, "strength": 0.5, "changes": [
            {"kind": "pin", "place": 1, "text": "hi"}, {"kind": "free", "place": 1, "count": 2},
            {"kind": "renoise", "place": 4, "count": 9, "strength": 0.5}]},
        {"run": 2, "changes": [{"kind": "pin", "place": 3, "token": 9}]},
    ],
    "/v1/page/canvases/{canvas}/alternatives": [{"place": 1, "at": 0}],
    "/v1/page/chat": [{"messages": _HI, "max_tokens": 8, "prefill": "a", "steps": 2, "seed": 1}],
    "/v1/page/rewrite": [{"text": "a\nb\nc\n", "first": 2, "last": 2, "strength": 0.5}],
    "/v1/page/hole": [{"left": "a", "right": "b", "tokens": 4, "prompt": "x"}],
    "/v1/page/template": [{"template": "{a:word} {b:yes|no}", "keep": {"b": "no"}}],
}  # fmt: skip
"""Requests that are answered, by their route; where there is none, `USUAL` is all there is."""
for _like, _path in {
    "/v1/messages/count_tokens": "/v1/messages",
    "/v1/decisions": "/v1/systemone",
}.items():
    WHOLE[_like] = WHOLE[_path]


@cache
def fields_of(module: str) -> dict[str, str]:
    """The names that a module, and those of the room that it reads fields by, give to fields, and
    how each is read ("" where that is unknown)."""
    tree = _tree(module)
    found: dict[str, str] = {}
    for node in tree.body:  # tables of the module
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            for each in ast.walk(node.value):
                name = _name_in(each)
                if name:
                    found.setdefault(name, "")
    readers = _readers_of(tree)
    if "knobs" in readers:
        found |= {f"diffusion_{name}": "integer" for name in settings_of(DiffusionConfig)}
    for read in (tree, *map(_tree, readers)):
        for node in ast.walk(read):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                name = _name_in(node.args[0])
                if node.func.attr in READERS and name:
                    found[name] = node.func.attr
    return found


def _tree(module: str) -> ast.Module:
    return ast.parse((Path(room.__file__).parent / f"{module}.py").read_text())


def _readers_of(tree: ast.Module) -> list[str]:
    """The modules of the room that a module imports and that read fields themselves."""
    found = {"fields"}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(room.__name__):
            below = (node.module or "").removeprefix(room.__name__).lstrip(".")
            found |= {below} if below else {each.name for each in node.names}
    return sorted(
        each
        for each in found - {"fields"}
        if "mlx_diffgemma.server.fields"
        in {node.module for node in _tree(each).body if isinstance(node, ast.ImportFrom)}
    )


def _name_in(node: ast.AST) -> str | None:
    """The name of a field that a node of the source spells, if it spells one."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return None
    return node.value if node.value.isidentifier() and len(node.value) < 40 else None


class Bodies:
    """Requests for a route: most of them nearly right, some broken as JSON.

    Args:
        module: the module that the route is of.
        path: the route's path, as the module spells it.
        random: where every choice comes from.
    """

    def __init__(self, module: str, path: str, random: Random) -> None:
        self._fields, self._random = fields_of(module), random
        self._names = sorted(self._fields)
        self._whole = WHOLE.get(path, [])

    def body(self) -> bytes:
        """One request."""
        kind = self._random.random()
        if kind < 0.1:
            return _encoded(self._junk())
        value = self._mutated() if self._whole and kind < 0.5 else self._made()
        body = _encoded(value)
        return self._broken(body) if kind > 0.9 else body

    def _made(self) -> dict[str, Any]:
        """What is usual, without some of it, and with some fields of the module."""
        missing = set(self._some(sorted(USUAL), 4))
        usual = {name: value for name, value in USUAL.items() if name not in missing}
        return usual | self._object(2)

    def _mutated(self) -> Any:
        """A request that is whole but for a part or three."""
        value: Any = copy.deepcopy(self._random.choice(self._whole))
        for _ in range(self._random.choice((0, 1, 1, 1, 2, 3))):
            place = self._random.choice(_places(value))
            value = self._changed(value, place)
        return value

    def _changed(self, whole: Any, place: tuple[Any, ...]) -> Any:
        """The value with something else at one place of it."""
        if not place:
            return {**whole, **self._object(1)} if isinstance(whole, dict) else self._junk()
        holder = whole
        for key in place[:-1]:
            holder = holder[key]
        key, old = place[-1], holder[place[-1]]
        how = self._random.randrange(6)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(old, dict):
            old |= self._object(1)
        elif how == 1 and isinstance(old, list):
            holder[key] = old * self._random.choice((0, 2, 3))
        elif how == 2:
            holder[key] = self._random.choice(([old], {"text": old}, str(old), None))
        elif how == 3:  # what stands elsewhere in it
            other: Any = whole
            for step in self._random.choice(_places(whole)):
                other = other[step]
            holder[key] = copy.deepcopy(other)
        elif how == 4 and isinstance(key, str) and isinstance(holder, dict):
            holder[self._random.choice((*self._names, *SPELLED))] = holder.pop(key)
        elif isinstance(old, (int, float)):
            holder[key] = self._random.choice(NUMBERS)
        elif isinstance(old, str):
            holder[key] = self._random.choice(SPELLED)
        else:
            holder[key] = self._junk()
        return whole

    def _object(self, deep: int) -> dict[str, Any]:
        """An object with some of the fields, each mostly of the kind that is read."""
        return {name: self._value(name, deep) for name in self._some(self._names, 5)}

    def _value(self, name: str, deep: int) -> Any:
        kind = self._random.random()
        if kind < 0.25:
            return self._junk()
        if name in USUAL and kind < 0.75:
            return USUAL[name]
        made: dict[str, Any] = {
            "text": lambda: self._random.choice(SPELLED),
            "choice": lambda: self._random.choice(SPELLED),
            "flag": lambda: self._random.random() < 0.5,
            "integer": lambda: self._random.choice(NUMBERS[:8]),
            "number": lambda: self._random.choice(NUMBERS),
            "texts": lambda: self._some(SPELLED, 3),
            "objects": lambda: [self._inner(deep) for _ in range(self._random.randrange(4))],
            "within": lambda: self._inner(deep),
            "mapping": lambda: self._inner(deep),
        }
        return made.get(self._fields[name], self._junk)()

    def _inner(self, deep: int) -> dict[str, Any]:
        return self._object(deep - 1) if deep else {}

    def _junk(self, deep: int = 3) -> Any:
        kind = self._random.randrange(9 if deep else 7)
        if kind == 7:
            return [self._junk(deep - 1) for _ in range(self._random.randrange(4))]
        if kind == 8:
            return {key: self._junk(deep - 1) for key in self._some(SPELLED, 3)}
        return (
            lambda: None,
            lambda: self._random.random() < 0.5,
            lambda: self._random.choice(NUMBERS),
            lambda: self._random.choice(SPELLED),
            lambda: self._random.randint(-3, 12),
            lambda: self._random.choice((-1, 1)) * 10.0 ** self._random.uniform(-300, 300),
            self._text,
        )[kind]()

    def _text(self) -> str:
        """Up to twelve characters, from the whole of Unicode."""
        codes = (self._random.randrange(0x110000) >> self._random.randrange(14) for _ in range(12))
        kept = [chr(code) for code in codes if not 0xD800 <= code < 0xE000]
        return "".join(kept[: self._random.randrange(13)])

    def _some(self, among: list[str], most: int) -> list[str]:
        """Up to `most` of some texts, each once."""
        return self._random.sample(among, self._random.randrange(min(most, len(among)) + 1))

    def _broken(self, body: bytes) -> bytes:
        """A body that is cut, or has some bytes in the place of others, or some many times."""
        start = self._random.randrange(min(200, len(body)) + 1)
        length = self._random.randrange(41)
        put = self._random.randbytes(self._random.randrange(7))
        if self._random.random() < 0.2:
            put = body[start : start + length] * self._random.randrange(100)
        return body[:start] + put + body[start + length :]


def _places(value: Any, own: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys that lead to each part of a value, and to the value itself."""
    found = [own]
    if isinstance(value, (dict, list)):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            found += _places(each, (*own, key))
    return found


def _encoded(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")

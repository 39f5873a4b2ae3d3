"""Mercury's API for editors: the next edit of a region, and an update merged into code."""

from __future__ import annotations

import re
import time
import uuid
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlx_diffgemma.server import asking
from mlx_diffgemma.server.fields import Fields
from mlx_diffgemma.server.knobs import ELSEWHERE, knobs
from mlx_diffgemma.server.openai import HARMLESS, error
from mlx_diffgemma.server.pieces import Asked, Ended, Text
from mlx_diffgemma.server.refusals import RefusedError
from mlx_diffgemma.server.streams import read_json

if TYPE_CHECKING:
    from mlx_diffgemma.server.app import Server

__all__ = ["error", "routes"]

NO_EDIT = "None"
"""The answer that says that nothing is to be changed."""
REFUSED = {
    **ELSEWHERE,
    "stream": "is not possible here; leave it out.",
    "tools": "are not called here; leave them out.",
}
_FENCE = "```"
_FENCED = re.compile(r"^```[^\n`]*\n(.*?)^```\s*$", re.DOTALL | re.MULTILINE)
_EDIT = """\
A developer edits {file}. Below are snippets that were read lately, the latest changes, and the \
file as it is now; the cursor is in the part that may change. Go on with what the developer is \
about: write the whole file with that part as it should be next, and nothing else.

Snippets:
{snippets}

Changes:
{history}

File:
{before}{region}{after}"""
_APPLY = """\
Merge the update into the code. The update may leave out parts of the code that stay as they are. \
Write the whole code with the update in it, in one fence of three backticks, and nothing else.

Code:
```
{code}
```

Update:
```
{update}
```"""


@dataclass(frozen=True)
class Region:
    """A region of a file that an editor wants changed.

    Attributes:
        before, after: text of the file around the region.
        text: present text of the region.
        snippets: code that was viewed recently.
        history: latest changes, as a diff.
        file: path of the file, or "a file".
    """

    before: str
    text: str
    after: str
    snippets: str
    history: str
    file: str


def routes(server: Server) -> list[Route]:
    """The routes of this protocol."""

    async def edit(request: Request) -> Response:
        fields = Fields(await read_json(request))
        region = read_region(_message(fields))
        instruction = _EDIT.format(
            file=region.file,
            snippets=region.snippets.strip() or "(none)",
            history=region.history.strip() or "(none)",
            before=region.before,
            region=region.text,
            after=region.after,
        )
        asked = Asked(
            prompt=region.before,
            suffix=region.after,
            present=region.text,
            instruction=instruction,
            **_common(fields),
        )
        text, end = await _written(server, fields, asked)
        whole = NO_EDIT if text == region.text else f"{_FENCE}\n{text}\n{_FENCE}"
        return _answer(server, "edit", whole, end, fields)

    async def apply(request: Request) -> Response:
        fields = Fields(await read_json(request))
        message = _message(fields)
        code, update = _section(message, "original_code"), _section(message, "update_snippet")
        told = _APPLY.format(code=_inner(code), update=_inner(update))
        asked = Asked(messages=[{"role": "user", "content": told}], **_common(fields))
        text, end = await _written(server, fields, asked)
        fenced = _FENCED.search(text)
        return _answer(server, "apply", fenced[1] if fenced else text, end, fields)

    return [
        Route("/v1/edit/completions", edit, methods=["POST"]),
        Route("/v1/apply/completions", apply, methods=["POST"]),
    ]


def read_region(message: str) -> Region:
    """The region that a message in Mercury's form asks to edit. Where the region is not marked in
    the file itself, its text is looked for there.

    Raises:
        RefusedError: a section is missing.
    """
    region = _section(message, "code_to_edit")
    inside = re.compile(r"<\|code_to_edit\|>.*<\|/code_to_edit\|>", re.DOTALL)
    file = _section(message, "current_file_content", required=False)
    present = _without_cursor(_inner(region))
    name = "a file"
    found = re.match(r"\n?current_file_path: ([^\n]*)\n", file)
    if found:
        name, file = found[1].strip() or name, file[found.end() :]
    if inside.search(file):
        before, after = inside.split(file, maxsplit=1)
        # The newlines inside the marks belong to the marks.
        before = before.removeprefix("\n") if not found else before
    else:
        whole = _without_cursor(_inner(file))
        place = whole.find(present) if present else -1
        before, after = ("", "") if place < 0 else (whole[:place], whole[place + len(present) :])
    return Region(
        _without_cursor(before),
        present,
        _without_cursor(after),
        _section(message, "recently_viewed_code_snippets", required=False),
        _section(message, "edit_diff_history", required=False),
        name,
    )


def _section(message: str, name: str, *, required: bool = True) -> str:
    """What stands between two marks, or from a mark to the next where it is not closed."""
    opened = f"<|{name}|>"
    _, found, rest = message.partition(opened)
    if not found:
        if required:
            raise RefusedError(400, f"messages.0.content has no {opened}.", "messages.0.content")
        return ""
    return rest.partition(f"<|/{name}|>")[0]


def _inner(text: str) -> str:
    """A section without the newlines that only part it from its marks."""
    return text.removeprefix("\n").removesuffix("\n")


def _without_cursor(text: str) -> str:
    return text.replace("<|cursor|>", "")


def _message(fields: Fields) -> str:
    messages = fields.objects("messages", required=True)
    if len(messages) != 1:
        raise fields.refused("messages", "must hold one message of the user.")
    messages[0].choice("role", ["user"], required=True)
    text = messages[0].text("content", required=True)
    messages[0].settle({})
    return str(text)


def _common(fields: Fields) -> dict[str, Any]:
    fields.text("model")
    return {
        "max_tokens": fields.integer("max_tokens", 1),
        "temperature": fields.number("temperature", 0.0),
        "seed": fields.integer("seed", 0),
        "stop": tuple(text for text in fields.texts("stop") if text),
        **knobs(fields),
    }


async def _written(server: Server, fields: Fields, asked: Asked) -> tuple[str, Ended]:
    fields.settle(REFUSED, HARMLESS)
    text, end = "", None
    async with aclosing(asking.answer(server.engine, asked)) as pieces:
        async for piece in pieces:
            if isinstance(piece, Text):
                text += piece.text
            elif isinstance(piece, Ended):
                end = piece
    assert end is not None
    return text, end


def _answer(server: Server, kind: str, text: str, end: Ended, fields: Fields) -> Response:
    message = {"role": "assistant", "content": text}
    told = {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": f"{kind}.completion",
        "created": int(time.time()),
        "model": server.engine.name,
        "choices": [{"index": 0, "message": message, "finish_reason": end.reason}],
        "usage": {
            "prompt_tokens": end.prompt_tokens,
            "completion_tokens": end.completion_tokens,
            "total_tokens": end.prompt_tokens + end.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
        },
    }
    return JSONResponse(told, headers=fields.headers())

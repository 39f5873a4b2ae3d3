"""Ollama's API: `/api/chat`, `/api/generate`, and what tells of the model."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlx_diffgemma.server import asking
from mlx_diffgemma.server.fields import Fields
from mlx_diffgemma.server.images import See, from_base64
from mlx_diffgemma.server.knobs import ELSEWHERE, knobs
from mlx_diffgemma.server.ollama_replies import Reply, listed, now, shown, tagged
from mlx_diffgemma.server.pieces import Asked, Piece
from mlx_diffgemma.server.refusals import RefusedError
from mlx_diffgemma.server.streams import json_lines, read_json

if TYPE_CHECKING:
    from mlx_diffgemma.server.app import Server
    from mlx_diffgemma.server.engine import Engine

VERSION = "0.30.0"
"""The version of Ollama whose API this is, for clients that demand a least version."""
HARMLESS = ("keep_alive", "truncate", "shift")
"""Fields of a request that change nothing here: one model is kept, and no prompt is cut."""
HARMLESS_OPTIONS = (
    "frequency_penalty", "f16_kv", "logits_all", "low_vram", "main_gpu", "min_p", "mirostat",
    "mirostat_eta", "mirostat_tau", "num_batch", "num_ctx", "num_gpu", "num_keep", "num_thread",
    "numa", "penalize_newline", "presence_penalty", "repeat_last_n", "repeat_penalty", "tfs_z",
    "top_k", "top_p", "typical_p", "use_mlock", "use_mmap", "vocab_only",
)  # fmt: skip
"""Options of other samplers and of other machines, which change nothing here."""
REFUSED = {
    **ELSEWHERE,
    "context": "holds a conversation of Ollama's own; send its messages to /api/chat.",
    "height": "is for models that make images; leave it out.",
    "steps": "is for models that make images; give diffusion settings in options.",
    "template": "is a chat template, and the checkpoint's own is used; leave it out.",
    "top_logprobs": "asks for alternatives, and only the tokens that were written are known.",
    "width": "is for models that make images; leave it out.",
}
UNSUPPORTED = {
    "/api/embed": "embeddings are not made here",
    "/api/embeddings": "embeddings are not made here",
    "/api/pull": "models are not fetched here; start the server with --model",
    "/api/push": "models are not published here",
    "/api/create": "models are not made here; see mlx-diffgemma convert",
    "/api/copy": "models have one name here",
    "/api/delete": "models are not deleted here",
    "/api/blobs/{digest}": "no files are kept here",
}
"""Routes that are answered by an error that says why."""

_FOREVER = "2318-01-01T00:00:00Z"  # what Ollama says of a model that it keeps for good
_LEVELS = ("low", "medium", "high", "max")


def routes(server: Server) -> list[Route]:
    """The routes of this protocol."""
    since = now()

    async def version(request: Request) -> Response:
        return JSONResponse({"version": VERSION})

    async def tags(request: Request) -> Response:
        return JSONResponse({"models": [listed(server.engine, since)]})

    async def ps(request: Request) -> Response:
        found = listed(server.engine, since)
        running = {"expires_at": _FOREVER, "size_vram": found["size"]}
        del found["modified_at"]
        return JSONResponse(
            {"models": [{**found, **running, "context_length": server.engine.context}]}
        )

    async def show(request: Request) -> Response:
        fields = Fields(await read_json(request))
        _check_model(fields, server.engine)
        return JSONResponse(shown(server.engine, since))

    async def chat(request: Request) -> Response:
        return await answered(Fields(await read_json(request)), chat=True)

    async def generate(request: Request) -> Response:
        return await answered(Fields(await read_json(request)), chat=False)

    async def answered(fields: Fields, *, chat: bool) -> Response:
        reply = Reply(_check_model(fields, server.engine), chat=chat)
        see = partial(from_base64, server.engine, server.settings.max_image)
        asked = (_chat if chat else _generate)(fields, see)
        streamed = fields.flag("stream", default=True)
        fields.settle(REFUSED, HARMLESS)
        headers = fields.headers()
        if asked is None:
            last = reply.loaded(fields.data.get("keep_alive"))
            return JSONResponse(last, headers=headers)
        pieces = asking.answer(server.engine, asked)
        if streamed:
            silence = json.dumps(reply.line("", done=False)).encode() + b"\n"
            return json_lines(_lines(pieces, reply), keep_alive=silence, headers=headers)
        whole = [line async for line in _lines(pieces, reply)]
        return JSONResponse(reply.whole(whole), headers=headers)

    def unsupported(why: str) -> Callable[[Request], Awaitable[Response]]:
        async def refused(request: Request) -> Response:
            raise RefusedError(400, f"{why}.")

        return refused

    return [
        Route("/api/version", version),
        Route("/api/tags", tags),
        Route("/api/ps", ps),
        Route("/api/show", show, methods=["POST"]),
        Route("/api/chat", chat, methods=["POST"]),
        Route("/api/generate", generate, methods=["POST"]),
        *(
            Route(path, unsupported(why), methods=["GET", "POST", "DELETE"])
            for path, why in UNSUPPORTED.items()
        ),
    ]


def error(status: int, message: str, param: str | None) -> Response:
    """An error as this protocol has it."""
    return JSONResponse({"error": message}, status)


# These functions turn a request into what is asked.


def _check_model(fields: Fields, engine: Engine) -> str:
    """The name of the model as the client writes it.

    Raises:
        RefusedError: it is missing (400), or this server runs another model (404).
    """
    name = fields.text("model") or fields.text("name")
    if not name:
        raise fields.refused("model", "is missing.")
    if tagged(name).casefold() != tagged(engine.name).casefold():
        raise RefusedError(
            404, f"model '{name:.80}' not found; this server runs {engine.name}.", "model"
        )
    return name


def _chat(fields: Fields, see: See) -> Asked | None:
    """What a chat asks for; None where it only wants the model to be loaded."""
    messages = [_message(message, see) for message in fields.objects("messages")]
    tools = [_tool(tool) for tool in fields.objects("tools")]
    common = _common(fields)
    if not messages:
        return None
    prefill = None
    if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        prefill = messages.pop()["content"] or None
        if not messages:
            raise fields.refused("messages", "holds no message of a user.")
    return Asked(messages=messages, prefill=prefill, tools=tools or None, **common)


def _message(message: Fields, see: See) -> dict[str, Any]:
    """A message in the library's form."""
    role = str(message.choice("role", ("user", "assistant", "system", "tool"), required=True))
    read: dict[str, Any] = {
        "role": role,
        "content": _shown(message, message.text("content") or "", see),
        "reasoning_content": message.text("thinking"),
        "name": message.text("tool_name"),
        "tool_call_id": message.text("tool_call_id"),
    }
    calls = []
    for call in message.objects("tool_calls"):
        function = call.within("function", required=True)
        assert function is not None
        arguments = function.mapping("arguments") or {}
        own = {"name": function.text("name", required=True), "arguments": arguments}
        calls.append({"id": call.text("id"), "type": "function", "function": own})
        call.settle({}, ["type"])
        function.settle({}, ["index"])
    message.settle({})
    if calls:
        read["tool_calls"] = [{k: v for k, v in call.items() if v is not None} for call in calls]
    return {key: value for key, value in read.items() if value is not None}


def _shown(fields: Fields, text: str, see: See) -> str | list[dict[str, Any]]:
    """The content of a message: the pictures of its `images`, then its text."""
    where = fields.name("images")
    images = [see(each, f"{where}.{n}") for n, each in enumerate(fields.texts("images"))]
    return [*images, {"type": "text", "text": text}] if images else text


def _tool(tool: Fields) -> dict[str, Any]:
    function = tool.within("function", required=True)
    assert function is not None
    described = {
        "name": function.text("name", required=True),
        "description": function.text("description") or "",
        "parameters": function.mapping("parameters") or {"type": "object"},
    }
    function.settle({})
    tool.settle({}, ["type"])
    return {"type": "function", "function": described}


def _generate(fields: Fields, see: See) -> Asked | None:
    """What a completion asks for; None where it only wants the model to be loaded."""
    prompt, suffix = fields.text("prompt") or "", fields.text("suffix") or None
    system, raw = fields.text("system") or None, fields.flag("raw")
    common = _common(fields)
    if suffix is None and not prompt:
        return None
    content = _shown(fields, prompt, see)
    if raw or suffix is not None:
        if content is not prompt:
            raise fields.refused("images", "need a chat; leave out raw and suffix, or images.")
        if system is not None:
            raise fields.refused("system", "needs a chat; leave out raw and suffix, or system.")
        if common["thinking"]:
            raise fields.refused("think", "needs a chat; leave out raw and suffix, or think.")
        return Asked(prompt=prompt, suffix=suffix, **common)
    return Asked(messages=[{"role": "user", "content": content}], system=system, **common)


def _common(fields: Fields) -> dict[str, Any]:
    options = fields.within("options") or Fields({}, "options")
    length = options.integer("num_predict", -2)
    if length == 0:
        raise options.refused("num_predict", "must be at least 1, or -1 for no bound; not 0.")
    seed = options.integer("seed", -1)
    common = {
        "json_schema": _format(fields),
        "max_tokens": None if length is None or length < 0 else length,
        "temperature": options.number("temperature", 0.0),
        "seed": None if seed is None or seed < 0 else seed,
        "stop": options.texts("stop"),
        "thinking": _thinking(fields),
        "logprobs": fields.flag("logprobs"),
        **knobs(options),
    }
    options.settle(ELSEWHERE, HARMLESS_OPTIONS)
    return common


def _format(fields: Fields) -> dict[str, Any] | bool | None:
    form = fields.get("format")
    if form in (None, ""):
        return None
    if form == "json":
        return True
    if not isinstance(form, Mapping):
        raise fields.refused("format", "must be 'json' or a JSON schema.")
    return dict(form)


def _thinking(fields: Fields) -> bool | None:
    think = fields.get("think")
    if think in _LEVELS:
        return True
    if think is not None and not isinstance(think, bool):
        raise fields.refused("think", f"must be true, false, or one of {', '.join(_LEVELS)}.")
    return think


async def _lines(
    pieces: AsyncGenerator[Piece, None], reply: Reply
) -> AsyncIterator[dict[str, Any]]:
    async with aclosing(pieces) as open_pieces:
        async for piece in open_pieces:
            line = reply.add(piece)
            if line is not None:
                yield line

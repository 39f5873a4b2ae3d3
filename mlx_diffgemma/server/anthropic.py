"""Anthropic's Messages API: `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlx_diffgemma.server import asking
from mlx_diffgemma.server.anthropic_replies import Reply
from mlx_diffgemma.server.fields import Fields
from mlx_diffgemma.server.images import See, from_base64
from mlx_diffgemma.server.knobs import ELSEWHERE, knobs
from mlx_diffgemma.server.pieces import Asked, Piece
from mlx_diffgemma.server.refusals import RefusedError
from mlx_diffgemma.server.streams import named, read_json, sse

if TYPE_CHECKING:
    from mlx_diffgemma.server.app import Server

HARMLESS = (
    "betas", "cache_control", "context_management", "diagnostics", "inference_geo", "metadata",
    "service_tier", "speed", "user_profile_id", "workspace_id",
)  # fmt: skip
"""Fields of a request that change nothing here, since they are about where it runs, what it costs
and what is cached."""
REFUSED = {
    **ELSEWHERE,
    "container": "names a container, and this server runs none; leave it out.",
    "mcp_servers": "names servers of tools, and this server calls none; leave it out.",
}
_HARMLESS_IN_BLOCKS = ("cache_control", "citations", "caller", "toolset_name", "transformations")
_HARMLESS_IN_TOOLS = (
    "allowed_callers", "cache_control", "defer_loading", "eager_input_streaming", "input_examples",
    "strict",
)  # fmt: skip
_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error",
}  # fmt: skip
_PING = named("ping", {"type": "ping"})


def routes(server: Server) -> list[Route]:
    """The routes of this protocol."""

    def read(fields: Fields) -> tuple[Asked, Reply]:
        see = partial(from_base64, server.engine, server.settings.max_image)
        return _request(fields, server.engine.name, see)

    async def messages(request: Request) -> Response:
        fields = Fields(await read_json(request))
        asked, reply = read(fields)
        headers = {"request-id": request.scope.get("request_id", ""), **fields.headers()}
        if fields.flag("stream"):
            events = _events(asking.answer(server.engine, asked), reply)
            return sse(events, keep_alive=_PING, failed=_failed, headers=headers)
        async with aclosing(asking.answer(server.engine, asked)) as pieces:
            async for piece in pieces:
                reply.add(piece)
        return JSONResponse(reply.message, headers=headers)

    async def count_tokens(request: Request) -> Response:
        fields = Fields({"max_tokens": 1, **await read_json(request)})
        asked, _ = read(fields)
        count = await asking.count_tokens(server.engine, asked)
        return JSONResponse({"input_tokens": count}, headers=fields.headers())

    return [
        Route("/v1/messages", messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
    ]


def error(status: int, message: str, param: str | None) -> Response:
    """An error as this protocol has it."""
    return JSONResponse(_error(status, message), status)


def _error(status: int, message: str) -> dict[str, Any]:
    kind = _KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def _failed(error: RefusedError) -> bytes:
    return named("error", _error(error.status, error.message))


# These functions turn a request into what is asked.


def _request(fields: Fields, model: str, see: See) -> tuple[Asked, Reply]:
    fields.text("model", required=True)
    fields.flag("stream")
    thinking, shown = _thinking(fields)
    choice, single = _tool_choice(fields)
    messages, prefill = _messages(fields, see)
    asked = Asked(
        messages=messages,
        prefill=prefill,
        system=_system(fields),
        tools=_tools(fields),
        tool_choice=choice,
        json_schema=_schema(fields),
        max_tokens=fields.integer("max_tokens", 1, required=True),
        temperature=fields.number("temperature", 0.0),
        seed=fields.integer("seed", 0),
        stop=fields.texts("stop_sequences"),
        thinking=thinking,
        **knobs(fields),
    )
    fields.settle(REFUSED, HARMLESS)
    return asked, Reply(model, shows_thoughts=shown, single=single)


def _thinking(fields: Fields) -> tuple[bool | None, bool]:
    """Whether to think, and whether to show the thought."""
    thinking = fields.within("thinking")
    if thinking is None:
        return None, True
    kinds = {"enabled": True, "disabled": False, "adaptive": None, "between_tools": None}
    kind = thinking.choice("type", kinds, required=True)
    display = thinking.choice("display", ("summarized", "omitted"))
    thinking.settle({}, ["budget_tokens"])
    return kinds[str(kind)], display != "omitted"


def _tool_choice(fields: Fields) -> tuple[str | None, bool]:
    """Which tools may be called, and whether at most one call is wanted."""
    choice = fields.within("tool_choice")
    if choice is None:
        return None, False
    kind = choice.choice("type", ("auto", "any", "tool", "none"), required=True)
    single = choice.flag("disable_parallel_tool_use")
    name = choice.text("name", required=kind == "tool")
    choice.settle({})
    return (name if kind == "tool" else "required" if kind == "any" else kind), single


def _tools(fields: Fields) -> list[dict[str, Any]] | None:
    tools = []
    for tool in fields.objects("tools"):
        kind = tool.text("type")
        if kind not in (None, "custom"):
            raise tool.refused(
                "type",
                f"'{kind:.40}' is a tool that only Anthropic's own models and servers know; "
                "describe it by a name and an input_schema.",
            )
        function = {
            "name": tool.text("name", required=True),
            "description": tool.text("description") or "",
            "parameters": tool.mapping("input_schema", required=True),
        }
        tools.append({"type": "function", "function": function})
        tool.settle({}, _HARMLESS_IN_TOOLS)
    return tools or None


def _schema(fields: Fields) -> dict[str, Any] | None:
    """The JSON schema of the answer: from `output_format`, its former field, or from
    `output_config`."""
    config = fields.within("output_config")
    wanted = [fields.within("output_format"), config and config.within("format")]
    if config:
        config.settle({}, ["effort"])
    for form in wanted:
        if form:
            form.choice("type", ["json_schema"], required=True)
            return form.mapping("schema", required=True)
    return None


def _system(fields: Fields) -> str | None:
    if not isinstance(fields.data.get("system"), list):
        return fields.text("system") or None
    blocks = fields.objects("system")
    for block in blocks:
        block.choice("type", ["text"], required=True)
    return "\n".join(map(_text, blocks)) or None


def _messages(fields: Fields, see: See) -> tuple[list[dict[str, Any]], str | None]:
    """The conversation in the library's form, and how the answer begins."""
    messages: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    given = fields.objects("messages", required=True)
    for message in given:
        role = message.choice("role", ("user", "assistant", "system"), required=True)
        read = _turn(message, str(role), names, see)
        message.settle({})
        if read and messages and _joins(messages[-1], read[0]):
            messages[-1] = _joined(messages[-1], read.pop(0))
        messages += read
    if not messages:
        raise fields.refused("messages", "is empty; give at least one message.")
    if messages[-1]["role"] != "assistant":
        return messages, None
    last, own = messages.pop(), given[-1]
    if last.get("tool_calls"):
        raise own.refused("content", "ends with a call of a tool; give the tool's result.")
    prefill = str(last.get("content") or "")
    if not prefill.strip():
        raise own.refused("content", "is the beginning of the answer, and blank; leave it out.")
    if not messages:
        raise fields.refused("messages", "holds no message of a user.")
    return messages, prefill


def _joins(before: Mapping[str, Any], message: Mapping[str, Any]) -> bool:
    """Whether two messages are one turn."""
    return before["role"] == message["role"] and message["role"] in ("user", "assistant")


def _joined(before: dict[str, Any], message: dict[str, Any]) -> dict[str, Any]:
    parts = [part for each in (before, message) for part in _parts(each.get("content", ""))]
    both = {**before, **message, "content": _content(parts)}
    thoughts = [
        each["reasoning_content"] for each in (before, message) if each.get("reasoning_content")
    ]
    calls = [*before.get("tool_calls", ()), *message.get("tool_calls", ())]
    both |= {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
    return both | ({"tool_calls": calls} if calls else {})


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content}] if content else []


def _content(parts: Sequence[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """The parts of a message, as one text where they are texts."""
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return list(parts)


def _turn(message: Fields, role: str, names: dict[str, str], see: See) -> list[dict[str, Any]]:
    """One message in the library's form, as several where it holds results of tools, which come
    first. `names` holds the names of calls by their ids, and takes in those of this message."""
    if isinstance(message.data.get("content"), str):
        return [{"role": role, "content": message.text("content")}]
    parts: list[dict[str, Any]] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for block in message.objects("content", required=True):
        kind = block.text("type", required=True)
        if kind == "tool_use" and role == "assistant":
            id = str(block.text("id", required=True))
            name = names[id] = str(block.text("name", required=True))
            arguments = block.mapping("input", required=True)
            call = {"name": name, "arguments": arguments}
            calls.append({"id": id, "type": "function", "function": call})
        elif kind == "tool_result" and role == "user":
            id = str(block.text("tool_use_id", required=True))
            if id not in names:
                raise block.refused("tool_use_id", "belongs to no tool_use block before it.")
            said = _result(block)
            result = {"role": "tool", "tool_call_id": id, "name": names[id], "content": said}
            results.append(result)
        elif kind == "thinking" and role == "assistant":
            thoughts.append(block.text("thinking", required=True) or "")
            block.get("signature")
        elif kind == "redacted_thinking" and role == "assistant":
            block.get("data")
        elif kind == "image" and role == "user":
            parts.append(_image(block, see))
        else:
            parts += _parts(_text(block))
            continue
        block.settle({}, _HARMLESS_IN_BLOCKS)
    if not parts and not calls and (results or not thoughts):
        return results
    turn: dict[str, Any] = {"role": role, "content": _content(parts)}
    if thoughts:
        turn["reasoning_content"] = "\n".join(thoughts)
    if calls:
        turn["tool_calls"] = calls
    return [*results, turn]


def _image(block: Fields, see: See) -> dict[str, Any]:
    source = block.within("source", required=True)
    assert source is not None
    kind = source.text("type", required=True)
    if kind != "base64":
        raise source.refused("type", f"'{kind:.40}' is not opened; send the picture in base64.")
    source.get("media_type")
    return see(str(source.text("data", required=True)), source.name("data"))


def _result(block: Fields) -> str:
    """What a tool said."""
    if isinstance(block.data.get("content"), str):
        said = block.text("content") or ""
    else:
        said = "\n".join(map(_text, block.objects("content")))
    return f"error: {said}" if block.flag("is_error") else said


def _text(block: Fields) -> str:
    """The text of a block."""
    kind = block.text("type", required=True)
    if kind == "text":
        parts = [block.text("text", required=True)]
    elif kind == "search_result":
        parts = [block.text("title"), block.text("source")]
        parts += map(_text, block.objects("content", required=True))
    elif kind == "document":
        parts = [block.text("title"), block.text("context"), _document(block)]
    else:
        raise block.refused("type", f"'{kind:.40}' cannot be read here; give text.")
    block.settle({}, _HARMLESS_IN_BLOCKS)
    return "\n".join(part for part in parts if part)


def _document(block: Fields) -> str:
    source = block.within("source", required=True)
    assert source is not None
    kind = source.text("type", required=True)
    source.get("media_type")
    if kind == "text":
        return source.text("data", required=True) or ""
    if kind == "content" and isinstance(source.data.get("content"), str):
        return source.text("content") or ""
    if kind == "content":
        return "\n".join(map(_text, source.objects("content", required=True)))
    raise source.refused("type", f"'{kind:.40}' cannot be read here; give the document's text.")


async def _events(pieces: AsyncGenerator[Piece, None], reply: Reply) -> AsyncIterator[bytes]:
    async with aclosing(pieces) as open_pieces:
        async for piece in open_pieces:
            for event in reply.add(piece):
                yield named(event["type"], event)

"""OpenAI's API: chat, completions, what fills in the middle of a text, and the list of models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlx_diffgemma.server import asking
from mlx_diffgemma.server.engine import Engine
from mlx_diffgemma.server.fields import Fields, is_integer
from mlx_diffgemma.server.knobs import ELSEWHERE, knobs
from mlx_diffgemma.server.openai_messages import messages_of
from mlx_diffgemma.server.openai_replies import ChatReply, Reply, TextReply
from mlx_diffgemma.server.pieces import Asked
from mlx_diffgemma.server.preparing import MOST_ANSWERS
from mlx_diffgemma.server.refusals import RefusedError
from mlx_diffgemma.server.streams import read_json, sse

if TYPE_CHECKING:
    from mlx_diffgemma.server.app import Server

HARMLESS = (
    "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier",
    "store", "user", "verbosity",
)  # fmt: skip
"""Fields that change nothing here, since they are about whose request it is, what is kept of it and
what it costs."""
_GRAMMARS = "is not read; ask for a form with response_format."
REFUSED = {
    **ELSEWHERE,
    "audio": "asks for sound, and only text is written; leave it out.",
    "function_call": "is deprecated; use tool_choice.",
    "functions": "is deprecated; use tools.",
    "grammar": _GRAMMARS,
    "guided_choice": _GRAMMARS,
    "guided_grammar": _GRAMMARS,
    "guided_json": _GRAMMARS,
    "guided_regex": _GRAMMARS,
    "logit_bias": "is not supported; leave it out.",
    "moderation": "asks for a judgement that is not made here; leave it out.",
    "structured_outputs": _GRAMMARS,
    "web_search_options": "asks for a search, and this server opens nothing; leave it out.",
}
"""Fields that would change the answer and are not supported, with what is said of each."""
_EFFORTS = {
    "none": False, "minimal": False, "low": True, "medium": True, "high": True, "xhigh": True,
    "max": True,
}  # fmt: skip
_MOST_PROMPTS = 128


def routes(server: Server) -> list[Route]:
    """The routes of this protocol."""

    async def chat(request: Request) -> Response:
        fields = Fields(await read_json(request))
        most = server.settings.max_image
        asked = _chat(fields, server.engine, most)
        single = not fields.flag("parallel_tool_calls", True)
        top = _top_logprobs(fields)
        diffusing = fields.flag("diffusing")
        asked = replace(asked, frames=asked.frames or diffusing)
        reply = ChatReply(server.engine.name, asked.n, top=top, single=single, diffusing=diffusing)
        return await _answered(server, fields, [asked], reply)

    async def completions(request: Request) -> Response:
        fields = Fields(await read_json(request))
        asked = _completions(fields)
        logprobs = fields.integer("logprobs", 0)
        if logprobs is not None and logprobs > 1:
            raise fields.refused("logprobs", "may be 1 at most: one token is known for each place.")
        echo = fields.flag("echo")
        if logprobs is not None and (echo or asked[0].suffix is not None):
            raise fields.refused("logprobs", "goes with neither echo nor suffix; leave it out.")
        if echo and not all(isinstance(each.prompt, str) for each in asked):
            raise fields.refused("echo", "goes with prompts of text; leave it out.")
        begun = [str(each.prompt) if echo else "" for each in asked for _ in range(each.n)]
        asked = [replace(each, logprobs=logprobs is not None) for each in asked]
        reply = TextReply(server.engine.name, begun=begun, each=asked[0].n, top=logprobs)
        return await _answered(server, fields, asked, reply)

    async def fim(request: Request) -> Response:
        fields = Fields(await read_json(request))
        asked = _completions(fields)
        if len(asked) > 1:
            raise fields.refused("prompt", "must be one text.")
        reply = ChatReply(server.engine.name, asked[0].n)
        return await _answered(server, fields, asked, reply)

    async def models(request: Request) -> Response:
        return JSONResponse(_models(server.engine))

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != server.engine.name:
            raise RefusedError(
                404, f"there is no model '{name:.60}'; this server has '{server.engine.name}'.",
                "model",
            )  # fmt: skip
        return JSONResponse(_models(server.engine)["data"][0])

    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/fim/completions", fim, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
    ]


def error(status: int, message: str, param: str | None) -> Response:
    """An error as this protocol has it."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    told = {"message": message, "type": kind, "param": param, "code": None}
    return JSONResponse({"error": told}, status)


async def _answered(server: Server, fields: Fields, asked: list[Asked], reply: Reply) -> Response:
    """The response to a request whose own fields are all read."""
    streamed = fields.flag("stream")
    options = fields.within("stream_options")
    if options is not None:
        reply.tells_usage = options.flag("include_usage")
        options.settle({}, ["include_obfuscation"])
    fields.settle(REFUSED, HARMLESS)
    engine, headers = server.engine, fields.headers()
    if streamed:
        return sse(_events(engine, asked, reply), headers=headers)
    if any(each.frames for each in asked):
        raise RefusedError(
            400, "frames of a canvas are streamed; set stream to true.", reply.framed
        )
    async with aclosing(asking.answer(engine, *asked)) as pieces:
        async for piece in pieces:
            reply.add(piece)
    return JSONResponse(reply.whole(), headers=headers)


async def _events(
    engine: Engine, asked: list[Asked], reply: Reply
) -> AsyncIterator[dict[str, Any] | str]:
    async with aclosing(asking.answer(engine, *asked)) as pieces:
        async for piece in pieces:
            for chunk in reply.chunks(piece):
                yield chunk
    for chunk in reply.last_chunks():
        yield chunk
    yield "[DONE]"


# These functions read the fields of requests for text.


def _common(fields: Fields) -> dict[str, Any]:
    fields.text("model")  # one model is served, whatever clients call it
    most = fields.integer("max_completion_tokens", 1)
    other = fields.integer("max_tokens", 1)
    answers = fields.integer("n", 1) or 1
    if answers > MOST_ANSWERS:  # before anything is made for each of them
        raise fields.refused("n", f"must be {MOST_ANSWERS} at most.")
    return {
        "max_tokens": most if most is not None else other,
        "temperature": fields.number("temperature", 0.0),
        "seed": fields.integer("seed", 0),
        "stop": tuple(text for text in fields.texts("stop") if text),
        "n": answers,
        "frames": fields.flag("diffusion_frames"),
        **knobs(fields),
    }


def _chat(fields: Fields, engine: Engine, most: int) -> Asked:
    effort = fields.choice("reasoning_effort", _EFFORTS)
    modalities = fields.texts("modalities")
    if set(modalities) - {"text"}:
        raise fields.refused("modalities", "may be text alone; nothing else is written here.")
    common = _common(fields)
    schema, pattern = _form(fields)
    return Asked(
        messages=messages_of(fields, engine, most),
        tools=_tools(fields),
        tool_choice=_tool_choice(fields),
        json_schema=schema,
        regex=pattern,
        thinking=None if effort is None else _EFFORTS[effort],
        logprobs=fields.flag("logprobs"),
        chat_template_kwargs=fields.mapping("chat_template_kwargs"),
        **common,
    )


def _top_logprobs(fields: Fields) -> int | None:
    """How many alternatives are named for each token; None where log probabilities are not asked
    for."""
    key = "top_logprobs"
    top = fields.integer(key, 0) or 0
    if top > 1:
        raise fields.refused(key, "may be 1 at most: one token is known for each place.")
    if top and not fields.flag("logprobs"):
        raise fields.refused(key, "goes with logprobs; set that to true.")
    return top if fields.flag("logprobs") else None


def _completions(fields: Fields) -> list[Asked]:
    """One request for each prompt."""
    prompt = fields.get("prompt", required=True)
    suffix = fields.text("suffix")
    best = fields.integer("best_of", 1)
    common = _common(fields)
    if best is not None and best > common["n"]:
        raise fields.refused("best_of", "is not supported; leave it out.")
    if isinstance(prompt, list) and all(is_integer(each) for each in prompt) and prompt:
        prompts = [prompt]
    else:
        prompts = prompt if isinstance(prompt, list) else [prompt]
    if not 1 <= len(prompts) <= _MOST_PROMPTS:
        raise fields.refused("prompt", f"must be 1 to {_MOST_PROMPTS} prompts.")
    for each in prompts:
        ids = isinstance(each, list) and each and all(map(is_integer, each))
        if not (isinstance(each, str) or ids):
            raise fields.refused("prompt", "must be a text, token ids, or a list of either.")
        if suffix is not None and not isinstance(each, str):
            raise fields.refused("suffix", "goes with a prompt that is a text.")
    if suffix is not None and common["frames"]:
        raise fields.refused("diffusion_frames", "goes with answers without a suffix.")
    return [Asked(prompt=each, suffix=suffix, **common) for each in prompts]


def _form(fields: Fields) -> tuple[dict[str, Any] | bool | None, str | None]:
    """The JSON schema or the regular expression that the answer must satisfy."""
    form = fields.within("response_format")
    if form is None:
        return None, None
    kind = form.choice("type", ("text", "json_object", "json_schema", "regex"), required=True)
    schema: dict[str, Any] | bool | None = True if kind == "json_object" else None
    pattern = form.text("pattern", required=True) if kind == "regex" else None
    if kind == "json_schema":
        described = form.within("json_schema", required=True)
        assert described is not None
        schema = described.mapping("schema", required=True)
        for key in ("name", "description"):
            described.text(key)
        described.flag("strict")
        described.settle({})
    form.settle({})
    return schema, pattern


def _tools(fields: Fields) -> list[dict[str, Any]] | None:
    tools = []
    for tool in fields.objects("tools"):
        tool.choice("type", ["function"], required=True)
        function = tool.within("function", required=True)
        assert function is not None
        described = {
            "name": function.text("name", required=True),
            "description": function.text("description") or "",
            "parameters": function.mapping("parameters") or {"type": "object", "properties": {}},
        }
        function.flag("strict")
        function.settle({})
        tools.append({"type": "function", "function": described})
    return tools or None


def _tool_choice(fields: Fields) -> str | None:
    if not isinstance(fields.data.get("tool_choice"), dict):
        return fields.choice("tool_choice", ("auto", "none", "required"))
    choice = fields.within("tool_choice", required=True)
    assert choice is not None
    choice.choice("type", ["function"], required=True)
    function = choice.within("function", required=True)
    assert function is not None
    return function.text("name", required=True)


def _models(engine: Engine) -> dict[str, Any]:
    """The list of models, in the forms that OpenAI's, Anthropic's and TypeSafe's clients read."""
    day = "2026-06-10"
    entry = {
        "id": engine.name,
        "object": "model",
        "created": 1781049600,
        "owned_by": "mlx-diffgemma",
        "context_length": engine.context,
        "max_model_len": engine.context,
        "type": "model",
        "display_name": engine.name,
        "created_at": f"{day}T00:00:00Z",
        "lifecycle": "active",
        "max_input_tokens": engine.context,
    }
    described = "DiffusionGemma, which drafts and refines whole blocks of text."
    listed = {"name": engine.name, "description": described, "release_date": day}
    return {
        "object": "list",
        "data": [entry],
        "has_more": False,
        "first_id": engine.name,
        "last_id": engine.name,
        "models": [listed],
    }

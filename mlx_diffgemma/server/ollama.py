"""Ollama's API: `/api/chat`, `/api/generate`, and what tells of the model."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from mlx.utils import tree_flatten
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlx_diffgemma.config import MODEL_TYPE
from mlx_diffgemma.server import asking
from mlx_diffgemma.server.asking import Asked, Call, Ended, Piece, Started, Text, Thought, TokenInfo
from mlx_diffgemma.server.fields import Fields
from mlx_diffgemma.server.refusals import RefusedError
from mlx_diffgemma.server.streams import json_lines, read_json
from mlx_diffgemma.text.chat_template import template_text
from mlx_diffgemma.text.tokenizer import hf_tokenizer

if TYPE_CHECKING:
    from mlx_diffgemma.server.app import Server
    from mlx_diffgemma.server.engine import Engine

VERSION = "0.30.0"
"""The version of Ollama whose API this is, for clients that ask for a least one."""
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
    "context": "holds a conversation of Ollama's own; send its messages to /api/chat.",
    "height": "is for models that make images; leave it out.",
    "images": "holds images, and only text is supported; leave them out.",
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

_FOREVER = "2318-01-01T00:00:00Z"  # where Ollama keeps a model for good
_LEVELS = ("low", "medium", "high", "max")


def routes(server: Server) -> list[Route]:
    """The routes of this protocol."""
    since = _now()

    async def version(request: Request) -> Response:
        return JSONResponse({"version": VERSION})

    async def tags(request: Request) -> Response:
        return JSONResponse({"models": [_listed(server.engine, since)]})

    async def ps(request: Request) -> Response:
        found = _listed(server.engine, since)
        running = {"expires_at": _FOREVER, "size_vram": found["size"]}
        del found["modified_at"]
        return JSONResponse(
            {"models": [{**found, **running, "context_length": server.engine.context}]}
        )

    async def show(request: Request) -> Response:
        fields = Fields(await read_json(request))
        _check_model(fields, server.engine)
        return JSONResponse(_shown(server.engine, since))

    async def chat(request: Request) -> Response:
        return await answered(Fields(await read_json(request)), chat=True)

    async def generate(request: Request) -> Response:
        return await answered(Fields(await read_json(request)), chat=False)

    async def answered(fields: Fields, *, chat: bool) -> Response:
        reply = Reply(_check_model(fields, server.engine), chat=chat)
        asked = (_chat if chat else _generate)(fields)
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
        async with aclosing(pieces) as open_pieces:
            whole = [line async for line in _lines(open_pieces, reply)]
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


# From a request to what is asked.


def _check_model(fields: Fields, engine: Engine) -> str:
    """The name of the model as the client writes it.

    Raises:
        RefusedError: it is another model's (404), or missing.
    """
    name = fields.text("model") or fields.text("name")
    if not name:
        raise fields.refused("model", "is missing.")
    if _tagged(name).casefold() != _tagged(engine.name).casefold():
        raise RefusedError(
            404, f"model '{name:.80}' not found; this server runs {engine.name}.", "model"
        )
    return name


def _tagged(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _chat(fields: Fields) -> Asked | None:
    """What a chat asks for; None where it only wants the model to be loaded."""
    messages = [_message(message) for message in fields.objects("messages")]
    tools = [_tool(tool) for tool in fields.objects("tools")]
    common = _common(fields)
    if not messages:
        return None
    prefill = None
    if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        prefill = messages.pop()["content"] or None
    return Asked(messages=messages, prefill=prefill, tools=tools or None, **common)


def _message(message: Fields) -> dict[str, Any]:
    """A message in the library's form."""
    role = str(message.choice("role", ("user", "assistant", "system", "tool"), required=True))
    read: dict[str, Any] = {
        "role": role,
        "content": message.text("content") or "",
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
    message.settle({"images": REFUSED["images"]})
    if calls:
        read["tool_calls"] = [{k: v for k, v in call.items() if v is not None} for call in calls]
    return {key: value for key, value in read.items() if value is not None}


def _tool(tool: Fields) -> dict[str, Any]:
    function = tool.within("function", required=True)
    assert function is not None
    function.text("name", required=True)
    return {"type": "function", "function": function.data}


def _generate(fields: Fields) -> Asked | None:
    """What a completion asks for; None where it only wants the model to be loaded."""
    prompt, suffix = fields.text("prompt") or "", fields.text("suffix") or None
    system, raw = fields.text("system") or None, fields.flag("raw")
    common = _common(fields)
    if suffix is None and not prompt:
        return None
    if raw or suffix is not None:
        if system is not None:
            raise fields.refused("system", "needs a chat; leave out raw and suffix, or system.")
        return Asked(prompt=prompt, suffix=suffix, **common)
    return Asked(messages=[{"role": "user", "content": prompt}], system=system, **common)


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
    }
    options.settle({}, HARMLESS_OPTIONS)
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


# From pieces to lines.


class Reply:
    """An answer while it is written, line by line.

    Args:
        model: what the client calls the model.
        chat: whether it is a message of a chat, and not a completion.
    """

    def __init__(self, model: str, *, chat: bool) -> None:
        self.model, self._chat = model, chat
        self._asked = self._encoded = time.perf_counter_ns()

    def line(self, text: str, *, done: bool, **more: Any) -> dict[str, Any]:
        """A line that says `text`; `more` are fields beside it."""
        said: dict[str, Any] = {"response": text}
        if self._chat:
            own = {key: more.pop(key) for key in ("thinking", "tool_calls") if key in more}
            said = {"message": {"role": "assistant", "content": text, **own}}
        return {"model": self.model, "created_at": _now(), **said, "done": done, **more}

    def loaded(self, keep_alive: Any) -> dict[str, Any]:
        """The line for a client that only wants the model to be loaded, or to be let go of."""
        reason = "unload" if keep_alive in (0, "0", "0s") else "load"
        return self.line("", done=True, done_reason=reason)

    def add(self, piece: Piece) -> dict[str, Any] | None:
        """The line that tells a piece of the answer, if any does."""
        if isinstance(piece, Started):
            self._encoded = time.perf_counter_ns()
        if isinstance(piece, Text) and (piece.text or piece.tokens):
            more = {"logprobs": list(map(_logprob, piece.tokens))} if piece.tokens else {}
            return self.line(piece.text, done=False, **more)
        if isinstance(piece, Thought):
            return self.line("", done=False, thinking=piece.text)
        if isinstance(piece, Call):
            function = {"index": piece.number, "name": piece.name, "arguments": piece.arguments}
            return self.line("", done=False, tool_calls=[{"id": piece.id, "function": function}])
        return self._last(piece) if isinstance(piece, Ended) else None

    def _last(self, piece: Ended) -> dict[str, Any]:
        now = time.perf_counter_ns()
        return self.line(
            "",
            done=True,
            done_reason="length" if piece.reason == "length" else "stop",
            total_duration=now - self._asked,
            load_duration=0,
            prompt_eval_count=piece.prompt_tokens,
            prompt_eval_duration=self._encoded - self._asked,
            eval_count=piece.completion_tokens,
            eval_duration=now - self._encoded,
        )

    def whole(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """All lines as one."""
        last = dict(lines[-1])
        said = [line["message"] if self._chat else line for line in lines]
        key = "content" if self._chat else "response"
        joined: dict[str, Any] = {key: "".join(each[key] for each in said)}
        thoughts = [each["thinking"] for each in said if "thinking" in each]
        calls = [call for each in said for call in each.get("tool_calls", ())]
        joined |= {"thinking": "".join(thoughts)} if thoughts else {}
        joined |= {"tool_calls": calls} if calls else {}
        tokens = [token for line in lines for token in line.get("logprobs", ())]
        last |= {"logprobs": tokens} if tokens else {}
        return {**last, "message": {**last["message"], **joined}} if self._chat else last | joined


def _logprob(token: TokenInfo) -> dict[str, Any]:
    return {
        "token": token.text,
        "logprob": token.log_probability,
        "bytes": list(token.spelled),
        "entropy": token.entropy,
    }


async def _lines(pieces: AsyncIterator[Piece], reply: Reply) -> AsyncIterator[dict[str, Any]]:
    async with aclosing(pieces) as open_pieces:  # type: ignore[type-var]
        async for piece in open_pieces:
            line = reply.add(piece)
            if line is not None:
                yield line


# What tells of the model.


def _listed(engine: Engine, since: str) -> dict[str, Any]:
    name = _tagged(engine.name)
    arrays: list[tuple[str, Any]] = tree_flatten(engine.model.parameters())
    size = sum(array.nbytes for _, array in arrays)
    return {
        "name": name,
        "model": name,
        "modified_at": since,
        "size": size,
        "digest": hashlib.sha256(f"{name} {size}".encode()).hexdigest(),
        "details": _details(engine),
    }


def _details(engine: Engine) -> dict[str, Any]:
    quantized = engine.model.config.quantization
    kind = str(engine.model.dtype).removeprefix("mlx.core.").upper()
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": MODEL_TYPE,
        "families": [MODEL_TYPE],
        "parameter_size": _short(_parameters(engine.model)),
        "quantization_level": f"{quantized['bits']}-bit" if quantized else kind,
    }


def _parameters(model: Any) -> int:
    """How many numbers the weights are, those packed into words among them."""
    count = 0
    for module in model.modules():
        bits = getattr(module, "bits", None)
        own = {name: array for name, array in module.items() if hasattr(array, "nbytes")}
        if bits is not None and "scales" in own:
            own = {"weight": own["weight"]}
            count += own["weight"].nbytes * 8 // bits
        else:
            count += sum(array.size for array in own.values())
    return count


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count / 1000:.0f}K"


def _shown(engine: Engine, since: str) -> dict[str, Any]:
    template = template_text(hf_tokenizer(engine.tokenizer))
    can = {"tools": re.search(r"\btools\b", template), "thinking": "enable_thinking" in template}
    return {
        "modelfile": f"FROM {engine.name}",
        "parameters": "",
        "template": template,
        "details": _details(engine),
        "model_info": {
            "general.architecture": MODEL_TYPE,
            "general.basename": engine.name,
            "general.parameter_count": _parameters(engine.model),
            f"{MODEL_TYPE}.context_length": engine.context,
            f"{MODEL_TYPE}.canvas_length": engine.model.config.canvas_length,
        },
        "capabilities": ["completion", "insert", *(name for name, has in can.items() if has)],
        "modified_at": since,
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")

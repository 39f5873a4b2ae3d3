"""Typed decisions: `/v1/systemone` as typesafe-sdk and ollama speak it, and `/v1/decisions`, which
says more of each answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlx_diffgemma.editing.beliefs import Answer, Decisions
from mlx_diffgemma.editing.decide import decide
from mlx_diffgemma.editing.questions import Question, listing, read_questions, state_text
from mlx_diffgemma.server.fields import Fields
from mlx_diffgemma.server.preparing import tokenizer_of
from mlx_diffgemma.server.refusals import RefusedError
from mlx_diffgemma.server.streams import read_json
from mlx_diffgemma.text.tokenizer import hf_tokenizer

if TYPE_CHECKING:
    from mlx_diffgemma.server.app import Server
    from mlx_diffgemma.server.engine import Engine
    from mlx_diffgemma.server.jobs import Seat

MOST = 64
"""Most draws, and most steps, that one request may ask for."""
HARMLESS = ("keep_alive", "stream")
"""Fields of a request that change nothing here: one model is kept, and answers come at once."""
REFUSED = {
    "assets": "holds images, and only text is supported; leave them out.",
    "calibration": "must be false: this server's probabilities are as the model gives them.",
}


def routes(server: Server) -> list[Route]:
    """The routes of this protocol."""

    async def systemone(request: Request) -> Response:
        return await answered(request, _plain, _usage)

    async def decisions(request: Request) -> Response:
        return await answered(request, Answer.as_json, _more)

    async def answered(request: Request, say: Any, more: Any) -> Response:
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise RefusedError(400, f"the request {REFUSED['assets']}", "assets")
        fields = Fields(await read_json(request))
        found = await _decided(server.engine, fields)
        answers = {name: say(answer) for name, answer in found.answers.items()}
        body = {"model": server.engine.name, "answers": answers, **more(found)}
        return JSONResponse(body, headers={**_named(request), **fields.headers()})

    return [
        Route("/v1/systemone", systemone, methods=["POST"]),
        Route("/v1/decisions", decisions, methods=["POST"]),
    ]


def _named(request: Request) -> dict[str, str]:
    """The id of the request in the header where typesafe-sdk looks for it."""
    return {"x-typesafe-request-id": request.scope.get("request_id", "")}


def error(status: int, message: str, param: str | None) -> Response:
    """An error that both kinds of clients can read."""
    return JSONResponse({"error": message}, status)


async def _decided(engine: Engine, fields: Fields) -> Decisions:
    fields.text("model", required=True)
    state = fields.get("state", required=True)
    questions = read_questions(fields.mapping("questions", required=True))
    settings: dict[str, Any] = {
        "draws": fields.integer("draws", 1),
        "steps": fields.integer("steps", 1),
        "canvas_length": fields.integer("canvas_length", 2),
        "separate": fields.flag("separate"),
        "rotate": fields.flag("rotate"),
    }
    for name in ("draws", "steps"):
        if (settings[name] or 0) > MOST:
            raise fields.refused(name, f"must be at most {MOST}.")
    given: dict[str, Any] = {
        "frame": fields.text("frame"),
        "seed": fields.integer("seed", 0),
        "system_prompt": fields.text("system_prompt"),
        "raw": fields.flag("raw"),
    }
    fields.settle(REFUSED, HARMLESS)
    orders = max(len(question.options) for question in questions) if settings["rotate"] else 1
    length = await asyncio.to_thread(_length, engine, state, questions)

    def work(seat: Seat) -> Iterator[Decisions]:
        yield decide(
            seat.model,
            seat.tokenizer,
            state,
            {question.name: question for question in questions},
            denoiser=seat.denoiser,
            prefix_cache=seat.cache,
            **given,
            **settings,
        )

    async with engine.submit(work, prompt_tokens=orders * length) as ticket:
        async for found in ticket:
            return found
    raise RuntimeError("a decision ended without an answer")


def _length(engine: Engine, state: Any, questions: Sequence[Question]) -> int:
    """About how many tokens a prompt takes."""
    labels = [list(question.options) for question in questions]
    text = f"{state_text(state)}\n\n{listing(questions, labels)}"
    with engine.tokenizing:
        return len(hf_tokenizer(tokenizer_of(engine)).encode(text, add_special_tokens=False))


def _plain(answer: Answer) -> dict[str, Any]:
    """An answer with the fields that typesafe-sdk knows, and no more."""
    said = answer.as_json()
    ours = ("spread", "confidence") if answer.question.kind == "noul" else ("spread",)
    return {key: value for key, value in said.items() if key not in ours}


def _usage(found: Decisions) -> Mapping[str, Any]:
    return {
        "usage": {"input_tokens": found.prompt_tokens, "output_tokens": len(found.answers)},
    }


def _more(found: Decisions) -> Mapping[str, Any]:
    (usage,) = _usage(found).values()
    return {
        "usage": {**usage, "cached_tokens": found.cached_tokens},
        "canvases": found.canvases,
        "passes": found.passes,
        "seed": found.seed,
    }

"""The web page: its files, and the routes under `/v1/page/` that it asks.

Text that forms is sent as a line of JSON for each step, so that the page can show it. Where a
protocol has what the page needs (`/v1/decisions`), the page uses it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlx_diffgemma import __version__
from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.diffusion.constraints import not_at_first, token_mask
from mlx_diffgemma.diffusion.noise import checked_seed
from mlx_diffgemma.diffusion.profiles import DEFAULT as DEFAULT_PROFILE
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.fitting import canvas_length, configured, fit_to_context
from mlx_diffgemma.server import writing
from mlx_diffgemma.server.fields import Fields, is_integer
from mlx_diffgemma.server.live import MOST_STEPS, Live, LiveCanvases
from mlx_diffgemma.server.orders import Order, read_order
from mlx_diffgemma.server.preparing import tokenizer_of
from mlx_diffgemma.server.refusals import RefusedError
from mlx_diffgemma.server.streams import json_lines, read_json
from mlx_diffgemma.text.parts import markers_of
from mlx_diffgemma.text.prompt import encode_prompt

if TYPE_CHECKING:
    from mlx_diffgemma.server.app import Server
    from mlx_diffgemma.server.engine import Engine
    from mlx_diffgemma.server.jobs import Seat

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
_KINDS = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_BYTES_A_TOKEN = 4  # about so many bytes of a request are a token, for memory to be reserved


def routes(server: Server) -> list[Route]:
    """The routes of the page."""
    canvases = LiveCanvases()
    files = _files()

    async def page(request: Request) -> Response:
        return _file(request, *files["index.html"])

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in files:
            raise RefusedError(404, f"the page has no file {name[:100]!r}.")
        return _file(request, *files[name])

    async def about(request: Request) -> Response:
        engine = server.engine
        return JSONResponse({
            "name": engine.name,
            "demo": engine.name == "demo",
            "version": __version__,
            "context": engine.context,
            "canvas": engine.model.config.canvas_length,
            "thinks": markers_of(engine.tokenizer).opened is not None,
        })  # fmt: skip

    async def puzzle(request: Request) -> Response:
        text = request.query_params.get("seed", "")
        seed = int(text) if text.isascii() and text.isdecimal() else None
        made = sudoku.make_puzzle(np.random.default_rng(checked_seed(seed)))
        return JSONResponse({"givens": made.givens, "solution": made.solution})

    async def start(request: Request) -> Response:
        fields = Fields(await read_json(request))
        live = await asyncio.to_thread(_live, server.engine, fields)
        fields.settle({})
        order = Order(steps=fields.integer("run", 0))
        canvases.keep(live)
        return _running(server.engine, live, order, begins=True)

    async def change(request: Request) -> Response:
        live = _known(canvases, request)
        fields = Fields(await read_json(request))
        order = await asyncio.to_thread(
            read_order, fields, live.vocabulary, live.length, server.engine.tokenizing
        )
        return _running(server.engine, live, order)

    async def alternatives(request: Request) -> Response:
        live = _known(canvases, request)
        fields = Fields(await read_json(request))
        place = fields.integer("place", 0, required=True) or 0
        at = min(fields.integer("at", 0, required=True) or 0, len(live.canvases) - 1)
        if place >= live.length or at < 0:
            raise fields.refused("place", "is outside the canvas.")

        def work(seat: Seat) -> Iterator[Any]:
            yield live.alternatives(seat, at, place)

        async with server.engine.submit(work) as ticket:
            async for found in ticket:
                return JSONResponse({"at": at, "place": place, "alternatives": found})
        raise RuntimeError("a look ended without an answer")

    def written(make: writing.Make) -> Callable[[Request], Any]:
        async def write(request: Request) -> Response:
            fields = Fields(await read_json(request))
            work = make(server.engine, fields)
            fields.settle({})
            about = int(request.headers.get("content-length", 0)) // _BYTES_A_TOKEN
            return _told(server.engine, work, prompt_tokens=about)

        return write

    return [
        Route("/", page),
        Route("/page/{name}", file),
        Route("/v1/page/about", about),
        Route("/v1/page/sudoku", puzzle),
        Route("/v1/page/canvases", start, methods=["POST"]),
        Route("/v1/page/canvases/{canvas}", change, methods=["POST"]),
        Route("/v1/page/canvases/{canvas}/alternatives", alternatives, methods=["POST"]),
        *(
            Route(f"/v1/page/{name}", written(make), methods=["POST"])
            for name, make in writing.MAKERS.items()
        ),
    ]


def error(status: int, message: str, param: str | None) -> Response:
    """An error as the page reads it."""
    return JSONResponse({"error": {"message": message, "param": param}}, status)


def _files() -> dict[str, tuple[bytes, str]]:
    """The page's files by name, each with its type."""
    found = {}
    for path in resources.files("mlx_diffgemma.server").joinpath("static").iterdir():
        kind = _KINDS.get(f".{path.name.rsplit('.', 1)[-1]}")
        if kind is not None:
            found[path.name] = (path.read_bytes(), kind)
    return found


def _file(request: Request, content: bytes, kind: str) -> Response:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=kind)


def _known(canvases: LiveCanvases, request: Request) -> Live:
    live = canvases.get(request.path_params["canvas"])
    if live is None:
        raise RefusedError(404, "this canvas is not kept any more; start it again.")
    return live


def _live(engine: Engine, fields: Fields) -> Live:
    """A live canvas as a request describes it: by `prompt` or `sudoku` (the givens), and, where it
    begins from another canvas, by `ids`, `pins` (token ids by position) and `strength`."""
    model = engine.model
    given = fields.text("sudoku")
    prompt = fields.text("prompt", required=given is None) or ""
    with engine.tokenizing:
        tokenizer = tokenizer_of(engine)
        steps = fields.integer("steps", 1)
        config = configured(
            model,
            tokenizer,
            DEFAULT_PROFILE,
            max_denoising_steps=min(steps or 0, MOST_STEPS) or None,
        )
        vocabulary = Vocabulary(tokenizer, model.config.text.vocab_size, config.eos_token_ids)
        if given is not None:
            prompt = f"{sudoku.BARE_PROMPT}\n{given}"
        ids = encode_prompt(tokenizer, prompt)
        (config,) = fit_to_context(model, [ids], config, check_memory=False)
        length = canvas_length(model, config)
        pins: dict[int, int] = {}
        allowed = dict(not_at_first(config.eos_token_ids, length, vocabulary.size).allowed)
        if given is not None:
            pins, allowed = _grid(vocabulary, given, length)
    initial = fields.get("ids")
    if initial is not None:
        initial = _ids(fields, "ids", initial, vocabulary.size)
        if len(initial) != length:
            raise fields.refused("ids", f"must be {length} tokens.")
    held = fields.mapping("pins") or {}
    places = [int(key) if key.isascii() and key.isdecimal() else -1 for key in held]
    if any(not 0 <= place < length for place in places):
        raise fields.refused("pins", f"has a place outside the canvas of {length}.")
    pins |= dict(zip(places, _ids(fields, "pins", [*held.values()], vocabulary.size), strict=True))
    strength = fields.number("strength", 0.0)
    total = config.max_denoising_steps
    first = 1 if strength is None else total - int(min(1.0, strength) * (total - 1))
    return Live(
        config,
        vocabulary,
        ids,
        length,
        checked_seed(fields.integer("seed", 0)),
        allowed,
        pins,
        initial,
        first,
    )


def _ids(fields: Fields, key: str, ids: Any, size: int) -> list[int]:
    if not isinstance(ids, list) or not all(
        is_integer(token) and 0 <= token < size for token in ids
    ):
        raise fields.refused(key, f"must hold token ids below {size}.")
    return ids


def _grid(
    vocabulary: Vocabulary, givens: str, length: int
) -> tuple[dict[int, int], dict[int, np.ndarray]]:
    """The pins of a canvas of `length` positions with a sudoku in it, and by position the masks [W]
    of the tokens that its cells may hold (W words of a bit mask)."""
    rows = givens.split("\n")
    square = len(rows) == sudoku.SIDE and all(len(row) == sudoku.SIDE for row in rows)
    if not square or set(givens) - set("123456.\n"):
        raise UsageError("sudoku must be six rows of six, each a digit from 1 to 6 or a dot.")
    tokens = [vocabulary.encode(character) for character in givens]
    if any(len(token) != 1 for token in tokens) or len(givens) >= length:
        raise UsageError("this model does not write a digit as one token; ask the demo model.")
    digits = token_mask([vocabulary.encode(digit)[0] for digit in "123456"], vocabulary.size)
    pins = dict.fromkeys(range(len(givens), length), vocabulary.end)
    allowed = {}
    for place, character in enumerate(givens):
        if character == "\n":
            pins[place] = tokens[place][0]
            continue
        allowed[place] = digits
        if character != sudoku.BLANK:
            pins[place] = tokens[place][0]
    return pins, allowed


def _running(engine: Engine, live: Live, order: Order, *, begins: bool = False) -> Response:
    run = live.offer(order)
    if run is None:
        return JSONResponse({"queued": True}, 202)
    known: set[int] = set()

    def work(seat: Seat) -> Iterator[Any]:
        if begins:
            yield {"canvas": live.name, "seed": live.seed, "length": live.length}
        yield from live.run(seat, run, known)

    return _told(
        engine, work, prompt_tokens=len(live.ids), answer=live.length, ended=lambda: live.end(run)
    )


def _told(
    engine: Engine,
    work: Any,
    *,
    prompt_tokens: int = 0,
    answer: int = 0,
    ended: Callable[[], None] = lambda: None,
) -> Response:
    """A response with a line of JSON for each value that a work yields; `ended` is called at its
    end."""

    async def lines() -> AsyncIterator[Any]:
        try:
            ticket = engine.submit(work, prompt_tokens=prompt_tokens, answer_tokens=answer)
            async with ticket:
                async for value in ticket:
                    yield value
        finally:
            ended()

    return json_lines(
        lines(),
        keep_alive=b"\n",
        failed=lambda refused: {"error": {"message": refused.message, "status": refused.status}},
    )

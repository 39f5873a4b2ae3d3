"""Our own routes: filling and editing in place, and work on one canvas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.profiles import DEFAULT as DEFAULT_PROFILE
from mlx_diffgemma.editing.edit import edit
from mlx_diffgemma.editing.fill import fill
from mlx_diffgemma.editing.gaps import Filled
from mlx_diffgemma.editing.infill import HOLE, LENGTHS, infill
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.fitting import canvas_length, configured
from mlx_diffgemma.server.canvases import CanvasAsked, Change, canvas_work
from mlx_diffgemma.server.engine import Engine
from mlx_diffgemma.server.fields import Fields, is_integer
from mlx_diffgemma.server.jobs import Seat
from mlx_diffgemma.server.knobs import knobs
from mlx_diffgemma.server.openai import HARMLESS, error
from mlx_diffgemma.server.openai_messages import messages_of
from mlx_diffgemma.server.pieces import Asked
from mlx_diffgemma.server.preparing import Prepared, at_temperature, count, prepare
from mlx_diffgemma.server.streams import read_json, sse

if TYPE_CHECKING:
    from mlx_diffgemma.server.app import Server

__all__ = ["error", "routes"]

_MOST_CHANGES = 256
_MOST_TOP = 64
_MOST_WANTED = 1024


def routes(server: Server) -> list[Route]:
    """The routes of this protocol."""

    async def infilled(request: Request) -> Response:
        fields = Fields(await read_json(request))
        text = fields.text("text", required=True)
        hole = fields.text("hole") or HOLE
        lengths = _lengths(fields) or LENGTHS

        def run(**shared: Any) -> dict[str, Any]:
            found = infill(shared.pop("model"), shared.pop("tokenizer"), str(text), hole=hole,
                           lengths=_fitting(server.engine, lengths), **shared)  # fmt: skip
            return {"text": found.text, "holes": list(map(_filled, found.holes)), **_figures(found)}

        return await _run(server, fields, "infill", run)

    async def filled(request: Request) -> Response:
        fields = Fields(await read_json(request))
        template = fields.text("template", required=True)
        lengths = _lengths(fields) or LENGTHS

        def run(**shared: Any) -> dict[str, Any]:
            found = fill(shared.pop("model"), shared.pop("tokenizer"), str(template),
                         lengths=_fitting(server.engine, lengths), **shared)  # fmt: skip
            slots = {name: _filled(each) for name, each in found.filled.items()}
            return {"text": found.text, "slots": found.slots, "filled": slots, **_figures(found)}

        return await _run(server, fields, "fill", run)

    async def edited(request: Request) -> Response:
        fields = Fields(await read_json(request))
        text = str(fields.text("text", required=True))
        instruction = str(fields.text("instruction", required=True))
        lines = fields.get("lines", required=True)
        if not (isinstance(lines, list) and len(lines) == 2 and all(map(is_integer, lines))):
            raise fields.refused("lines", "must be the first and the last line, such as [3, 5].")
        strength = fields.number("strength", 0.0)
        lengths = _lengths(fields)

        def run(**shared: Any) -> dict[str, Any]:
            found = edit(
                shared.pop("model"), shared.pop("tokenizer"), text, instruction,
                (lines[0], lines[1]), strength=1.0 if strength is None else strength,
                lengths=lengths, **shared,
            )  # fmt: skip
            told = {"lines": list(found.lines), "filled": _filled(found.filled)}
            return {"text": found.text, "diff": found.diff("text"), **told, **_figures(found)}

        return await _run(server, fields, "edit", run)

    async def canvas(request: Request) -> Response:
        fields = Fields(await read_json(request))
        asked = await _canvas(server.engine, fields, server.settings.max_image)
        reads, streamed = fields.flag("diffusion_read_only"), fields.flag("stream")
        if fields.flag("diffusion_frames", streamed) and not streamed:
            raise fields.refused("diffusion_frames", "goes with stream; set that to true.")
        asked = replace(asked, reads=reads, frames=streamed and not reads)
        fields.settle({}, HARMLESS)
        if streamed:
            return sse(_events(server.engine, asked), headers=fields.headers())
        found = await _last(_submit(server.engine, asked))
        return JSONResponse(found, headers=fields.headers())

    async def alternatives(request: Request) -> Response:
        fields = Fields(await read_json(request))
        asked = await _canvas(server.engine, fields, server.settings.max_image)
        at = fields.integer("step", 1, required=True) or 1
        place = fields.integer("position", 0)
        places = range(asked.length) if place is None else [place]
        if place is not None and place >= asked.length:
            raise fields.refused("position", f"must be below {asked.length}, the canvas's length.")
        if at > asked.config.max_denoising_steps:
            raise fields.refused("step", "is beyond the last step; see diffusion_max_steps.")
        asked = replace(asked, look=tuple(places), at=at)
        fields.settle({"stream": "is not possible here; leave it out."}, HARMLESS)
        return JSONResponse(await _last(_submit(server.engine, asked)), headers=fields.headers())

    return [
        Route("/v1/infill", infilled, methods=["POST"]),
        Route("/v1/fill", filled, methods=["POST"]),
        Route("/v1/edit", edited, methods=["POST"]),
        Route("/v1/canvas", canvas, methods=["POST"]),
        Route("/v1/canvas/alternatives", alternatives, methods=["POST"]),
    ]


# Filling and editing in place.


async def _run(
    server: Server, fields: Fields, kind: str, run: Callable[..., dict[str, Any]]
) -> Response:
    fields.text("model")
    how = knobs(fields)
    options: dict[str, Any] = {
        "prompt": fields.text("prompt"),
        "system_prompt": fields.text("system"),
        "seed": fields.integer("seed", 0),
    }
    temperature = fields.number("temperature", 0.0)
    fields.settle({"stream": "is not possible here; leave it out."}, HARMLESS)
    engine = server.engine

    def work(seat: Seat) -> Iterator[dict[str, Any]]:
        config = _config(engine, how, temperature)
        found = run(
            model=seat.model,
            tokenizer=seat.tokenizer,
            config=config,
            denoiser=seat.denoiser,
            prefix_cache=seat.cache,
            **options,
        )
        known = {"cached_tokens": min(seat.cached_tokens, seat.prompt_tokens)}
        usage = {"prompt_tokens": seat.prompt_tokens, "prompt_tokens_details": known}
        yield {"object": kind, "model": engine.name, **found, "usage": usage}

    texts = [value for value in fields.data.values() if isinstance(value, str)]
    tokens = await asyncio.to_thread(count, engine, Asked(prompt="\n".join(texts)))
    ticket = engine.submit(work, prompt_tokens=2 * tokens, answer_tokens=1)
    return JSONResponse(await _last(ticket), headers=fields.headers())


def _config(engine: Engine, how: dict[str, Any], temperature: float | None) -> DiffusionConfig:
    profile, settings = how["profile"] or DEFAULT_PROFILE, how["settings"]
    config = configured(engine.model, engine.tokenizer, profile, **settings)
    return at_temperature(config, temperature)


def _lengths(fields: Fields) -> tuple[int, ...] | None:
    lengths = fields.get("lengths")
    if lengths is None:
        return None
    if not isinstance(lengths, list) or not all(map(is_integer, lengths)) or len(lengths) > 64:
        raise fields.refused("lengths", "must be a list of at most 64 numbers of tokens.")
    return tuple(lengths)


def _fitting(engine: Engine, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """The default lengths that fit in a canvas; lengths from a client stay as they are."""
    if lengths is not LENGTHS:
        return lengths
    return tuple(each for each in lengths if each <= engine.model.config.canvas_length - 2)


def _filled(found: Filled) -> dict[str, Any]:
    told = asdict(found)
    told["scores"] = {str(length): score for length, score in found.scores.items()}
    return told


def _figures(found: Any) -> dict[str, Any]:
    told = {"cut": found.cut, "passes": found.passes}
    return {**told, "converged": found.converged, "seed": found.seed}


# One canvas.


async def _canvas(engine: Engine, fields: Fields, most: int) -> CanvasAsked:
    """One canvas as a request to `/v1/canvas` or `/v1/canvas/alternatives` asks for it."""
    fields.text("model")
    prompt = fields.get("prompt")
    if prompt is not None and fields.get("messages") is not None:
        raise fields.refused("messages", "and a prompt are given; leave one of them out.")
    messages = None if prompt is not None else messages_of(fields, engine, most)
    if prompt is not None and not isinstance(prompt, (str, list)):
        raise fields.refused("prompt", "must be a text, or token ids.")
    asked = Asked(
        messages=messages,
        prompt=prompt,
        system=fields.text("system"),
        temperature=fields.number("temperature", 0.0),
        seed=fields.integer("seed", 0),
        **knobs(fields),
    )
    prepared: Prepared = await asyncio.to_thread(prepare, engine, asked)
    length = canvas_length(engine.model, prepared.config)
    vocab = engine.model.config.text.vocab_size
    initial = _ids(fields, "diffusion_seed_canvas", vocab)
    if initial is not None and len(initial) != length:
        raise fields.refused(
            "diffusion_seed_canvas", f"has {len(initial)} tokens, and the canvas has {length}."
        )
    pins = _pins(fields, "pins", length, vocab)
    for place in _ids(fields, "diffusion_pinned", length) or ():
        if initial is None:
            raise fields.refused("diffusion_pinned", "needs diffusion_seed_canvas.")
        pins.setdefault(place, initial[place])
    wanted = tuple(dict.fromkeys(_ids(fields, "logprob_token_ids", vocab) or ()))
    if len(wanted) > _MOST_WANTED:
        raise fields.refused("logprob_token_ids", f"are more than {_MOST_WANTED}.")
    constrained = fields.flag("diffusion_constrained")
    if constrained and not wanted:
        raise fields.refused("diffusion_constrained", "needs logprob_token_ids.")
    changes = [_change(each, length, vocab) for each in fields.objects("changes")]
    if len(changes) > _MOST_CHANGES:
        raise fields.refused("changes", f"are more than {_MOST_CHANGES}.")
    top = fields.integer("top", 1)
    if top is not None and top > _MOST_TOP:
        raise fields.refused("top", f"must be {_MOST_TOP} at most.")
    return CanvasAsked(
        prepared.encoded,
        replace(prepared.config, canvas_length=length, max_tokens=length),
        length,
        prepared.seed,
        index=fields.integer("canvas_index", 0) or 0,
        initial=initial,
        allowed=wanted if constrained else (),
        changes=(Change(0, pins), *sorted(changes, key=lambda each: each.after)),
        top=top or 8,
        wanted=wanted,
    )


def _change(fields: Fields, length: int, vocab: int) -> Change:
    after = fields.integer("after", 0, required=True) or 0
    noise = fields.within("noise")
    start = stop = 0
    strength = 1.0
    if noise is not None:
        start = noise.integer("start", 0, required=True) or 0
        stop = noise.integer("stop", 0, required=True) or 0
        given = noise.number("strength", 0.0)
        strength = 1.0 if given is None else given
        if not start < stop <= length:
            raise fields.refused("noise", f"must be a span within {length} positions.")
        if strength > 1:
            raise noise.refused("strength", "must be 1 at most.")
        noise.settle({})
    pins = _pins(fields, "pins", length, vocab)
    found = Change(
        after, pins, start, stop, strength, fields.integer("seed", 0), fields.integer("step", 1)
    )
    fields.settle({})
    return found


def _pins(fields: Fields, key: str, length: int, vocab: int) -> dict[int, int | None]:
    """Tokens by their positions; null lets a position go."""
    found: dict[int, int | None] = {}
    for name, token in (fields.mapping(key) or {}).items():
        place = int(name) if name.isascii() and name.isdecimal() and len(name) < 10 else length
        if place >= length:
            raise fields.refused(f"{key}.{name:.20}", f"must be a position below {length}.")
        if token is not None and not (is_integer(token) and 0 <= token < vocab):
            raise fields.refused(f"{key}.{name}", f"must be a token id below {vocab}.")
        found[place] = token
    return found


def _ids(fields: Fields, key: str, below: int) -> tuple[int, ...] | None:
    values = fields.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or not all(map(is_integer, values)):
        raise fields.refused(key, "must be a list of integers.")
    for place, value in enumerate(values):
        if not 0 <= value < below:
            raise fields.refused(f"{key}.{place}", f"must be from 0 to {below - 1}.")
    return tuple(values)


def _submit(engine: Engine, asked: CanvasAsked) -> Any:
    return engine.submit(
        lambda seat: canvas_work(seat, asked),
        prompt_tokens=len(asked.encoded.ids),
        answer_tokens=asked.length,
        canvas_length=asked.length,
    )


async def _last(ticket: Any) -> dict[str, Any]:
    """The last value of a ticket."""
    found: dict[str, Any] | None = None
    async with ticket:
        async for value in ticket:
            found = value
    if found is None:
        raise UsageError("nothing came of it.")
    return found


async def _events(engine: Engine, asked: CanvasAsked) -> AsyncIterator[dict[str, Any] | str]:
    async with _submit(engine, asked) as ticket:
        async for value in ticket:
            yield value
    yield "[DONE]"

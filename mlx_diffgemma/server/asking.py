"""Asking the engine for text: `Asked` goes in, `Piece`s come out, whatever the protocol."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from mlx_diffgemma.diffusion.generate import reserved
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.server.engine import Engine
from mlx_diffgemma.server.jobs import Ticket
from mlx_diffgemma.server.pieces import Asked, Ended, Piece
from mlx_diffgemma.server.preparing import Prepared, count, prepare
from mlx_diffgemma.server.working import encoding, work_of


async def answer(engine: Engine, *asked: Asked) -> AsyncGenerator[Piece, None]:
    """The pieces of all answers as they come. Those of the first request have the indices from 0
    to n − 1, and those of each further one go on from there. Close the iterator (`aclosing`) to
    cancel what still runs.

    Each answer is what its seed gives alone: of free text, what `stream_generate` gives.

    Raises:
        UsageError, PromptError, RefusedError: a request is malformed or contradicts itself, or the
            form that was asked for could not be kept (422).
        MemoryShortageError: a request does not fit into memory.
        QueueFullError: too many requests wait, or the server is about to end.
        NumericalError: the model returned values that are not finite.
    """
    answers = sum(each.n for each in asked)
    if answers > engine.settings.queue:
        raise UsageError(
            f"{answers} answers are asked for, and {engine.settings.queue} requests may wait; ask "
            "for fewer at a time."
        )
    prepared = [await asyncio.to_thread(prepare, engine, each) for each in asked]
    tickets: list[Ticket] = []
    try:
        for each in prepared:
            known = await _encoded_once(engine, each) if each.asked.n > 1 else None
            for number in range(each.asked.n):
                work = work_of(each, number, len(tickets), known)
                tickets.append(_submit(engine, each, work))
        async for piece in _merged(tickets):
            if isinstance(piece, Ended):
                engine.counters.tokens += piece.completion_tokens
            yield piece
    finally:
        for ticket in tickets:
            ticket.cancel()


async def count_tokens(engine: Engine, asked: Asked) -> int:
    """Number of tokens of the prompt that a request makes.

    Raises:
        UsageError, PromptError, RefusedError: the prompt is malformed or cannot be rendered.
    """
    return await asyncio.to_thread(count, engine, asked)


def _submit(engine: Engine, prepared: Prepared, work: Any) -> Ticket:
    return engine.submit(
        work,
        prompt_tokens=len(prepared.encoded.ids),
        answer_tokens=reserved(engine.model, prepared.config),
        canvas_length=prepared.config.canvas_length,
    )


async def _encoded_once(engine: Engine, prepared: Prepared) -> int:
    """Encode a prompt that several answers begin from, for the engine to keep. Returns how many of
    its tokens were known."""
    known = 0
    async with _submit(engine, prepared, encoding(prepared)) as ticket:
        async for found in ticket:
            known = found
    return known


async def _merged(tickets: Sequence[Ticket]) -> AsyncIterator[Any]:
    """The values of all tickets as they come; the first error of a ticket is raised."""
    if len(tickets) == 1:
        async for value in tickets[0]:
            yield value
        return
    values: asyncio.Queue[tuple[Any, BaseException | None]] = asyncio.Queue(1)

    async def pump(ticket: Ticket) -> None:
        error: BaseException | None = None
        try:
            async for value in ticket:
                await values.put((value, None))
        except Exception as raised:
            error = raised
        await values.put((None, error))

    pumps = [asyncio.create_task(pump(ticket)) for ticket in tickets]
    try:
        left = len(pumps)
        while left:
            value, error = await values.get()
            if error is not None:
                raise error
            if value is None:
                left -= 1
            else:
                yield value
    finally:
        for each in pumps:
            each.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

"""Bodies of requests and of responses: JSON that is bounded, and streams that stay alive.

A client that goes away cancels the task that serves it, in whatever it waits for: a handler need do
no more than `try: ... finally: ticket.cancel()`.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mlx_diffgemma.server import logs
from mlx_diffgemma.server.config import ServerSettings
from mlx_diffgemma.server.refusals import RefusedError, Shape, refusal, shaped
from mlx_diffgemma.server.security import check_bounds

Event = str | bytes | Mapping[str, Any]
"""A JSON object, a text as it stands behind `data: `, or bytes that are sent as they are."""

KEEP_ALIVE_SECONDS = 10.0
STALL_SECONDS = 60.0  # after which a client that reads nothing is dropped
BODY_SECONDS = 30.0  # that a client may take for the next piece of its body
_CANCELLING_SECONDS = 0.5  # after which a request that goes on is cancelled once more
_AHEAD = 16  # events that wait for a client that reads slowly
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Lifeline:
    """Middleware that cancels the task of a request whose client has gone away."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer while the client is there."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        messages: asyncio.Queue[Any] = asyncio.Queue(1)
        over = False

        async def watch() -> None:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                await messages.put(message)

        async def send_on(message: Any) -> None:
            nonlocal over
            # The server reports a disconnect after the last piece of every response.
            over = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        answering = asyncio.create_task(self._app(scope, messages.get, send_on))
        watching = asyncio.create_task(watch())
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
            if over:
                await asyncio.wait({answering})
        finally:
            watching.cancel()
            # `asyncio.wait_for` may lose a cancellation, so one is not enough.
            while not answering.done():
                scope["gone"] = True
                answering.cancel()
                await asyncio.wait({answering}, timeout=_CANCELLING_SECONDS)
            await asyncio.wait({watching})
        if not scope.get("gone"):
            try:
                answering.result()
            except ClientDisconnect:
                scope["gone"] = True


class Streaming(Response):
    """A response whose body comes event by event, with something harmless in long silences.

    The first event decides the status: what `events` raises before it is an error of HTTP, and what
    it raises after it is one last event.

    Args:
        events: the events to send; the iterator is closed however the response ends.
        encode: returns an event as bytes.
        keep_alive: bytes to send in silences; nothing is sent where they are empty.
        media_type: media type of the body.
        failed: returns an error as the last event; None sends the body of the protocol's error.
        headers: further headers.

    Attributes:
        shape: how the protocol spells an error, set by whoever serves the route.
    """

    shape: Shape

    def __init__(
        self,
        events: AsyncIterator[Event],
        *,
        encode: Callable[[Event], bytes],
        keep_alive: bytes,
        media_type: str,
        failed: Callable[[RefusedError], Event] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self._events, self._encode, self._keep_alive = events, encode, keep_alive
        self._failed = failed
        self.init_headers(
            {"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})}
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events as they come."""
        queue: asyncio.Queue[Any] = asyncio.Queue(_AHEAD)
        pump = asyncio.create_task(self._pump(queue))
        waiting: asyncio.Task[Any] | None = None
        started = False
        try:
            while True:
                waiting = waiting or asyncio.create_task(queue.get())
                done, _ = await asyncio.wait({waiting}, timeout=KEEP_ALIVE_SECONDS)
                event = waiting.result() if done else self._keep_alive
                waiting = None if done else waiting
                if isinstance(event, Exception):
                    logs.failed(scope, refusal(event).status, event)
                if isinstance(event, Exception) and not started:
                    await shaped(refusal(event), self.shape)(scope, receive, send)
                    return
                if not started:
                    await self._start(send)
                    started = True
                if event is None:
                    break
                if isinstance(event, Exception):
                    await self._send(scope, send, self._encode(self._last(refusal(event))))
                    break
                if event:
                    await self._send(scope, send, self._encode(event))
            await self._send(scope, send, b"", more=False)
        finally:
            for task in (pump, *([waiting] if waiting else [])):
                task.cancel()
            await asyncio.wait({pump})

    async def _pump(self, queue: asyncio.Queue[Any]) -> None:
        """Put every event into the queue, and at the end None or what was raised."""
        try:
            async for event in self._events:
                await queue.put(event)
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)
        finally:
            close = getattr(self._events, "aclose", None)
            if close is not None:
                await close()

    def _last(self, error: RefusedError) -> Event:
        if self._failed is not None:
            return self._failed(error)
        return bytes(shaped(error, self.shape).body).decode()

    async def _start(self, send: Any) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )

    async def _send(self, scope: Any, send: Any, body: bytes, *, more: bool = True) -> None:
        """Hand over a piece of the body, and wait while the client does not read.

        Raises:
            ClientDisconnect: the client has not read for too long; the connection is cut.
        """
        message = {"type": "http.response.body", "body": body, "more_body": more}
        try:
            await _within(STALL_SECONDS, send(message))
        except asyncio.TimeoutError:
            cut = scope.get("state", {}).get("cut")
            if cut is not None:
                cut()
            raise ClientDisconnect() from None


def sse(
    events: AsyncIterator[Event],
    *,
    keep_alive: bytes = b": keep-alive\n\n",
    failed: Callable[[RefusedError], Event] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Streaming:
    """A response of server-sent events: an object or a text is one `data:` line, bytes are sent as
    they are (see `named`). The arguments are those of `Streaming`."""
    return Streaming(
        events,
        encode=_as_sse,
        keep_alive=keep_alive,
        media_type="text/event-stream",
        failed=failed,
        headers=headers,
    )


def json_lines(
    events: AsyncIterator[Event],
    *,
    keep_alive: bytes = b"",
    failed: Callable[[RefusedError], Event] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Streaming:
    """A response of JSON objects, one on each line. The arguments are those of `Streaming`."""
    return Streaming(
        events,
        encode=_as_line,
        keep_alive=keep_alive,
        media_type="application/x-ndjson",
        failed=failed,
        headers=headers,
    )


def named(name: str, value: Mapping[str, Any]) -> bytes:
    """A server-sent event with a name."""
    return b"event: " + name.encode() + b"\n" + _as_sse(value)


def _as_sse(event: Event) -> bytes:
    if isinstance(event, bytes):
        return event
    text = event if isinstance(event, str) else _compact(event)
    return b"data: " + text.encode() + b"\n\n"


def _as_line(event: Event) -> bytes:
    if isinstance(event, bytes):
        return event
    return (event if isinstance(event, str) else _compact(event)).encode() + b"\n"


def _compact(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body, within the bounds of the server's settings.

    Raises:
        RefusedError: the body is no UTF-8, no JSON, no object, beyond a bound, or holds what is no
            text (400); it does not arrive (408), is too long (413), or is compressed (415).
    """
    settings: ServerSettings = request.app.state.server.settings
    body = await _read_body(request, settings.max_body)
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RefusedError(400, f"the body is not UTF-8 (byte {error.start}).") from None
    try:
        content = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise RefusedError(400, "the body is nested too deep.") from None
    except ValueError as error:
        raise RefusedError(400, f"the body is not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise RefusedError(400, "the body must be a JSON object.")
    check_bounds(content, settings, surrogates=_SURROGATE.search(body) is not None)
    if settings.log_prompts:
        logs.note(request.scope, body=text)
    return content


async def _read_body(request: Request, most: int) -> bytes:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RefusedError(415, "a body with a content-encoding is not read; send it as it is.")
    too_long = RefusedError(413, f"the body has more than {most} bytes; send less (--max-body).")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_long
    body = bytearray()
    pieces = request.stream()
    while True:
        try:
            piece = await _within(BODY_SECONDS, anext(pieces, None))
        except asyncio.TimeoutError:
            raise RefusedError(
                408, "the body did not arrive; send it again.", headers={"connection": "close"}
            ) from None
        if piece is None:
            return bytes(body)
        body += piece
        if len(body) > most:
            raise too_long


async def _within(seconds: float, awaitable: Awaitable[Any]) -> Any:
    """What `awaitable` gives within `seconds`. `asyncio.wait_for` would lose a cancellation that
    comes when the awaitable is just done.

    Raises:
        asyncio.TimeoutError: it takes longer.
    """
    waiting = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait({waiting}, timeout=seconds)
    finally:
        over = waiting.done()
        waiting.cancel()
    if not over:
        raise asyncio.TimeoutError
    return waiting.result()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")

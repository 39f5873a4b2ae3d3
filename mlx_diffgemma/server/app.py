"""The server: its routes, and what every one of them has in common."""

from __future__ import annotations

import asyncio
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mlx_diffgemma import __version__
from mlx_diffgemma.server import logs, metrics
from mlx_diffgemma.server.config import ServerSettings
from mlx_diffgemma.server.refusals import RefusedError, Shape, refusal, shaped
from mlx_diffgemma.server.security import Gate
from mlx_diffgemma.server.streams import Lifeline, Streaming

if TYPE_CHECKING:
    from mlx_diffgemma.server.engine import Engine

PROTOCOLS = ("openai", "mercury", "canvas", "anthropic", "ollama", "decisions", "page")
"""Modules of this room, each with `routes(server) -> list[Route]` and `error`, a `Shape`."""

_STOPPING_SECONDS = 1.0  # for the engine to cancel what still runs
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_GONE = 499


class Server:
    """What the handlers of all routes share: the engine, the settings and the counts.

    Args:
        load: returns the engine; it is called in a thread of its own when the server starts.
        settings: settings of the server.
        name: what the model is called until it is loaded.

    Attributes:
        settings: settings of the server.
        metrics: counts of what was asked.
        name: name of the model; until it is loaded, the name that was given.
        about: further fields of the answer of `/health`, set by what loads the model.
        failure: why the model could not be loaded, or None.
    """

    def __init__(
        self, load: Callable[[], Engine], settings: ServerSettings, *, name: str = ""
    ) -> None:
        self.settings, self.name = settings, name
        self.metrics = metrics.Metrics()
        self.about: dict[str, Any] = {}
        self.failure: BaseException | None = None
        self._load = load
        self._engine: Engine | None = None
        self._started = time.monotonic()
        self._loading = threading.Thread(target=self.open, name="loading", daemon=True)
        self._shapes: list[tuple[Route, Shape]] = []

    @property
    def engine(self) -> Engine:
        """The engine that answers requests.

        Raises:
            RefusedError: the model is still being loaded, or could not be (503).
        """
        if self.failure is not None:
            raise RefusedError(503, "the model could not be loaded; the server ends.")
        if self._engine is None:
            raise RefusedError(
                503, "the model is still being loaded; try again soon.", retry_after=2
            )
        return self._engine

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return self._engine is not None

    def start(self) -> None:
        """Begin to load the model."""
        self._loading.start()

    async def stop(self, seconds: float = _STOPPING_SECONDS) -> None:
        """Cancel what still runs and end the engine."""
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop, seconds)

    def shape_of(self, path: str) -> Shape:
        """How errors are spelt at a path: as at the route whose path begins most like it."""
        near = sorted(self._shapes, key=lambda each: -_common(each[0].path, path))
        return near[0][1] if near else _plain

    def guarded(self, routes: Sequence[Route], shape: Shape) -> list[Route]:
        """`routes` with handlers whose exceptions become responses in the shape of their
        protocol."""
        made = []
        for route in routes:
            run = _guarded(route, shape)
            made.append(Route(route.path, run, methods=route.methods, name=route.name))
            self._shapes.append((made[-1], shape))
        return made

    def open(self) -> None:
        """Load the model in the thread that calls this; `failure` holds what went wrong, if
        anything."""
        try:
            self._engine = self._load()
            self.name = self._engine.name
        except BaseException as error:
            self.failure = error

    async def health(self, request: Request) -> Response:
        """`GET /health`: whether requests are answered, and by which model."""
        engine = self._engine
        broken = self.failure is not None or (engine is not None and not engine.alive)
        state = "failed" if broken else "loading" if engine is None else "ok"
        told: dict[str, Any] = {"status": state, "model": self.name, "version": __version__}
        if engine is not None:
            told |= {
                **self.about,
                "context": engine.context,
                "running": engine.counters.running,
                "waiting": engine.counters.waiting,
            }
        else:
            told["seconds"] = round(time.monotonic() - self._started, 1)
        return JSONResponse(told, 200 if state == "ok" else 503)

    async def show_metrics(self, request: Request) -> Response:
        """`GET /metrics`: all counts, in the text form of Prometheus."""
        lines: list[str] = [*self.metrics.lines()]
        if self._engine is not None:
            lines += metrics.of_engine(self._engine.counters)
        return PlainTextResponse("\n".join(lines) + "\n", media_type=metrics.MEDIA_TYPE)


def create_app(
    engine: Engine | Callable[[], Engine],
    settings: ServerSettings | None = None,
    *,
    name: str = "",
    protocols: Sequence[Any] | None = None,
) -> Starlette:
    """The application; `app.state.server` is its `Server`.

    Args:
        engine: the engine, or a function that loads it. The function is called in a thread of its
            own once the server has started, and requests are refused with 503 until it returns.
        settings: settings of the server; None takes the defaults.
        name: what the model is called until it is loaded.
        protocols: modules with `routes` and `error`; None takes all of `PROTOCOLS`.
    """
    settings = settings or ServerSettings()
    server = Server(engine if callable(engine) else lambda: engine, settings, name=name)
    if not callable(engine):
        server.open()
    if protocols is None:
        names = [f"mlx_diffgemma.server.{each}" for each in PROTOCOLS]
        protocols = [import_module(name) for name in names]
    routes = [
        *server.guarded([Route("/health", server.health)], _plain),
        *server.guarded([Route("/metrics", server.show_metrics)], _plain),
    ]
    for protocol in protocols:
        routes += server.guarded(protocol.routes(server), protocol.error)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if not server.ready:
            server.start()
        yield
        await server.stop()

    async def missing(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = "no such route" if error.status_code == 404 else "no such method here"
        refused = RefusedError(
            error.status_code,
            f"{request.method} {request.url.path[:200]}: {what}; docs/server.md lists them.",
            headers=error.headers,
        )
        return shaped(refused, server.shape_of(request.url.path))

    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={HTTPException: missing},
        middleware=[
            Middleware(Observed, server=server),
            Middleware(Gate, settings=settings, shape_of=server.shape_of),
            Middleware(Lifeline),
        ],
    )
    app.state.server = server
    return app


class Observed:
    """Middleware that gives every request an id, counts it and writes its line to the log."""

    def __init__(self, app: Any, server: Server) -> None:
        self._app, self._server = app, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, count it, and log its line."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["request_id"], status = request_id, 0
        started, counts = time.monotonic(), self._server.metrics

        async def send_on(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        counts.open += 1
        try:
            await self._app(scope, receive, send_on)
        except Exception as error:
            logs.failed(scope, 500, error)
            if status:
                raise
            refused = shaped(refusal(error), self._server.shape_of(scope["path"]))
            await refused(scope, receive, send_on)
        finally:
            counts.open -= 1
            gone = bool(scope.get("gone"))
            seconds = time.monotonic() - started
            route = scope["route"].path if "route" in scope else "other"
            counts.ended(route, _known(scope["method"]), _GONE if gone else status, seconds, gone)
            logs.log.info(
                logs.line(
                    event="request",
                    id=request_id,
                    client=(scope.get("client") or ("",))[0],
                    method=scope["method"],
                    path=scope["path"],
                    status=_GONE if gone else status,
                    seconds=seconds,
                    **scope.get("log", {}),
                )
            )


def _guarded(route: Route, shape: Shape) -> Callable[[Request], Any]:
    async def run(request: Request) -> Response:
        request.scope["route"] = route
        try:
            response = await route.endpoint(request)
        except Exception as error:
            refused = refusal(error)
            logs.failed(request.scope, refused.status, error)
            return shaped(refused, shape)
        if isinstance(response, Streaming):
            response.shape = shape
        return response

    return run


def _plain(status: int, message: str, param: str | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "param": param}}, status)


def _common(one: str, other: str) -> int:
    """How many parts two paths have in common at their beginning."""
    return sum(1 for _ in _same(one.split("/"), other.split("/")))


def _same(one: Sequence[str], other: Sequence[str]) -> Iterator[str]:
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs and not mine.startswith("{"):
            return
        yield mine


def _known(method: str) -> str:
    """A method as a label of a metric; those that clients make up share the label "other"."""
    return method if method in ("GET", "HEAD", "POST", "OPTIONS", "DELETE", "PUT") else "other"

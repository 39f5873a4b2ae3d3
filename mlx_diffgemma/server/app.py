"""The server: its routes, and what every one of them has in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mlx_diffgemma.server.config import ServerSettings
from mlx_diffgemma.server.logs import note_failure
from mlx_diffgemma.server.refusals import RefusedError, Shape, refusal, shaped
from mlx_diffgemma.server.streams import Streaming

if TYPE_CHECKING:
    from mlx_diffgemma.server.engine import Engine

PROTOCOLS = ("openai", "mercury", "canvas", "anthropic", "ollama", "decisions")
"""Modules of this room, each with `routes(server) -> list[Route]` and `error`, a `Shape`."""


@dataclass
class Server:
    """What handlers are given.

    Attributes:
        settings: the server's.
    """

    settings: ServerSettings = field(default_factory=ServerSettings)
    _engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            RefusedError: the model is still being loaded (503).
        """
        if self._engine is None:
            raise RefusedError(503, "the model is still loading; ask again soon.", retry_after=2)
        return self._engine


def create_app(
    engine: Engine | Callable[[], Engine], settings: ServerSettings | None = None
) -> Starlette:
    """The application.

    Args:
        engine: the engine, or what loads it; that is called in a thread of its own once the server
            has started, and requests are refused with 503 until it returns.
    """
    server = Server(settings or ServerSettings())
    server._engine = None if callable(engine) else engine
    routes = []
    for name in PROTOCOLS:
        if find_spec(f"mlx_diffgemma.server.{name}"):
            module: Any = import_module(f"mlx_diffgemma.server.{name}")
            routes += [_guarded(route, module.error) for route in module.routes(server)]
    app = Starlette(routes=routes)
    app.state.server = server
    return app


def _guarded(route: Route, shape: Shape) -> Route:
    """The same route; what its handler raises is a response in the shape of its protocol."""
    endpoint: Any = route.endpoint

    async def run(request: Request) -> Response:
        try:
            response = await endpoint(request)
        except Exception as error:
            note_failure(error)
            return shaped(refusal(error), shape)
        if isinstance(response, Streaming):
            response.shape = shape
        return response

    return Route(route.path, run, methods=route.methods, name=route.name)

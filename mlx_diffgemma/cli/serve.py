"""`mlx-diffgemma serve`: one model in memory for every program that asks."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mlx_diffgemma.cli.command import command
from mlx_diffgemma.cli.errors import INTERRUPTED
from mlx_diffgemma.cli.remote import KEY, identity
from mlx_diffgemma.cli.settings import DEFAULT_MODEL, Loading
from mlx_diffgemma.distributed.line import Ending, RanksError
from mlx_diffgemma.errors import DiffGemmaError, UsageError
from mlx_diffgemma.server.config import ServerSettings

if TYPE_CHECKING:
    from mlx_diffgemma.server.app import Server
    from mlx_diffgemma.server.engine import Engine

_NEEDED = ("greenlet", "starlette", "uvicorn")
_GB = 1e9
_FAREWELL_SECONDS = 2.0  # for clients to be told that another Mac is lost
_TICK = 0.25  # seconds
_CLEAR = "\r\x1b[K" if sys.stderr is not None and sys.stderr.isatty() else ""


@command(
    "mlx-diffgemma serve --model demo",
    "mlx-diffgemma serve --port 11434 --allow-origin https://app.example",
    "MLX_DIFFGEMMA_API_KEY=secret mlx-diffgemma serve --host 0.0.0.0",
)
def serve(*, loading: Loading, settings: ServerSettings) -> None:
    """Keep a model in memory and answer programs over HTTP: those of OpenAI, Anthropic and Ollama,
    editors, and this one.

    docs/server.md lists the routes. Ctrl-C ends within five seconds, a second one at once.
    """
    check_packages("serve")
    if settings.api_key is None and os.environ.get(KEY):
        settings = replace(settings, api_key=os.environ[KEY])
    from mlx_diffgemma.server import lifecycle, logs
    from mlx_diffgemma.server.app import create_app
    from mlx_diffgemma.server.security import check_exposure

    check_exposure(settings)
    sockets = lifecycle.listen(settings)
    logs.start()
    name = loading.model or DEFAULT_MODEL
    app = create_app(lambda: _engine(loading, settings, server), settings, name=name)
    server: Server = app.state.server
    telling = _Telling(server, lifecycle.url(sockets), loading)
    code = 0
    try:
        lifecycle.run(app, sockets, on_tick=telling.is_over)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if server.failure is not None:
        raise server.failure
    if loading.ranks is not None:
        loading.ranks.end(Ending(code))
    # Loading cannot be broken off, and Python would tidy up for seconds, so the process ends here.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check_packages(asked: str) -> None:
    """Raise UsageError where a package is not installed that a server needs.

    Args:
        asked: the command or option that needs it, as the user gave it.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{asked} needs {', '.join(missing)}: pip install 'mlx-diffgemma[server]' brings it."
        )


def _engine(loading: Loading, settings: ServerSettings, server: Server) -> Engine:
    from mlx_diffgemma.cli.opening import open_model
    from mlx_diffgemma.fitting import diffusion_config
    from mlx_diffgemma.server.engine import Engine, EngineSettings

    opened = open_model(loading)
    server.about = {
        "identity": identity(loading),
        "max_tokens": diffusion_config(opened.model).max_tokens,
        "canvas_length": opened.model.config.canvas_length,
    }
    kept = settings.prefix_cache
    engine = Engine(
        opened.model,
        opened.tokenizer,
        name=opened.name,
        settings=EngineSettings(
            max_batch=settings.max_batch,
            queue=settings.max_queue,
            prefix_bytes=None if kept is None else int(kept * _GB),
        ),
        settle=loading.ranks.settle if loading.ranks is not None else lambda error: None,
    )
    if loading.ranks is not None:
        loading.ranks.farewell = _farewell(engine)
    return engine


def _farewell(engine: Engine) -> Callable[[Ending], None]:
    """What is done when another Mac is lost: clients are told to try again (503), after which the
    server ends by itself, as a rule."""

    def tell(ending: Ending) -> None:
        engine.fail(RanksError(ending.line or "the ranks end.", ending.code))
        time.sleep(_FAREWELL_SECONDS)

    return tell


class _Telling:
    """Says on stderr how loading goes, and then where the server is and how to try it.

    Args:
        server: the server that loads.
        url: URL of the server.
        loading: the model that is loaded.
    """

    def __init__(self, server: Server, url: str, loading: Loading) -> None:
        self._server, self._url, self._loading = server, url, loading
        self._told = False
        if sys.stderr.isatty():
            threading.Thread(target=self._progress, name="progress", daemon=True).start()

    def is_over(self) -> bool:
        """Whether the server is to end because loading or the engine failed. The first call that
        finds the model loaded says so on stderr."""
        if self._server.ready and not self._told:
            self._told = True
            engine = self._server.engine
            key = "" if self._server.settings.api_key is None else f" -H 'x-api-key: '${KEY}"
            print(
                f"{_CLEAR}ready: {self._url} serves {engine.name} with a context of "
                f"{engine.context} tokens. Try:\n"
                f"  curl {self._url}/v1/chat/completions{key} -d "
                """'{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'""",
                file=sys.stderr,
                flush=True,
            )
        if self._server.ready and self._server.engine.failure is not None:
            self._server.failure = self._server.engine.failure
        return self._server.failure is not None

    def _progress(self) -> None:
        """Show on one line of the terminal how much of the weights is in memory."""
        start, total = time.monotonic(), 0
        while not self._server.ready and self._server.failure is None:
            time.sleep(_TICK)
            core = sys.modules.get("mlx.core")
            read = core.get_active_memory() if core is not None else 0
            if not read:  # files are fetched, or modules imported
                continue
            total = total or _size(self._loading)
            of = f" of {total / _GB:.1f}" if total else ""
            seconds = time.monotonic() - start
            text = f"{read / _GB:.1f}{of} GB read, {seconds:.0f} s"
            print(f"{_CLEAR}{text}", end="", file=sys.stderr, flush=True)


def _size(loading: Loading) -> int:
    """Bytes of the weights, or 0 where that is not known, or this process loads a part of them."""
    from mlx_diffgemma.checkpoint.loading import weight_bytes
    from mlx_diffgemma.checkpoint.locate import locate

    if loading.ranks is not None:  # of which none may have the whole on its disk
        return 0
    try:
        return weight_bytes(locate(loading.model or DEFAULT_MODEL, loading.revision))
    except DiffGemmaError:  # loading will say what is wrong
        return 0

"""The settings of a server, each with the sentence that its option shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.reading import shown
from mlx_diffgemma.settings import Setting

DEFAULT_PORT = 8080
_SERVER, _LIMITS = "Server", "Limits"
_FROM_ONE = (
    "max_batch", "max_body", "max_connections", "max_depth", "max_image", "max_messages",
    "max_queue", "max_schema",
)  # fmt: skip


@dataclass(frozen=True)
class ServerSettings:
    """Where a server listens, whom it answers, and how much of one request it takes.

    Raises:
        UsageError: a value is out of range.
    """

    host: Annotated[
        str,
        Setting("Address to listen at; one that others can reach needs --api-key.", panel=_SERVER),
    ] = "127.0.0.1"
    port: Annotated[int, Setting("Port to listen at; 0 takes one that is free.", panel=_SERVER)] = (
        DEFAULT_PORT
    )
    api_key: Annotated[
        str | None,
        Setting(
            "Key that every request must carry; in the variable MLX_DIFFGEMMA_API_KEY it does not "
            "show in the list of processes.",
            panel=_SERVER,
        ),
    ] = None
    allow_origin: Annotated[
        tuple[str, ...],
        Setting(
            "Origin whose web pages may ask, such as https://app.example; it may be given several "
            "times, and '*' is all of them.",
            panel=_SERVER,
        ),
    ] = ()
    max_batch: Annotated[
        int, Setting("Canvases that share a denoising step at most.", panel=_SERVER)
    ] = 8
    max_queue: Annotated[
        int, Setting("Requests that may wait; more are refused with 503.", panel=_SERVER)
    ] = 256
    prefix_cache: Annotated[
        float | None,
        Setting(
            "Size in GB of what is kept of prompts for requests to come.",
            panel=_SERVER,
            default="an eighth of the free memory",
        ),
    ] = None
    max_body: Annotated[int, Setting("Bytes of the body of a request.", panel=_LIMITS)] = (
        32 * 1024 * 1024
    )
    max_depth: Annotated[
        int, Setting("Objects and lists inside one another in a request.", panel=_LIMITS)
    ] = 64
    max_messages: Annotated[int, Setting("Messages of one request.", panel=_LIMITS)] = 4096
    max_schema: Annotated[
        int, Setting("Bytes of the JSON schemas of one request.", panel=_LIMITS)
    ] = 256 * 1024
    max_image: Annotated[int, Setting("Bytes of one image.", panel=_LIMITS)] = 16 * 1024 * 1024
    max_connections: Annotated[int, Setting("Connections at a time.", panel=_LIMITS)] = 512
    log_prompts: Annotated[
        bool, Setting("Text of requests in the log, which else has none.", panel=_SERVER)
    ] = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise UsageError(f"--port must be between 0 and 65535, not {shown(self.port)}.")
        if self.prefix_cache is not None and not 0 <= self.prefix_cache < 1e6:
            raise UsageError(f"--prefix-cache must be a size in GB, not {self.prefix_cache:g}.")
        for name in _FROM_ONE:
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                found = shown(getattr(self, name))
                raise UsageError(f"--{flag} must be at least 1, not {found}.")

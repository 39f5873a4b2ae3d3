"""The settings of a server, each with the sentence that its option shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from mlx_diffgemma.settings import Setting

DEFAULT_PORT = 8080
_SERVER, _LIMITS = "Server", "Limits"


@dataclass(frozen=True)
class ServerSettings:
    """Where a server listens, whom it answers, and how much of one request it takes."""

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
            "Key that every request must carry; the variable MLX_DIFFGEMMA_API_KEY gives it too, "
            "and does not show it in the list of processes.",
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
    log_prompts: Annotated[
        bool, Setting("Text of requests in the log, which else has none.", panel=_SERVER)
    ] = False

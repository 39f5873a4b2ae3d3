"""Log lines: one JSON object each, with the id of the request, and no text of prompts."""

from __future__ import annotations

import logging

log = logging.getLogger("mlx_diffgemma.server")


def note_failure(error: BaseException) -> None:
    """Log what nobody is told of: the traceback of an error that no client can cause."""
    from mlx_diffgemma.server.refusals import refusal

    if refusal(error).status >= 500:
        log.error("a request failed", exc_info=error)

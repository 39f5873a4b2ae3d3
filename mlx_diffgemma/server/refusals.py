"""What a request is refused with: a status, one line, and the field that is to blame."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from starlette.responses import Response

from mlx_diffgemma.errors import (
    DiffGemmaError,
    MemoryShortageError,
    UsageError,
)

Shape = Callable[[int, str, str | None], Response]
"""How a protocol spells an error: (status, message, field or None) to a response."""


class RefusedError(DiffGemmaError):
    """A request that is not answered. A handler, and whatever it calls, may raise it at any time:
    the client gets it in the shape of the protocol that it speaks.

    Args:
        status: status of HTTP, 400 or above.
        message: one line that says what is wrong, where, and what to do.
        param: the field of the request that is to blame, such as "messages.0.content".
        retry_after: seconds after which the same request may be answered.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        *,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, round(retry_after)))


def refusal(error: BaseException) -> RefusedError:
    """What a client is told of an exception. Errors of this program keep their message, with status
    503 where trying again may help, 400 where the request is to blame, and 500 otherwise. Of any
    other exception a client is told only that something went wrong (500)."""
    if isinstance(error, RefusedError):
        return error
    retry_after = getattr(error, "retry_after", None)
    if retry_after is not None:
        return RefusedError(503, str(error), retry_after=retry_after)
    if isinstance(error, (UsageError, MemoryShortageError)):
        return RefusedError(400, str(error))
    if isinstance(error, DiffGemmaError):
        return RefusedError(500, str(error))
    return RefusedError(500, "something went wrong in the server; its log says what.")


def shaped(error: RefusedError, shape: Shape) -> Response:
    """A refusal as a protocol spells it."""
    response = shape(error.status, error.message, error.param)
    response.headers.update(error.headers)
    return response

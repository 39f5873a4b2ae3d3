"""Who is answered, and how much of a request is taken."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import re
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.reading import shown
from mlx_diffgemma.server.config import ServerSettings
from mlx_diffgemma.server.refusals import RefusedError, Shape, shaped

_OPEN_TO_ALL = ("/", "/health")
_PAGE = "/page/"  # files of the page, which asks for the key itself
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
_HEADERS = re.compile(r"[A-Za-z0-9, _-]{0,2000}")
_EXPOSED = "retry-after, x-request-id"
_LARGEST = 10**300
_SCHEMAS = ("response_format", "format", "json_schema", "schema", "tools", "output_config")


def is_loopback(host: str) -> bool:
    """Whether a name or an address, by its spelling alone, can be reached from this machine
    only."""
    name = host.strip("[]").lower().rstrip(".")
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def check_exposure(settings: ServerSettings) -> None:
    """Check who could use a server with these settings.

    Raises:
        UsageError: others could use it without a key, or a key or an origin is malformed.
    """
    key = settings.api_key
    if key is not None and not key.strip():
        raise UsageError("the API key is empty; give one with --api-key, or leave it out.")
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise UsageError("the API key must be of plain signs, without spaces around it.")
    if not is_loopback(settings.host) and key is None:
        raise UsageError(
            f"--host {shown(settings.host)} can be reached by others; set a key with --api-key (or "
            "MLX_DIFFGEMMA_API_KEY), or listen at 127.0.0.1."
        )
    for origin in settings.allow_origin:
        if origin not in ("*", "null") and not _is_origin(origin):
            raise UsageError(
                f"--allow-origin {shown(origin)} is no origin; write it as https://app.example, "
                "or '*'."
            )


def _is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    beyond = parts.path or parts.query or parts.fragment
    return bool(text.isascii() and text.isprintable() and parts.scheme and parts.netloc) and (
        not beyond
    )


class Gate:
    """Middleware that lets nobody in who is not meant to: it checks the host that a request names,
    the origin of the page that sends it, and the key.

    Args:
        app: the application behind the middleware.
        settings: settings of the server.
        shape_of: returns how errors are spelt at a path.
    """

    def __init__(
        self, app: Any, settings: ServerSettings, shape_of: Callable[[str], Shape]
    ) -> None:
        self._app, self._settings, self._shape_of = app, settings, shape_of
        self._local = is_loopback(settings.host)
        self._origins = frozenset(origin.lower() for origin in settings.allow_origin)
        self._key = None if settings.api_key is None else _digest(settings.api_key.encode())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on to the application, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        allowed: dict[str, str] = {}
        try:
            self._check_form(headers)
            if origin is not None:
                allowed = self._check_origin(origin, headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _preflight(headers, allowed)(scope, receive, send)
                return
            self._check_key(scope["path"], headers)
        except RefusedError as error:
            response = shaped(error, self._shape_of(scope["path"]))
            response.headers.update(allowed)
            await response(scope, receive, send)
            return

        async def send_allowed(message: Any) -> None:
            if allowed and message["type"] == "http.response.start":
                more = [(name.encode(), value.encode("latin-1")) for name, value in allowed.items()]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        await self._app(scope, receive, send_allowed)

    def _check_form(self, headers: Headers) -> None:
        """Refuse a request that does not name one host, or that says its length in two ways."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
            raise RefusedError(400, "the request needs one Host header that names a host.")
        if "transfer-encoding" in headers and "content-length" in headers:
            raise RefusedError(
                400,
                "the request says its length in two ways; send Content-Length or chunks.",
                headers={"connection": "close"},
            )
        name = hosts[0].rsplit(":", 1)[0] if not hosts[0].endswith("]") else hosts[0]
        if self._local and not is_loopback(name):
            raise RefusedError(
                403,
                f"the Host header names {name}, and this server answers to localhost alone; "
                "listen at another address with --host and --api-key.",
            )

    def _check_origin(self, origin: str, headers: Headers) -> dict[str, str]:
        """The headers that allow a page at this origin to read the answer; a foreign one is
        refused."""
        own = origin.lower() in (f"{scheme}://{headers['host']}".lower() for scheme in _WEB)
        if own:
            return {}
        if origin.lower() not in self._origins and "*" not in self._origins:
            raise RefusedError(
                403,
                f"pages of {origin[:200]!r} may not ask; --allow-origin allows them.",
            )
        return {
            "access-control-allow-origin": origin,
            "access-control-expose-headers": _EXPOSED,
            "vary": "Origin",
        }

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._key is None or path in _OPEN_TO_ALL or path.startswith(_PAGE):
            return
        known = [hmac.compare_digest(_digest(key), self._key) for key in _keys(headers)]
        if not any(known):
            raise RefusedError(
                401,
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY' or "
                "'x-api-key: KEY'.",
                headers={"www-authenticate": "Bearer"},
            )


_WEB = ("http", "https")


def _keys(headers: Headers) -> Iterable[bytes]:
    for value in headers.getlist("authorization"):
        scheme, _, key = value.partition(" ")
        if scheme.lower() == "bearer":
            yield key.strip().encode("latin-1")
    for value in headers.getlist("x-api-key"):
        yield value.strip().encode("latin-1")


def _digest(key: bytes) -> bytes:
    """A digest of a key. Digests have one length, so that comparing them tells nothing of the
    key."""
    return hashlib.sha256(key).digest()


def _preflight(headers: Headers, allowed: dict[str, str]) -> Response:
    """The answer to what a browser asks before a page's request."""
    if not allowed:
        return Response(status_code=204)
    wanted = headers.get("access-control-request-headers", "")
    more = {
        "access-control-allow-methods": "GET, POST, HEAD",
        "access-control-allow-headers": wanted if _HEADERS.fullmatch(wanted) else "",
        "access-control-max-age": "600",
    }
    if headers.get("access-control-request-private-network") == "true":
        more["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers={**allowed, **more})


def check_bounds(body: dict[str, Any], settings: ServerSettings, *, surrogates: bool) -> None:
    """Refuse a body that holds too much, or what no handler should have to think of: numbers
    beyond all bounds, and halves of characters.

    Args:
        body: the object that was parsed.
        settings: settings of the server, with the bounds.
        surrogates: whether there may be halves of characters.

    Raises:
        RefusedError: the body holds too much, or something of that kind (400 or 413).
    """
    messages = body.get("messages")
    if isinstance(messages, list) and len(messages) > settings.max_messages:
        raise RefusedError(
            400,
            f"messages has {len(messages)} items, and at most {settings.max_messages} are read.",
            "messages",
        )
    for key, value in body.items():
        if surrogates and _is_broken(key):
            raise RefusedError(400, "a field's name holds half of a character.")
        size, depth = _measure(value, key, settings, surrogates)
        if key in _SCHEMAS and size > settings.max_schema:
            raise RefusedError(
                400, f"{key} is too large; it may hold {settings.max_schema} bytes.", key
            )
        if depth > settings.max_depth:
            raise RefusedError(400, f"{key[:100]} is nested too deep.", key)


def _measure(value: Any, key: str, settings: ServerSettings, surrogates: bool) -> tuple[int, int]:
    """About how many bytes of JSON a value takes, and how deep it is."""
    size = depth = 0
    level = [value]
    while level and depth <= settings.max_depth:
        inside: list[Any] = []
        nested = False
        for each in level:
            if isinstance(each, (dict, list)):
                nested = True
                inside += [*each, *each.values()] if isinstance(each, dict) else each
            elif isinstance(each, str):
                size += len(each)
                _check_text(each, key, settings, surrogates)
            elif isinstance(each, (int, float)) and not _is_bounded(each):
                raise RefusedError(400, f"{key[:100]} holds a number that is too large.", key)
        size += 2 * len(inside)
        depth += nested
        level = inside
    return size, depth


def _is_bounded(number: float) -> bool:
    return math.isfinite(number) if isinstance(number, float) else abs(number) < _LARGEST


def _check_text(text: str, key: str, settings: ServerSettings, surrogates: bool) -> None:
    if len(text) > settings.max_image * 4 // 3 + 64:  # as base64, behind its kind
        raise RefusedError(413, f"{key[:100]} holds a text or an image that is too large.", key)
    if surrogates and _is_broken(text):
        raise RefusedError(400, f"{key[:100]} holds half of a character (a lone surrogate).", key)


def _is_broken(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)

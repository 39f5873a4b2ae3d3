"""A running server that answers in the place of a loaded model; this module imports nothing
heavy."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

from mlx_diffgemma.cli.remote_answers import Reading
from mlx_diffgemma.cli.settings import DEFAULT_MODEL, Asking, Denoising, Loading, Reaching
from mlx_diffgemma.errors import DiffGemmaError, UsageError
from mlx_diffgemma.reading import shown
from mlx_diffgemma.text.prompt_settings import PromptSettings

PLACE, KEY = "MLX_DIFFGEMMA_SERVER", "MLX_DIFFGEMMA_API_KEY"
DEFAULT_URL = "http://127.0.0.1:8080"
_LOOK_SECONDS = 0.3  # for a server that nobody named
_SILENCE = 60.0  # seconds; a stream that is alive says something more often
_LONGEST = 24 * 3600.0  # seconds of an answer that comes as a whole


class RemoteError(DiffGemmaError):
    """A server cannot be reached, or could not answer."""


def identity(loading: Loading) -> str:
    """A digest of what tells one loaded model from another, which reveals no folder of the
    machine."""
    name = loading.model or (None if loading.adapter_path else DEFAULT_MODEL)
    parts = (
        None if name is None else _whole(name),
        loading.revision,
        loading.adapter_path and _whole(loading.adapter_path),
        loading.chat_template and _template(loading.chat_template),
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _whole(name: str) -> str:
    """A folder by its whole path, anything else as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != "demo" and path.is_dir() else name


def _template(given: str) -> str:
    """The text of a template, of which a file may be named."""
    try:
        return given if "{" in given else Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, RuntimeError, ValueError):  # loading says what is wrong
        return given


def find(reaching: Reaching, loading: Loading, only_here: Mapping[str, bool]) -> Remote | None:
    """The server to ask: the one that is named, else one that runs at the usual place with the same
    model. None says that the model is to be loaded.

    Args:
        only_here: options that a server does not know, and whether they were given.

    Raises:
        UsageError: the options contradict each other, or the server has another model.
        RemoteError: the server that is named does not answer.
    """
    given = [option for option, is_given in only_here.items() if is_given]
    if reaching.server is None:
        place = os.environ.get(PLACE, DEFAULT_URL)
        alone = loading.check or loading.parallel or loading.weights or loading.ranks
        if reaching.no_server or given or alone or not place:
            return None
        try:
            remote = Remote(place, seconds=_LOOK_SECONDS)
        except DiffGemmaError:
            return None
        if remote.about.get("identity") != identity(loading):
            return None
        if sys.stderr.isatty():
            print(f"asking {remote.name} at {remote.url}", file=sys.stderr)
        return remote
    if reaching.no_server:
        raise UsageError("--server and --no-server contradict each other: drop one.")
    if loading.ranks is not None:
        raise UsageError("--server needs no other Macs: drop it, or run without mlx.launch.")
    if given:
        raise UsageError(f"{given[0]} does not go with --server: drop one.")
    remote = Remote(reaching.server)
    if loading != Loading() and remote.about.get("identity") != identity(loading):
        raise UsageError(
            f"{remote.url} serves {remote.name}, and another model is asked for; drop --model and "
            "what goes with it, or name another server."
        )
    return remote


class Remote:
    """A server that answers.

    Args:
        url: URL of the server.
        seconds: seconds that it may take to answer `/health`.

    Attributes:
        name: what the server calls its model.
        about: the answer of `/health`.

    Raises:
        UsageError: `url` is no URL.
        RemoteError: the server cannot be reached, is not ready, or is another kind of server.
    """

    def __init__(self, url: str, *, seconds: float = 10.0) -> None:
        self.url = url.rstrip("/")
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
        except ValueError:
            usable = False
        if not usable:
            raise UsageError(f"--server {shown(url)} is no URL; write it as {DEFAULT_URL}.")
        self._parts = parts
        with closing(self._connection(seconds)) as connection:
            response = self._request(connection, "GET", "/health", None)
            self.about = _read(response)
        if not {"status", "model", "version"} <= set(self.about):
            raise RemoteError(f"{self.url} is no server of mlx-diffgemma; name another.")
        self.name, state = str(self.about["model"]), self.about["status"]
        if state != "ok":
            told = "still loads" if state == "loading" else "could not load"
            raise RemoteError(f"{self.url} {told} {self.name}; try again later, or --no-server.")

    def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request as a whole.

        Raises:
            UsageError: the server refuses the request.
            RemoteError: the server does not answer, or fails.
        """
        with closing(self._connection(_LONGEST)) as connection:
            response = self._request(connection, "POST", path, body)
            found = _read(response)
            if response.status != 200:
                raise self._refusal(response.status, found)
        return found

    def events(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The events of a stream; closing the iterator ends the work.

        Raises:
            UsageError: the server refuses the request.
            RemoteError: the server does not answer, fails, or breaks off, at any time.
        """
        with closing(self._connection(_SILENCE)) as connection:
            response = self._request(connection, "POST", path, {**body, "stream": True})
            if response.status != 200:
                raise self._refusal(response.status, _read(response))
            try:
                for line in response:
                    data = line.strip().removeprefix(b"data: ")
                    if data == b"[DONE]":
                        return
                    if not data or data.startswith(b":"):
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise self._refusal(500, event)
                    yield event
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise self._broken(error) from None
        raise RemoteError(f"{self.url}: the answer broke off; ask again.")

    def _connection(self, seconds: float) -> http.client.HTTPConnection:
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        return kind(str(self._parts.hostname), self._parts.port, timeout=seconds)

    def _request(self, connection: Any, method: str, path: str, body: Any) -> Any:
        headers = {"content-type": "application/json"}
        if key := os.environ.get(KEY):
            headers["authorization"] = f"Bearer {key}"
        sent = None if body is None else json.dumps(body)
        try:
            connection.request(method, f"{self._parts.path}{path}", sent, headers)
            return connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from None

    def _broken(self, error: Exception) -> DiffGemmaError:
        if isinstance(error, ConnectionRefusedError):
            return RemoteError(
                f"no server listens at {self.url}; start one with mlx-diffgemma serve, or drop "
                "--server."
            )
        reason = str(error) or type(error).__name__
        if isinstance(error, socket.gaierror):
            reason = "no such host"
        return RemoteError(f"{self.url} does not answer ({reason}); see whether it runs.")

    def _refusal(self, status: int, body: Mapping[str, Any]) -> DiffGemmaError:
        told = body.get("error")
        message = told.get("message") if isinstance(told, dict) else told
        line = str(message or f"{self.url} answers with status {status}.")
        if status == 401:
            line = f"{self.url} wants a key; set {KEY}."
        return UsageError(line) if status in (400, 413) else RemoteError(line)

    # These methods send what the commands ask.

    def generate(
        self,
        messages: Sequence[Mapping[str, Any]] | str,
        settings: PromptSettings,
        stop: Sequence[str],
        denoising: Denoising,
    ) -> Generator[Any, None, None]:
        """An answer step by step, with the fields of a `GenerationResponse`; those that a server
        does not tell are empty."""
        path, body = self._body(messages, settings, denoising)
        if stop:
            body["stop"] = list(stop)
        body |= {"diffusion_frames": True, "stream_options": {"include_usage": True}}
        reading = Reading(self.about)
        with closing(self.events(path, body)) as events:
            for event in events:
                yield from reading.add(event)
        yield reading.last()

    def generate_valid(
        self,
        prompt: str,
        form: Mapping[str, Any],
        settings: PromptSettings,
        denoising: Denoising,
    ) -> Any:
        """A whole answer of a given form, with the fields of a `StructuredResponse`."""
        path, body = self._body([{"role": "user", "content": prompt}], settings, denoising)
        found = self.ask(path, {**body, "response_format": form, "logprobs": True})
        (choice,) = found["choices"]
        told, message = choice["diffusion"], choice["message"]
        return SimpleNamespace(
            text=message["content"],
            thought=message.get("reasoning_content", ""),
            tokens=tuple(told.get("tokens", ())),
            entropy=tuple(
                each["entropy"] for each in (choice["logprobs"] or {}).get("content", ())
            ),
            generation_tokens=found["usage"]["completion_tokens"],
            denoising_steps=tuple(told["denoising_steps"]),
            passes=sum(told["denoising_steps"]),
            converged=told["converged"],
            seed=told["seed"],
        )

    def edit(
        self,
        path: str,
        denoising: Denoising,
        prompting: Asking,
        prompt: str | None,
        lengths: Sequence[int] | None,
        **asked: Any,
    ) -> Any:
        """An edited text, with the fields of what `edit`, `fill` or `infill` returns, by `path`."""
        more = {
            "prompt": prompt,
            "system": prompting.system_prompt,
            "lengths": None if lengths is None else list(lengths),
        }
        body = {key: value for key, value in (asked | more).items() if value is not None}
        found = self.ask(path, {"model": self.name, **knobs(denoising), **body})
        filled = found.pop("filled", None)
        if path == "/v1/edit":
            found["filled"] = SimpleNamespace(**filled)
        elif path == "/v1/fill":
            found["filled"] = {name: SimpleNamespace(**each) for name, each in filled.items()}
        holes = [SimpleNamespace(**each) for each in found.pop("holes", ())]
        return SimpleNamespace(**found, holes=holes)

    def decide(
        self,
        questions: object,
        state: object,
        frame: str | None,
        prompting: Asking,
        seed: int | None,
        how: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The answers to typed questions, as JSON."""
        asked = {
            **how,
            "questions": questions,
            "state": state,
            "frame": frame,
            "seed": seed,
            "system_prompt": prompting.system_prompt,
            "raw": prompting.raw,
            "model": self.name,
        }
        body = {key: value for key, value in asked.items() if value is not None}
        found = self.ask("/v1/decisions", body)
        found["usage"].pop("cached_tokens", None)  # a model that was just loaded knows none
        return found

    def _body(
        self, messages: Any, settings: PromptSettings, denoising: Denoising
    ) -> tuple[str, dict[str, Any]]:
        body = {"model": self.name, **knobs(denoising)}
        body.setdefault("max_tokens", self.about.get("max_tokens"))
        if isinstance(messages, str):
            return "/v1/completions", {**body, "prompt": messages}
        if settings.system_prompt:
            messages = [{"role": "system", "content": settings.system_prompt}, *messages]
        body["messages"] = messages
        if settings.thinking is not None:
            body["reasoning_effort"] = "medium" if settings.thinking else "none"
        more = {"tools": settings.tools, "chat_template_kwargs": settings.chat_template_kwargs}
        return "/v1/chat/completions", body | {key: each for key, each in more.items() if each}


def knobs(denoising: Denoising) -> dict[str, Any]:
    """The fields of a request that say how to denoise."""
    changes: dict[str, Any] = dict(denoising.changes)
    found: dict[str, Any] = {}
    if "max_tokens" in changes:
        found["max_tokens"] = changes.pop("max_tokens")
    found |= {f"diffusion_{name}": value for name, value in changes.items()}
    if denoising.profile is not None:
        found["diffusion_profile"] = denoising.profile
    if denoising.seed is not None:
        found["seed"] = denoising.seed
    return found


def only_here(asking: Asking, how: PromptSettings | None = None) -> dict[str, bool]:
    """Options of a prompt that are not passed on to a server, each with whether it was given."""
    return {
        "--image or --video": how is not None and bool(how.images),
        "--markers": asking.markers,
        "--prefill-response": asking.prefill_response is not None,
        "--prefill-step-size": asking.prefill_step_size is not None,
        "--extra-eos-token": bool(asking.extra_eos_token),
    }


def _read(response: Any) -> dict[str, Any]:
    try:
        found = json.loads(response.read())
    except (OSError, ValueError, http.client.HTTPException):
        return {}
    return found if isinstance(found, dict) else {}

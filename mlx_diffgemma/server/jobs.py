"""Requests on the engine's thread: what their work is given, and what their clients see.

The work of a request runs as a greenlet. Where it wants a pass over its canvases, or has encoded a
chunk of its prompt, it pauses, and the engine goes on with another one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from greenlet import GreenletExit, greenlet

from mlx_diffgemma.diffusion.canvas import Canvas
from mlx_diffgemma.diffusion.denoiser import Denoiser, Look, Queued
from mlx_diffgemma.errors import DiffGemmaError, MemoryShortageError, NumericalError
from mlx_diffgemma.model.cache import Prefix, PrefixCache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.server.prefixes import KeptPrefixes

_CANCELLED = "the request was cancelled; send it again where it is still wanted."
_LOG = logging.getLogger(__name__)


class CancelledError(DiffGemmaError):
    """The request was cancelled by its client, or because the engine ends.

    Attributes:
        retry_after: seconds after which it is worth trying again.
    """

    retry_after = 1


class NoMemoryNowError(MemoryShortageError):
    """There is no memory at present for a request that fits into what this machine has offered.

    Attributes:
        retry_after: seconds after which it is worth trying again.
    """

    retry_after = 5


@dataclass
class Counters:
    """What the engine has done so far, and what it is doing.

    Attributes:
        requests: requests that were taken in.
        finished, cancelled, failed: requests that ended in each of these ways.
        waiting, running: requests that wait or run at present.
        steps: joint denoising steps, each with one wait for the device.
        canvas_steps: passes over a canvas: canvases of all steps.
        canvases: canvases that were begun.
        chunks: turns of encoding and of looks at a canvas.
        tokens: tokens of the whole answers of `asking.answer`.
        prompt_tokens: tokens of all prompts.
        cached_tokens: tokens of prompts that were known from earlier requests.
        step_seconds: seconds spent in joint steps.
        prefix_bytes: bytes held by prefixes that are kept.
        prefixes: number of prefixes that are kept.
        active_bytes, peak_bytes: bytes that MLX holds, and the most that it has held.
    """

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    waiting: int = 0
    running: int = 0
    steps: int = 0
    canvas_steps: int = 0
    canvases: int = 0
    chunks: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    step_seconds: float = 0.0
    prefix_bytes: int = 0
    prefixes: int = 0
    active_bytes: int = 0
    peak_bytes: int = 0


class Runs(Protocol):
    """The engine, as far as its requests need it.

    Attributes:
        hub: the greenlet of the engine itself.
    """

    model: DiffusionGemma
    tokenizer: Any
    prefixes: KeptPrefixes
    counters: Counters
    hub: greenlet

    def wake(self) -> None:
        """Have the engine's thread look at what has changed."""

    def ended(self, job: Job, error: BaseException | None) -> None:
        """Note that the work of a request is over, with the error that ended it. Its greenlet calls
        this as its last act."""


Work = Callable[["Seat"], "Iterable[Any] | None"]
"""What a request does: a function that runs on the engine's thread, whose values reach the
ticket."""


class Ticket(AsyncIterator[Any]):
    """A request as its client sees it, in the event loop that made it: an iterator over what the
    work emits. It raises what the work raised.

    Attributes:
        state: whether the request waits, runs, or is done.
    """

    def __init__(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        self._job, self._loop = job, loop
        self._values: asyncio.Queue[Any] = asyncio.Queue()
        self._ended = False
        self.state: Literal["queued", "running", "done"] = "queued"

    @property
    def seat(self) -> Seat:
        """What the work is given."""
        return self._job.seat

    @property
    def backlog(self) -> int:
        """Number of values that the client has not read yet."""
        return self._values.qsize()

    def cancel(self) -> None:
        """End the work within a step or a chunk of a prompt; what it held is freed."""
        self._job.cancelled = True
        self._job.engine.wake()

    async def __anext__(self) -> Any:
        if self._ended:
            raise StopAsyncIteration
        value = await self._values.get()
        if not isinstance(value, End):
            return value
        self._ended = True
        if value.error is not None:
            raise value.error
        raise StopAsyncIteration

    async def __aenter__(self) -> Ticket:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def deliver(self, value: Any) -> None:
        """Hand a value to the client's event loop; called on the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._values.put_nowait, value)
        except RuntimeError:  # the loop is closed: nobody is left to read
            self._job.cancelled = True


@dataclass(frozen=True)
class End:
    error: BaseException | None = None


class Seat:
    """What the work of a request is given.

    Attributes:
        model, tokenizer: the engine's.
        denoiser: runs passes together with those of other requests.
        cache: finds the longest prefix that is known, of this request or of earlier ones.
        prompt_tokens: tokens of the first prompt that the work encoded.
        cached_tokens: tokens of that prompt that were known.
    """

    def __init__(self, job: Job, engine: Runs) -> None:
        self.model, self.tokenizer = engine.model, engine.tokenizer
        self.denoiser: Denoiser = _JoinedDenoiser(engine.model, job)
        self.cache: PrefixCache = _SharedCache(engine, job)
        self.prompt_tokens = self.cached_tokens = 0
        self._job = job

    @property
    def backlog(self) -> int:
        """Number of values that the client has not read yet; where it is large, works leave frames
        out."""
        return self._job.ticket.backlog

    def emit(self, value: Any) -> None:
        """Hand a value to the client."""
        self._job.ticket.deliver(value)


class Job:
    """A request on the engine's thread.

    Attributes:
        awaits: what the work waits for: its turn, or a joint step.
        canvases: canvases that it has begun.
        waited: joint steps since it last took part in one.
        reserved: bytes that it may come to hold.
    """

    def __init__(self, engine: Runs, work: Work, reserved: int) -> None:
        self.engine, self.work, self.reserved = engine, work, reserved
        self.cancelled = False
        self.awaits: Turn | JointStep = Turn()
        self.canvases = self.waited = 0
        self.seat = Seat(self, engine)
        self.ticket = Ticket(self, asyncio.get_running_loop())
        self.greenlet: greenlet | None = None

    def run(self) -> None:
        """Run the work from beginning to end, as the function of its greenlet."""
        error: BaseException | None = None
        try:
            for value in self.work(self.seat) or ():
                self.seat.emit(value)
        except GreenletExit:
            error = CancelledError(_CANCELLED)
        except MemoryShortageError as raised:  # what can never fit is refused before it begins
            error = NoMemoryNowError(str(raised))
        except DiffGemmaError as raised:
            error = raised
        except BaseException as raised:
            _LOG.exception("a request failed")
            error = raised
        if error is not None:  # the frames in which it arose hold arrays
            error.__cause__ = error.__context__ = None
            error = error.with_traceback(None)
        self.awaits = Turn()  # the step would keep its canvases alive
        self.engine.ended(self, error)

    def pause(self, awaits: Turn | JointStep) -> Any:
        """Go back to the engine until it resumes the work; called by the work."""
        self.awaits = awaits
        return self.engine.hub.switch()

    def resume(self) -> None:
        """Let the work go on until it waits again or ends; called by the engine."""
        if self.greenlet is None:
            if self.cancelled:
                self.engine.ended(self, CancelledError(_CANCELLED))
                return
            self.greenlet = greenlet(self.run, self.engine.hub)
            self.ticket.state = "running"
        if self.cancelled:
            self.greenlet.throw(GreenletExit())
        else:
            self.greenlet.switch()


class Turn:
    """What a job awaits that is to begin, to encode a chunk, or to look at canvases by itself."""


class JointStep(Queued):
    """What a job awaits that wants a pass over its canvases: first the pass, then its results."""

    def __init__(self, job: Job, canvases: Sequence[Canvas], prefixes: Sequence[Prefix]) -> None:
        self.canvases, self.prefixes = list(canvases), list(prefixes)
        self.found: list[Canvas | NumericalError] | Exception | None = None
        self._job = job

    def each(self) -> list[Canvas | NumericalError]:
        if self.found is None:
            self._job.pause(self)
        found, self.found = self.found, None
        if isinstance(found, Exception):
            raise found
        assert found is not None
        return found


class _JoinedDenoiser(Denoiser):
    """A denoiser whose passes the engine runs together with those of other requests."""

    def __init__(self, model: DiffusionGemma, job: Job) -> None:
        super().__init__(model)
        self._job = job

    def queue(self, canvases: Sequence[Canvas], prefixes: Sequence[Prefix]) -> Queued:
        step = JointStep(self._job, canvases, prefixes)
        self._job.pause(step)
        return step

    def look(self, canvases: Sequence[Canvas], prefixes: Sequence[Prefix]) -> list[Look]:
        self._job.pause(Turn())
        return super().look(canvases, prefixes)

    def score(self, *args: Any) -> Any:
        self._job.pause(Turn())
        return super().score(*args)

    def weigh(self, *args: Any) -> Any:
        self._job.pause(Turn())
        return super().weigh(*args)


class _SharedCache(PrefixCache):
    """The prefix cache of one request, which begins from the prefixes of earlier requests."""

    def __init__(self, engine: Runs, job: Job) -> None:
        super().__init__(engine.model.empty_prefix(), engine.model.identity)
        self._engine, self._job = engine, job

    def begin(self, ids: Sequence[int]) -> None:
        self.prefix = self._engine.prefixes.best(ids, self.prefix)
        seat, counters = self._job.seat, self._engine.counters
        if not seat.prompt_tokens:
            seat.prompt_tokens, seat.cached_tokens = len(ids), len(self.prefix)
            counters.prompt_tokens += len(ids)
            counters.cached_tokens += len(self.prefix)

    def rest(self) -> None:
        self._job.pause(Turn())

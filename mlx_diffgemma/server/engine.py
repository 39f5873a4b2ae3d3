"""The engine: one thread that owns the model and runs the requests of all clients in turn.

A request is a piece of work in the library's own words (`stream_generate`, `infill`, `decide`),
which runs as a greenlet on the engine's thread. Where it wants a pass over its canvases, or has
encoded a chunk of its prompt, it comes back to the engine, which steps the canvases of several
requests together, whatever their age and settings, and lets the encoding of others have as much
time as the steps take. So requests join and leave between steps, and nothing is written twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from greenlet import getcurrent, greenlet

from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.diffusion.denoiser import Denoiser, Queued
from mlx_diffgemma.errors import DiffGemmaError, MemoryShortageError, NumericalError
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.server.jobs import (
    CancelledError,
    Counters,
    End,
    Job,
    JointStep,
    Ticket,
    Turn,
    Work,
)
from mlx_diffgemma.server.prefixes import KeptPrefixes

_SHARE_OF_PREFIXES = 8  # kept prefixes may take one part in so many of the memory that is left
_STEPS_A_RANK = 64  # steps of waiting that weigh as much as having begun one canvas less
_NEWEST = 0.2  # weight of the latest step in the measured time of a canvas


class QueueFullError(DiffGemmaError):
    """As many requests wait as may wait, or the engine is about to end.

    Attributes:
        retry_after: seconds after which it is worth trying again.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class EngineSettings:
    """The bounds of an engine.

    Attributes:
        max_batch: most canvases that share a step.
        longest_step: seconds that a step shared by several requests may take, as measured.
        queue: requests that may wait; more are refused.
        prefix_bytes: most bytes of prefixes kept from one request to the next; None takes a share
            of the memory that is left.
    """

    max_batch: int = 8
    longest_step: float = 2.0
    queue: int = 256
    prefix_bytes: int | None = None


class Engine:
    """A model that answers many requests at once.

    Args:
        model, tokenizer: what `load` returns.
        name: what clients call the model.
        settings: bounds of the engine.
        settle: called with the error of a request, or of a step that several share, before a
            client hears of it, and may call `fail` or wait until another thread does.

    Attributes:
        context: tokens of prompt and answer together, in whole canvases.
        counters: counts of what the engine has done so far.
        tokenizing: held by whoever uses `preparing.tokenizer_of(engine)`.
        failure: what broke the engine itself, or None.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        tokenizer: Any,
        *,
        name: str,
        settings: EngineSettings = EngineSettings(),
        settle: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._settle = settle
        self.model, self.tokenizer, self.name, self.settings = model, tokenizer, name, settings
        canvas = model.config.canvas_length
        self.context = model.config.text.max_position_embeddings // canvas * canvas
        self.counters = Counters()
        self.tokenizing = threading.Lock()
        self.failure: BaseException | None = None
        left = memory.available_memory()
        share = settings.prefix_bytes
        if share is None:
            share = (left or 8 << 30) // _SHARE_OF_PREFIXES
        self.prefixes = KeptPrefixes(share)
        self._offered = left or 0
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._seconds_a_canvas = 0.0
        self._denoiser = Denoiser(model)
        self.hub: greenlet = getcurrent()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    # What other threads call.

    def submit(
        self,
        work: Work,
        *,
        prompt_tokens: int = 0,
        answer_tokens: int = 0,
        canvas_length: int | None = None,
    ) -> Ticket:
        """Take a request in. It is called in an event loop, in which the ticket is read.

        Args:
            work: what the request does on the engine's thread.
            prompt_tokens, answer_tokens: tokens that memory is reserved for.
            canvas_length: tokens of a canvas; the model's own number if None.

        Raises:
            QueueFullError: too many requests wait, or the engine is about to end.
            MemoryShortageError: the request needs more memory than this machine has offered since
                the engine began. One that needs more than there is now waits its turn.
        """
        reserved = self._bytes(prompt_tokens, answer_tokens, canvas_length)
        job = Job(self, work, reserved)
        with self._changed:
            if self._stopping or self.failure is not None:
                raise QueueFullError("the server is about to end; try again later.", 10)
            if len(self._waiting) >= self.settings.queue:
                wait = 1 + int(self._seconds_a_canvas * 16 * len(self._waiting))
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait already; try again in {wait} seconds.",
                    wait,
                )
            self._waiting.append(job)
            self.counters.requests += 1
            self._changed.notify()
        return job.ticket

    def stop(self, seconds: float = 5.0) -> None:
        """Refuse new requests, let the others end within `seconds`, and cancel the rest."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(seconds)
        with self._changed:
            for job in (*self._waiting, *self._running):
                job.cancelled = True
            self._changed.notify()
        self._thread.join(seconds)

    def fail(self, error: BaseException) -> None:
        """Refuse new requests and end all others with an error, so that nobody waits for ever. The
        engine's own thread may be blocked for good."""
        with self._changed:
            if self.failure is not None:
                return
            self.failure = error
            jobs, self._waiting, self._running = [*self._running, *self._waiting], [], []
        for job in jobs:
            job.ticket.deliver(End(error))

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._stopping and self.failure is None

    def wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _bytes(
        self, prompt_tokens: int, answer_tokens: int, canvas_length: int | None = None
    ) -> int:
        if not prompt_tokens:
            return 0
        estimate = memory.estimate(
            self.model.config.text,
            0,
            canvas_length=canvas_length or self.model.config.canvas_length,
            sequences=[(prompt_tokens, answer_tokens)],
            activation_bytes=self.model.dtype.size,
            step_size=self.model.prefill_step_size,
        )
        free = memory.available_memory()
        if free is not None:
            # The bytes that other requests hold are free again when these are done.
            held = self.counters.prefix_bytes + sum(
                job.seat.cache.nbytes for job in list(self._running)
            )
            self._offered = max(self._offered, free + held)
            if estimate.total > self._offered:
                raise MemoryShortageError(
                    f"a prompt of {prompt_tokens} tokens needs about "
                    f"{memory.size_text(estimate.total)} and this machine offers "
                    f"{memory.size_text(self._offered)}; shorten it, or lower max_tokens or the "
                    "length of a canvas."
                )
        return estimate.total

    # The engine's own thread.

    def _serve(self) -> None:
        self.hub = getcurrent()
        try:
            with memory.wired():
                while self._next_requests():
                    self._turns()
                    self._joint_step()
        except BaseException as error:  # a fault of the engine itself
            self.fail(error)

    def _next_requests(self) -> bool:
        """Wait for requests, and begin those that fit. Returns False where the engine is to end."""
        with self._changed:
            while not self._waiting and not self._running:
                if self._stopping:
                    return False
                self._report()
                self._changed.wait()
            for job in list(self._waiting):  # each is judged beside those that have just begun
                if job.cancelled or self._fits(job):
                    self._waiting.remove(job)
                    self._running.append(job)
            self._report()
        return True

    def _fits(self, job: Job) -> bool:
        """Whether there is memory for a request beside those that run."""
        free = memory.available_memory()
        if free is None or not job.reserved or not self._running:
            return True
        to_come = sum(max(0, each.reserved - each.seat.cache.nbytes) for each in self._running)
        missing = job.reserved + to_come - free
        if missing > 0:
            missing -= self.prefixes.shrink(max(0, self.prefixes.nbytes - missing))
        return missing <= 0

    def _turns(self) -> None:
        """Resume requests that wait for a turn, for as long as a canvas takes in a step; at least
        one is resumed, and all of them where no request waits for a joint step."""
        for job in [job for job in self._running if job.cancelled]:
            job.resume()
        waiting = [job for job in self._running if isinstance(job.awaits, Turn)]
        stepping = len(waiting) < len(self._running)
        until = time.perf_counter() + self._seconds_a_canvas
        for job in sorted(waiting, key=lambda job: job.canvases):
            self.counters.chunks += 1
            # Others may have asked for a turn at the same time: the last served goes to the end.
            self._running.remove(job)
            self._running.append(job)
            job.resume()
            if stepping and time.perf_counter() >= until:
                break

    def _joint_step(self) -> None:
        """Run one pass over the canvases of the requests that share the next step."""
        jobs = self._sharing()
        if jobs:
            self._step(jobs)

    def _step(self, jobs: Sequence[Job]) -> None:
        started = time.perf_counter()
        steps = [job.awaits for job in jobs if isinstance(job.awaits, JointStep)]
        count = sum(len(step.canvases) for step in steps)
        queued: Queued | None = None
        try:
            queued = self._denoiser.queue(
                [canvas for step in steps for canvas in step.canvases],
                [prefix for step in steps for prefix in step.prefixes],
            )
        except Exception as error:  # out of memory, or a fault of MLX: it is of this step alone
            if len(jobs) == 1:
                self._hand_out(jobs, steps, error)
                return
            self._settle(error)  # where another Mac is gone, this error says so
        if queued is None:
            # No request fails because another cannot be queued. This stands behind the `except`,
            # for the error holds the arrays of the whole step.
            for job in jobs:
                self._step([job])
            return
        lengths = [len(step.canvases) for step in steps]
        for step in steps:
            # A prefix that is still held here would be copied when it grows.
            step.canvases, step.prefixes = [], []
        for job in jobs:  # they show the last step while the device computes this one
            job.resume()
        try:
            found = iter(queued.each())
        except Exception as error:
            del queued
            self._hand_out(jobs, steps, error)
            return
        del queued
        seconds = time.perf_counter() - started
        self._count(count, seconds)
        for step, length in zip(steps, lengths, strict=True):
            step.found = [next(found) for _ in range(length)]
        del found
        for job, step in zip(jobs, steps, strict=True):
            if job.awaits is step and job in self._running:
                job.resume()

    def _hand_out(self, jobs: Sequence[Job], steps: Sequence[JointStep], error: Exception) -> None:
        for job, step in zip(jobs, steps, strict=True):
            step.found = error
            while job.awaits is step and job in self._running:
                job.resume()

    def _sharing(self) -> list[Job]:
        """The requests that share the next step: first those that have begun the fewest canvases,
        then those that came first. A request that has waited long goes before others."""
        waiting = [job for job in self._running if isinstance(job.awaits, JointStep)]
        waiting.sort(key=lambda job: job.canvases - job.waited // _STEPS_A_RANK)
        most = self.settings.max_batch
        if self._seconds_a_canvas:
            most = min(most, max(1, int(self.settings.longest_step / self._seconds_a_canvas)))
        sharing: list[Job] = []
        count = 0
        for job in waiting:
            assert isinstance(job.awaits, JointStep)
            size = len(job.awaits.canvases)
            if sharing and count + size > most:
                job.waited += 1
                continue
            sharing.append(job)
            count += size
            job.waited = 0
            begun = sum(canvas.passes == 0 for canvas in job.awaits.canvases)
            job.canvases += begun
            self.counters.canvases += begun
        return sharing

    def _count(self, canvases: int, seconds: float) -> None:
        self.counters.steps += 1
        self.counters.canvas_steps += canvases
        self.counters.step_seconds += seconds
        each = seconds / canvases
        before = self._seconds_a_canvas or each
        self._seconds_a_canvas = before + _NEWEST * (each - before)

    def ended(self, job: Job, error: BaseException | None) -> None:
        """Note that the work of a request is over, with the error that ended it. Its greenlet calls
        this as its last act."""
        if error is not None:
            self._settle(error)
        if self.failure is not None:  # everybody was told
            return
        self._running.remove(job)
        counters = self.counters
        if error is None:
            counters.finished += 1
        elif isinstance(error, CancelledError):
            counters.cancelled += 1
        else:
            counters.failed += 1
        if not isinstance(error, NumericalError):
            self.prefixes.keep(job.seat.cache.prefix)
        job.seat.cache.clear()
        mx.clear_cache()
        job.ticket.state = "done"
        job.ticket.deliver(End(error))

    def _report(self) -> None:
        counters = self.counters
        counters.waiting, counters.running = len(self._waiting), len(self._running)
        counters.prefixes, counters.prefix_bytes = len(self.prefixes), self.prefixes.nbytes
        counters.active_bytes, counters.peak_bytes = mx.get_active_memory(), mx.get_peak_memory()

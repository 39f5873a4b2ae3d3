"""What `/metrics` says, in the text form of Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

PREFIX = "mlx_diffgemma_"
MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # seconds


@dataclass
class Durations:
    """A histogram of durations in seconds.

    Attributes:
        counts: durations between each bound and the one before, and those beyond the last.
        total: sum of all durations, in seconds.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Take in one duration."""
        self.counts[sum(seconds > bound for bound in _BOUNDS)] += 1
        self.total += seconds

    def samples(self, labels: str) -> Iterator[tuple[str, float]]:
        """What Prometheus reads: counts up to each bound, the sum and the count of all."""
        so_far = 0
        for bound, count in zip((*_BOUNDS, "+Inf"), self.counts, strict=True):
            so_far += count
            yield f'_bucket{{{labels},le="{bound}"}}', so_far
        yield f"_sum{{{labels}}}", self.total
        yield f"_count{{{labels}}}", so_far


@dataclass
class Metrics:
    """Counts of what was asked over HTTP; the engine counts its own work.

    Attributes:
        answered: responses by route, method and status.
        durations: from the head of a request to the end of its response, by route.
        vanished: clients that went away before their response was over, by route.
        open: requests that are being answered.
    """

    answered: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    durations: dict[str, Durations] = field(default_factory=dict)
    vanished: Counter[str] = field(default_factory=Counter)
    open: int = 0

    def ended(self, route: str, method: str, status: int, seconds: float, gone: bool) -> None:
        """Count a request that is over; its status is 499 where the client went away."""
        self.answered[route, method, status] += 1
        self.durations.setdefault(route, Durations()).add(seconds)
        if gone:
            self.vanished[route] += 1

    def lines(self) -> Iterator[str]:
        """The counts in the text form of Prometheus, line by line."""
        yield from family(
            "http_requests_total",
            "Requests that were answered or given up.",
            (
                (f'{{route="{route}",method="{method}",status="{status}"}}', count)
                for (route, method, status), count in sorted(self.answered.items())
            ),
        )
        yield from family(
            "http_disconnects_total",
            "Clients that went away before their answer was over.",
            ((f'{{route="{route}"}}', count) for route, count in sorted(self.vanished.items())),
        )
        yield from family("http_open", "Requests that are being answered.", [("", self.open)])
        yield from family(
            "http_seconds",
            "Seconds from the head of a request to the end of its response.",
            (
                sample
                for route, durations in sorted(self.durations.items())
                for sample in durations.samples(f'route="{route}"')
            ),
            kind="histogram",
        )


def family(
    name: str, help: str, samples: Iterable[tuple[str, float]], kind: str | None = None
) -> Iterator[str]:
    """Lines of a metric and its samples; a sample is (labels in braces, value)."""
    name = PREFIX + name
    yield f"# HELP {name} {help}"
    yield f"# TYPE {name} {kind or ('counter' if name.endswith('_total') else 'gauge')}"
    for labels, value in samples:
        yield f"{name}{labels} {value:.9g}"


_OF_ENGINE = {
    "requests_total": ("requests", "Requests for the model."),
    "requests_finished_total": ("finished", "Requests whose work is done."),
    "requests_cancelled_total": ("cancelled", "Requests that were cancelled."),
    "requests_failed_total": ("failed", "Requests that ended with an error."),
    "requests_waiting": ("waiting", "Requests that wait to begin."),
    "requests_running": ("running", "Requests that have begun."),
    "steps_total": ("steps", "Joint denoising steps, each with one wait for the device."),
    "step_seconds_total": ("step_seconds", "Seconds of all joint steps."),
    "canvas_steps_total": ("canvas_steps", "Passes over a canvas, of all steps."),
    "canvases_total": ("canvases", "Canvases that were begun."),
    "turns_total": ("chunks", "Turns of encoding and of looks at a canvas."),
    "tokens_total": ("tokens", "Tokens of whole answers in chats, completions and messages."),
    "prompt_tokens_total": ("prompt_tokens", "Tokens of all prompts."),
    "cached_tokens_total": ("cached_tokens", "Tokens of prompts that were known."),
    "prefixes": ("prefixes", "Prefixes that are kept."),
    "prefix_bytes": ("prefix_bytes", "Bytes of prefixes that are kept."),
    "active_bytes": ("active_bytes", "Bytes that MLX holds."),
    "peak_bytes": ("peak_bytes", "Most bytes that MLX has held."),
}
_RATIOS = {
    "canvases_per_step": ("canvas_steps", "steps", "Canvases that shared a step, on average."),
    "steps_per_canvas": ("canvas_steps", "canvases", "Steps that a canvas took, on average."),
}


def of_engine(counters: Any) -> Iterator[str]:
    """What an engine counted: the fields of its `Counters`, and what follows from them."""
    for name, (counted, help) in _OF_ENGINE.items():
        yield from family(name, help, [("", getattr(counters, counted))])
    for name, (over, under, help) in _RATIOS.items():
        count = getattr(counters, under)
        yield from family(name, help, [("", getattr(counters, over) / count if count else 0.0)])

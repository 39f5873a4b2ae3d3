"""What a run tells while it goes: a line for each event, a history on the disk, a chart of the
loss."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from math import log10
from pathlib import Path
from typing import Any

from mlx_diffgemma.chart import Chart, decade_axis, linear_axis
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.train.events import Evaluation, Event, Finished, Report

HISTORY, CHART = "history.jsonl", "loss.svg"
_TRAINED, _HELD_OUT = "#0b6bcb", "#c2410c"


def line_of(event: Event, iters: int) -> str | None:
    """The line that tells of an event in a run of `iters` steps; None where there is none."""
    if isinstance(event, Report):
        parts = [f"step {event.step}/{iters}", f"loss {event.loss:.4f}"]
        if event.encoder_loss:
            parts[1] += f" (canvas {event.canvas_loss:.4f}, encoder {event.encoder_loss:.4f})"
        parts += [
            f"lr {event.learning_rate:.2e}",
            f"{event.tokens_per_second:,.0f} tokens/s",
            f"{event.peak_memory:.2f} GB",
            f"{duration(event.seconds_left)} left",
        ]
        return " · ".join(parts)
    if isinstance(event, Evaluation):
        noise = ", ".join(f"{level:g}: {loss:.4f}" for level, loss in event.by_noise.items())
        parts = [f"step {event.step}/{iters}"]
        if event.by_noise:
            parts.append(f"held out: loss {event.loss:.4f} (by noise {noise})")
        if event.exact is not None:
            parts.append(f"exact answers {event.exact:.1%}")
        return " · ".join(parts) if len(parts) > 1 else None
    if isinstance(event, Finished):
        return f"{event.step} steps done, {duration(event.seconds)} in this sitting"
    return None


def duration(seconds: float) -> str:
    """Seconds for people, such as `45 s`, `12 min` or `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class History:
    """The reports and evaluations of a run, kept in its folder over all its sittings."""

    def __init__(self, folder: Path, *, resume: bool) -> None:
        self._folder = folder
        if not resume:
            (folder / HISTORY).unlink(missing_ok=True)

    def add(self, event: Event) -> None:
        if not isinstance(event, (Report, Evaluation)):
            return
        record = {"event": type(event).__name__.lower(), **asdict(event)}
        with (self._folder / HISTORY).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The reports and evaluations by step. Where a sitting went over steps again, its later
        record replaces the earlier one."""
        path = self._folder / HISTORY
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = {(r["event"], r["step"]): r for r in _parsed(lines)}
        return sorted(found.values(), key=lambda record: record["step"])

    def draw(self) -> Path | None:
        """Draw `loss.svg` anew; None where nothing was reported yet."""
        records = self.records()
        trained = [(r["step"], _log(r["loss"])) for r in records if r["event"] == "report"]
        held_out = [
            (r["step"], _log(r["loss"]))
            for r in records
            if r["event"] == "evaluation" and r["by_noise"]
        ]
        if not trained:
            return None
        losses = [loss for _, loss in trained + held_out]
        chart = Chart(
            linear_axis("optimizer step", 0, max(step for step, _ in trained + held_out)),
            decade_axis("loss, nats a token", min(losses), max(losses)),
        )
        names = [("training: canvas and encoder", _TRAINED)]
        chart.line(trained, _TRAINED)
        if held_out:
            chart.line(held_out, _HELD_OUT)
            for point in held_out:
                chart.dot(*point, _HELD_OUT)
            names.append(("held out: canvas, mean over noise levels", _HELD_OUT))
        chart.legend(names)
        chart.write(self._folder / CHART)
        return self._folder / CHART


def _log(loss: float) -> float:
    return log10(max(loss, 1e-6))


def _parsed(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except (RecursionError, ValueError):  # cut off when the run was killed
            continue
        if isinstance(record, dict) and record.get("event") in ("report", "evaluation"):
            yield record


class Reporter:
    """Passes what happens on to the services that mlx-lm knows (`wandb`, `swanlab`).

    Raises:
        UsageError: a service is unknown, or its package is not installed.
    """

    def __init__(
        self, services: str | None, project: str | None, folder: Path, config: Mapping[str, Any]
    ) -> None:
        self._callback: Any = None
        if not services:
            return
        from mlx_lm.tuner.callbacks import get_reporting_callbacks

        try:
            self._callback = get_reporting_callbacks(
                services, project_name=project, log_dir=str(folder), config=dict(config)
            )
        except (ValueError, ImportError) as error:
            raise UsageError(f"--report-to {services}: {error}") from None

    def add(self, event: Event) -> None:
        if self._callback is None:
            return
        if isinstance(event, Report):
            self._callback.on_train_loss_report(
                {
                    "iteration": event.step,
                    "train_loss": event.loss,
                    "canvas_loss": event.canvas_loss,
                    "encoder_loss": event.encoder_loss,
                    "learning_rate": event.learning_rate,
                    "grad_norm": event.grad_norm,
                    "tokens_per_second": event.tokens_per_second,
                    "trained_tokens": event.tokens,
                    "peak_memory": event.peak_memory,
                }
            )
        elif isinstance(event, Evaluation):
            found = {"iteration": event.step, "val_loss": event.loss}
            found |= {f"val_loss_noise_{level:g}": v for level, v in event.by_noise.items()}
            if event.exact is not None:
                found["exact"] = event.exact
            self._callback.on_val_loss_report(found)

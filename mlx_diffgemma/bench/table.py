"""What a run of the benchmark found, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mlx_diffgemma.bench.results import BenchReport
from mlx_diffgemma.bench.timing import milliseconds


def as_tables(report: BenchReport) -> Group:
    """Everything in `report`, ready to print."""
    return Group(*_parts(report))


def _parts(report: BenchReport) -> Iterator[RenderableType]:
    yield Text("\n".join(_heading(report)))
    if report.prefill:
        yield _prefill(report)
    yield _step(report)
    if report.constraints:
        yield _table(
            "One denoising step under a constraint, of one canvas",
            ("constraint", "ms", "of none"),
            [
                (cost.name, milliseconds(cost.seconds), f"{cost.ratio:.3f}")
                for cost in report.constraints
            ],
        )  # fmt: skip
    if report.speeds:
        yield _table(
            "Answers by profile",
            ("profile", "tokens", "canvases", "steps", "tokens/forward", "tokens/s"),
            [
                (
                    speed.profile, f"{speed.tokens}", f"{speed.canvases}", f"{speed.steps}",
                    f"{speed.tokens_per_forward:.1f}", f"{speed.tokens_per_second:.1f}",
                )
                for speed in report.speeds
            ],
        )  # fmt: skip
    if report.limits:
        yield _table(
            "Profiles at their cap (random weights do not say how many steps they need)",
            ("profile", "most steps", "ms/step", "s/canvas"),
            [
                (
                    limit.profile, f"{limit.max_steps}", milliseconds(limit.seconds),
                    f"{limit.canvas_seconds:.2f}",
                )
                for limit in report.limits
            ],
        )  # fmt: skip
    if report.rivals:
        yield _table(
            "One step in turns with another program, equal weights",
            ("other", "ours ms", "theirs ms", "ours/theirs", "ours MB", "theirs MB"),
            [
                (
                    rival.name,
                    milliseconds(rival.ours_seconds), milliseconds(rival.theirs_seconds),
                    f"{rival.ratio:.2f}", _mb(rival.ours_beyond_weights),
                    _mb(rival.theirs_beyond_weights),
                )
                for rival in report.rivals
            ],
        )  # fmt: skip
    if report.twins:
        yield _table(
            "An autoregressive model, in turns",
            ("other", "tokens", "tokens/s", "ours tokens/s", "ours/theirs"),
            [
                (
                    twin.name, f"{twin.tokens}", f"{twin.tokens_per_second:.1f}",
                    _or_dash(twin.ours_tokens_per_second, ".1f"), _or_dash(twin.ratio, ".2f"),
                )
                for twin in report.twins
            ],
        )  # fmt: skip


def _heading(report: BenchReport) -> Iterator[str]:
    model, device, step = report.model, report.device, report.step
    weights = "random weights" if model.random else "weights"
    yield (
        f"{model.name}: {model.layers} layer{'s' * (model.layers != 1)}, {weights} {model.format}, "
        f"{model.weights / 1e9:.2f} GB"
    )
    yield (
        f"{device.name}, mlx {device.mlx}, {device.dtype}: {device.operations / 1e12:.3g} TFLOP/s "
        f"in a large product, {device.bandwidth / 1e9:.3g} GB/s in a large copy"
    )
    if device.blas:
        yield f"with {device.blas}"
    if report.load is not None:
        yield f"load at the start: {report.load:.1f} a core"
    yield (
        f"profile {report.profile}, batch {step.batch}, canvas {step.canvas}, prefix {step.prefix}"
    )


def _prefill(report: BenchReport) -> Table:
    return _table(
        "Prefill",
        ("tokens", "tokens/s", "ms", "floor ms", "times floor", "MB beside weights"),
        [
            (
                f"{run.length}", f"{run.tokens_per_second:.1f}", milliseconds(run.seconds),
                milliseconds(run.floor_seconds), f"{run.seconds / run.floor_seconds:.1f}",
                _mb(run.beyond_weights),
            )
            for run in report.prefill
        ],
    )  # fmt: skip


def _step(report: BenchReport) -> Table:
    step = report.step
    rows = [
        (
            part.name, milliseconds(part.seconds), "–", f"{part.operations / 1e9:.4g}",
            f"{part.bytes / 1e9:.3g}", milliseconds(part.floor_seconds),
            f"{part.seconds / part.floor_seconds:.1f}" if part.floor_seconds else "–",
        )
        for part in step.parts
    ]  # fmt: skip
    floor = sum(part.floor_seconds for part in step.parts)
    rows.append(
        (
            "whole step", milliseconds(step.seconds), f"{step.waits:g}",
            f"{sum(p.operations for p in step.parts) / 1e9:.4g}",
            f"{sum(p.bytes for p in step.parts) / 1e9:.3g}", milliseconds(floor),
            f"{step.seconds / floor:.1f}",
        )
    )  # fmt: skip
    return _table(
        f"One denoising step, {_mb(step.beyond_weights)} MB beside the weights",
        ("part", "ms", "waits", "GFLOP", "GB", "floor ms", "times floor"),
        rows,
    )


def _table(title: str, heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f}"


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)

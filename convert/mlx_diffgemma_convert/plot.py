"""Divergence over size, drawn as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from pathlib import Path

from mlx_diffgemma.chart import WIDTH, Axis, Chart, decade_axis
from mlx_diffgemma.errors import UsageError


@dataclass(frozen=True)
class Point:
    """A model: its bits per weight and its mean divergence in nats."""

    name: str
    bits: float
    kl: float


def write_plot(path: Path, points: Sequence[Point]) -> None:
    """Draw the points, divergence on a logarithmic scale.

    Raises:
        UsageError: there is nothing to draw.
    """
    if not points:
        raise UsageError("--plot has nothing to draw: no model diverges from its source.")
    low = floor(min(p.bits for p in points))
    high = max(ceil(max(p.bits for p in points)), low + 1)
    bits = Axis("bits per weight", low, high, tuple((n, str(n)) for n in range(low, high + 1)))
    logs = [log10(p.kl) for p in points]
    chart = Chart(bits, decade_axis("KL divergence from the source, nats", min(logs), max(logs)))
    labels: list[tuple[float, float]] = []
    for point, log in zip(points, logs, strict=True):
        px, py = chart.x(point.bits), chart.y(log)
        anchor, shift = ("end", -8) if px > WIDTH * 0.8 else ("start", 8)
        label = next(
            (py + dy for dy in (-6, 18, -22, 34, -38, 50) if _free(labels, px, py + dy)), py - 6
        )
        labels.append((px, label))
        chart.dot(point.bits, log, "#0b6bcb")
        chart.text(px + shift, label, point.name, anchor)
    chart.write(path)


def _free(labels: Sequence[tuple[float, float]], x: float, y: float) -> bool:
    """Whether a label there would lie on none of those placed before it."""
    return all(abs(x - other_x) > 90 or abs(y - other_y) > 14 for other_x, other_y in labels)

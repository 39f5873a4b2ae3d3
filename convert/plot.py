"""Divergence over size, drawn as SVG: small enough to need no plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from pathlib import Path

from mlx_diffgemma.errors import UsageError

_WIDTH, _HEIGHT = 720, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 24, 24, 56


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
    low, high = floor(min(p.bits for p in points)), ceil(max(p.bits for p in points))
    high = max(high, low + 1)
    bottom = floor(log10(min(p.kl for p in points)))
    top = max(ceil(log10(max(p.kl for p in points))), bottom + 1)

    def x(bits: float) -> float:
        return _LEFT + (bits - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(exponent: float) -> float:
        return _TOP + (top - exponent) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="13" fill="#444">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for exponent in range(bottom, top + 1):
        parts.append(
            f'<path d="M{_LEFT} {y(exponent):.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 8}" y="{y(exponent) + 4:.1f}" text-anchor="end">'
            f'10<tspan dy="-5" font-size="10">{exponent}</tspan></text>'
        )
    for bits in range(low, high + 1):
        parts.append(
            f'<path d="M{x(bits):.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="#eee"/>'
            f'<text x="{x(bits):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">'
            f"{bits}</text>"
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 14}" text-anchor="middle">bits per weight</text>'
        f'<text transform="translate(20 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        "KL divergence from the source, nats</text>"
    )
    labels: list[tuple[float, float]] = []
    for point in points:
        px, py = x(point.bits), y(log10(point.kl))
        anchor, shift = ("end", -8) if px > _WIDTH * 0.8 else ("start", 8)
        label = next(
            (py + dy for dy in (-6, 18, -22, 34, -38, 50) if _free(labels, px, py + dy)), py - 6
        )
        labels.append((px, label))
        parts.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4.5" fill="#0b6bcb"/>'
            f'<text x="{px + shift:.1f}" y="{label:.1f}" text-anchor="{anchor}">'
            f"{escape(point.name)}</text>"
        )
    path.write_text("\n".join([*parts, "</svg>", ""]))


def _free(labels: Sequence[tuple[float, float]], x: float, y: float) -> bool:
    """Whether a label there would lie on none of those placed before it."""
    return all(abs(x - other_x) > 90 or abs(y - other_y) > 14 for other_x, other_y in labels)

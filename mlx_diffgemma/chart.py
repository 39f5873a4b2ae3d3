"""Charts as SVG files: small enough to need no plotting library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from math import ceil, floor, log10
from pathlib import Path

WIDTH, HEIGHT = 720, 440
_COLOURS = ("#c44", "#26a", "#e90", "#084", "#848", "#555")
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 24, 24, 56


@dataclass(frozen=True)
class Axis:
    """One axis: what it shows, from where to where, and its marks (value, text as SVG)."""

    label: str
    low: float
    high: float
    marks: tuple[tuple[float, str], ...]


def linear_axis(label: str, low: float, high: float) -> Axis:
    """An axis with about six round marks, widened to the outermost of them."""
    wide = high - low if high > low else abs(low) or 1.0
    step = 10.0 ** floor(log10(wide / 5))
    step = next(step * k for k in (1, 2, 5, 10) if wide / (step * k) <= 6)
    first, last = floor(low / step), max(ceil(high / step), floor(low / step) + 1)
    marks = tuple((n * step, f"{n * step:,.10g}") for n in range(first, last + 1))
    return Axis(label, first * step, last * step, marks)


def decade_axis(label: str, low: float, high: float) -> Axis:
    """An axis for logarithms to base 10, marked at whole decades."""
    first = floor(low)
    last = max(ceil(high), first + 1)
    power = '10<tspan dy="-5" font-size="10">{}</tspan>'
    return Axis(label, first, last, tuple((n, power.format(n)) for n in range(first, last + 1)))


class Chart:
    """A frame with two axes, to draw into."""

    def __init__(self, across: Axis, up: Axis) -> None:
        self._across, self._up = across, up
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            'font-family="sans-serif" font-size="13" fill="#444">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            *(self._mark_up(*mark) for mark in up.marks),
            *(self._mark_across(*mark) for mark in across.marks),
            f'<text x="{middle}" y="{HEIGHT - 14}" text-anchor="middle">'
            f"{escape(across.label)}</text>"
            f'<text transform="translate(20 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
            f"{escape(up.label)}</text>",
        ]

    def x(self, value: float) -> float:
        """Where a value of the horizontal axis lies, in units of the SVG from the left."""
        share = (value - self._across.low) / (self._across.high - self._across.low)
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Where a value of the vertical axis lies, in units of the SVG from the top."""
        share = (self._up.high - value) / (self._up.high - self._up.low)
        return _TOP + share * (HEIGHT - _TOP - _BOTTOM)

    def dot(self, across: float, up: float, colour: str) -> None:
        """Draw a dot at values of the two axes."""
        self._parts.append(
            f'<circle cx="{self.x(across):.1f}" cy="{self.y(up):.1f}" r="4.5" fill="{colour}"/>'
        )

    def line(self, points: Iterable[tuple[float, float]], colour: str) -> None:
        """Draw a line through points, each of values of the two axes."""
        path = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in points)
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )

    def text(
        self, x: float, y: float, text: str, anchor: str = "start", colour: str | None = None
    ) -> None:
        """Write at a place of the picture, in units of the SVG from the left and from the top."""
        fill = f' fill="{colour}"' if colour else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{fill}>{escape(text)}</text>'
        )

    def legend(self, names: Sequence[tuple[str, str]]) -> None:
        """Names and their colours, in the upper right corner."""
        for row, (name, colour) in enumerate(names):
            self.text(WIDTH - _RIGHT - 8, _TOP + 18 * (row + 1), name, "end", colour)

    def write(self, path: Path) -> None:
        """Write the chart to an SVG file.

        Raises:
            OSError: the file cannot be written.
        """
        path.write_text("\n".join([*self._parts, "</svg>", ""]), encoding="utf-8")

    def _mark_up(self, value: float, text: str) -> str:
        y = self.y(value)
        return (
            f'<path d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )

    def _mark_across(self, value: float, text: str) -> str:
        x = self.x(value)
        return (
            f'<path d="M{x:.1f} {_TOP}V{HEIGHT - _BOTTOM}" stroke="#eee"/>'
            f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="middle">{text}</text>'
        )


def reliability_chart(
    curves: Mapping[str, Sequence[tuple[float, float, int]]],
) -> Chart:
    """A chart of how often answers are right over how probable they were held to be.

    Args:
        curves: by name, the points of a curve: mean probability, share of right answers, and number
            of answers. Points on the diagonal are those where share and probability agree.
    """
    axis = linear_axis("probability of the answer", 0.0, 1.0)
    chart = Chart(axis, linear_axis("share of right answers", 0.0, 1.0))
    chart.line([(0.0, 0.0), (1.0, 1.0)], "#bbb")
    legend = []
    for (name, points), colour in zip(curves.items(), cycle(_COLOURS), strict=False):
        chart.line([(mean, share) for mean, share, _ in points], colour)
        for mean, share, _ in points:
            chart.dot(mean, share, colour)
        legend.append((name, colour))
    chart.legend(legend)
    return chart

"""Draws lines into a small SVG, with logarithmic axes: a straight line is a power, its slope the exponent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 560, 320, 70, 45, 35, 130
_COLOURS = ("#1f6feb", "#d1570a", "#2da44e", "#8250df")


@dataclass(frozen=True)
class Line:
    """Points above zero, and what they are called."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


def exponent(line: Line) -> float:
    """The slope of the straight line through the logarithms: how y grows with x."""
    xs, ys = [math.log(x) for x in line.xs], [math.log(y) for y in line.ys]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def draw(path: Path, title: str, x_name: str, y_name: str, lines: Sequence[Line]) -> None:
    """Write the picture, with a mark at every power of ten."""
    low_x, high_x = _decades([x for line in lines for x in line.xs])
    low_y, high_y = _decades([y for line in lines for y in line.ys])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - low_x) / (high_x - low_x)
        up = (math.log10(y) - low_y) / (high_y - low_y)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP),
        )

    right, bottom = at(10**high_x, 10**low_y)
    parts = [f'<text x="{_LEFT}" y="20" font-weight="bold">{escape(title)}</text>']
    for power in range(low_x, high_x + 1):
        x, top = at(10**power, 10**high_y)
        parts.append(f'<path d="M{x:.0f} {top:.0f}V{bottom:.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.0f}" y="{bottom + 16:.0f}" text-anchor="middle">{10**power:,}</text>')
    for power in range(low_y, high_y + 1):
        _, y = at(10**low_x, 10**power)
        parts.append(f'<path d="M{_LEFT} {y:.0f}H{right:.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.0f}" text-anchor="end">{10.0**power:g}</text>')
    parts.append(
        f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">{x_name}</text>'
    )
    parts.append(f'<text x="14" y="{_HEIGHT / 2}" transform="rotate(-90 14 {_HEIGHT / 2})">{y_name}</text>')
    for line, colour in zip(lines, _COLOURS, strict=False):
        points = [at(x, y) for x, y in zip(line.xs, line.ys, strict=True)]
        shown = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{shown}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        x, y = points[-1]
        parts.append(f'<text x="{x + 8:.0f}" y="{y + 4:.0f}" fill="{colour}">{escape(line.name)}</text>')
    style = 'font-family="sans-serif" font-size="12"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" {style}>'
    background = f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>'
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([opening, background, *parts, "</svg>"]) + "\n")


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)

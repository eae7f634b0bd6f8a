"""Scatter plots as inline SVG, in the colours of the surrounding page."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Any

COLOURS = ("#777", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#3D9BD1", "#8C6BB1")  # on light and dark


def colour(i: int) -> str:
    """Return the colour of run number `i`: grey for the baseline, then seven colours in turn."""
    return COLOURS[0] if i == 0 else COLOURS[1 + (i - 1) % (len(COLOURS) - 1)]


@dataclasses.dataclass(frozen=True)
class Point:
    """A run in a figure: number and name, x and y, and the ends of their intervals (None: not drawn)."""

    number: int
    name: str
    x: float
    y: float
    xs: tuple[float, float] | None = None
    ys: tuple[float, float] | None = None


def scatter(points: Sequence[Point], x: str, y: str, title: str, line: float | None = None) -> str:
    """An SVG with numbered marks, their intervals, dashed lines through the baseline and a full one at x = `line`."""
    width, height, left, bottom, top = 420, 310, 52, 44, 30
    xs = [v for p in points for v in (p.x, *(p.xs or ()))] + ([line] if line is not None else [])
    ys = [v for p in points for v in (p.y, *(p.ys or ()))]
    xticks, yticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))

    def at_x(value: float) -> float:
        return left + (value - xticks[0]) / (xticks[-1] - xticks[0]) * (width - left - 16)

    def at_y(value: float) -> float:
        return height - bottom - (value - yticks[0]) / (yticks[-1] - yticks[0]) * (height - bottom - top)

    def stroke(x1: float, y1: float, x2: float, y2: float, extra: str) -> str:
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {extra}/>'

    drawn = [f'<text x="{left}" y="18" style="font-weight:600">{text_of(title)}</text>']
    for tick in xticks:
        drawn.append(stroke(at_x(tick), top, at_x(tick), height - bottom, 'class="grid"'))
        drawn.append(
            f'<text class="soft" x="{at_x(tick):.1f}" y="{height - bottom + 15}" text-anchor="middle">{tick:g}</text>'
        )
    for tick in yticks:
        drawn.append(stroke(left, at_y(tick), width - 16, at_y(tick), 'class="grid"'))
        drawn.append(f'<text class="soft" x="{left - 6}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    drawn.append(f'<text x="{(left + width - 16) / 2}" y="{height - 10}" text-anchor="middle">{text_of(x)}</text>')
    middle = (top + height - bottom) / 2
    drawn.append(
        f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">{text_of(y)}</text>'
    )
    if line is not None:
        drawn.append(stroke(at_x(line), top, at_x(line), height - bottom, 'stroke="var(--soft)"'))
    base, dashes = points[0], 'stroke="var(--soft)" stroke-dasharray="4 3"'
    drawn.append(stroke(at_x(base.x), top, at_x(base.x), height - bottom, dashes))
    drawn.append(stroke(left, at_y(base.y), width - 16, at_y(base.y), dashes))
    for p in points:
        bar = f'stroke="{colour(p.number)}" stroke-width="1.3" stroke-opacity=".6"'
        drawn += [stroke(at_x(p.xs[0]), at_y(p.y), at_x(p.xs[1]), at_y(p.y), bar)] if p.xs else []
        drawn += [stroke(at_x(p.x), at_y(p.ys[0]), at_x(p.x), at_y(p.ys[1]), bar)] if p.ys else []
    for p in reversed(points):
        told = f"{p.name}: {x} {p.x:.1f}; {y} {p.y:.1f}"
        drawn.append(
            f'<g><title>{text_of(told)}</title><circle cx="{at_x(p.x):.1f}" cy="{at_y(p.y):.1f}" r="8" '
            f'fill="{colour(p.number)}" stroke="var(--card)"/><text x="{at_x(p.x):.1f}" y="{at_y(p.y) + 3.5:.1f}" '
            f'text-anchor="middle" style="fill:#fff;font-size:10px;font-weight:600">{p.number}</text></g>'
        )
    label = text_of(f"{title} {y} against {x}")
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(drawn)}</svg></figure>'
    )


def ticks(low: float, high: float) -> list[float]:
    """Return four to eight round numbers that enclose both ends."""
    span = max(high - low, 1e-9 + abs(high) / 100)
    power = 10 ** math.floor(math.log10(span / 4))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if span / (power * k) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def text_of(value: Any) -> str:
    """Escape any value for HTML and SVG."""
    return html.escape(str(value))

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


def scatter(
    points: Sequence[Point],
    x: str,
    y: str,
    title: str,
    line: float | None = None,
    spans: tuple[float, float] = (10, 10),
) -> str:
    """An SVG with named marks, their intervals, dashed lines through the baseline and a full one at x = `line`.

    An axis covers at least its span of `spans`, so that a small difference looks small. A name is left out where there is no
    room for it; pointing at the mark tells it.
    """
    width, height, left, bottom, top = 420, 310, 52, 44, 30
    xs = [v for p in points for v in (p.x, *(p.xs or ()))] + ([line] if line is not None else [])
    ys = [v for p in points for v in (p.y, *(p.ys or ()))]
    xticks, yticks = (ticks(*widened(values, span)) for values, span in zip((xs, ys), spans, strict=True))

    def at_x(value: float) -> float:
        return left + (value - xticks[0]) / (xticks[-1] - xticks[0]) * (width - left - 16)

    def at_y(value: float) -> float:
        return height - bottom - (value - yticks[0]) / (yticks[-1] - yticks[0]) * (height - bottom - top)

    drawn = [f'<text x="{left}" y="18" style="font-weight:600">{text_of(title)}</text>']
    for tick in xticks:
        drawn.append(_line(at_x(tick), top, at_x(tick), height - bottom, 'class="grid"'))
        drawn.append(
            f'<text class="soft" x="{at_x(tick):.1f}" y="{height - bottom + 15}" text-anchor="middle">{tick:g}</text>'
        )
    for tick in yticks:
        drawn.append(_line(left, at_y(tick), width - 16, at_y(tick), 'class="grid"'))
        drawn.append(f'<text class="soft" x="{left - 6}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    drawn.append(f'<text x="{(left + width - 16) / 2}" y="{height - 10}" text-anchor="middle">{text_of(x)}</text>')
    middle = (top + height - bottom) / 2
    drawn.append(
        f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">{text_of(y)}</text>'
    )
    if line is not None:
        drawn.append(_line(at_x(line), top, at_x(line), height - bottom, 'stroke="var(--soft)"'))
    base, dashes = points[0], 'stroke="var(--soft)" stroke-dasharray="4 3"'
    drawn.append(_line(at_x(base.x), top, at_x(base.x), height - bottom, dashes))
    drawn.append(_line(left, at_y(base.y), width - 16, at_y(base.y), dashes))
    names = _names([(at_x(p.x), at_y(p.y), p.name) for p in points], (left, top, width - 4, height - bottom))
    for p, name in reversed([*zip(points, names, strict=True)]):
        bar = f'stroke="{colour(p.number)}" stroke-width="1.3" stroke-opacity=".6"'
        told = f"{p.name}: {x} {p.x:.1f}; {y} {p.y:.1f}"
        drawn += [
            f'<g data-run="{text_of(p.name)}"><title>{text_of(told)}</title>',
            _line(at_x(p.xs[0]), at_y(p.y), at_x(p.xs[1]), at_y(p.y), bar) if p.xs else "",
            _line(at_x(p.x), at_y(p.ys[0]), at_x(p.x), at_y(p.ys[1]), bar) if p.ys else "",
            f'<circle cx="{at_x(p.x):.1f}" cy="{at_y(p.y):.1f}" r="4.5" fill="{colour(p.number)}" stroke="var(--card)"/>',
            f"{name}</g>",
        ]
    return _figure(width, height, f"{title} {y} against {x}", drawn)


def _names(marks: Sequence[tuple[float, float, str]], room: tuple[float, float, float, float]) -> list[str]:
    """A <text> beside each mark where it covers no other mark or name, else ""; the first marks choose first."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in marks]
    made = []
    for own, (x, y, name) in enumerate(marks):
        shown = name if len(name) <= 24 else name[:23] + "…"
        wide, made_one = 5.6 * len(shown), ""
        places = [(x + 8, y + 4, "start"), (x - 8, y + 4, "end"), (x, y - 9, "middle"), (x, y + 17, "middle")]
        for at, base, anchor in places:
            start = at - {"start": 0, "end": wide, "middle": wide / 2}[anchor]
            box = (start, base - 10, start + wide, base + 3)
            inside = room[0] <= box[0] and room[1] <= box[1] and box[2] <= room[2] and box[3] <= room[3]
            free = all(
                box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1]
                for i, t in enumerate(taken)
                if i != own
            )
            if inside and free:
                taken.append(box)
                made_one = f'<text x="{at:.1f}" y="{base:.1f}" text-anchor="{anchor}">{text_of(shown)}</text>'
                break
        made.append(made_one)
    return made


@dataclasses.dataclass(frozen=True)
class Bar:
    """A difference with its interval, in points; `better` None: not significant."""

    name: str
    delta: float
    low: float
    high: float
    better: bool | None = None


def forest(parts: Sequence[tuple[str, Sequence[Bar]]], x: str, title: str, least: float = 5) -> str:
    """An SVG of differences, a line each, under the headings of their parts; the axis reaches at least `least` to both sides.

    Filled marks are significant, green for better and red for worse; open ones are not.
    """
    width, left, right, top, step = 420, 124, 118, 30, 19
    ends = [v for _, bars in parts for bar in bars for v in (bar.low, bar.high)]
    xticks = ticks(min([*ends, -least]), max([*ends, least]))

    def at_x(value: float) -> float:
        return left + (value - xticks[0]) / (xticks[-1] - xticks[0]) * (width - left - right)

    drawn, y = [f'<text x="10" y="18" style="font-weight:600">{text_of(title)}</text>'], top + 8
    rows: list[str] = []
    for heading, bars in parts:
        if heading:
            rows.append(f'<text class="soft" x="10" y="{y + 8}">{text_of(heading)}</text>')
            y += step
        for bar in bars:
            shown = bar.name if len(bar.name) <= 19 else bar.name[:18] + "…"
            told = f"{bar.name}: {bar.delta:+.1f} [{bar.low:.1f}, {bar.high:.1f}]"
            ink = {True: "var(--good)", False: "var(--bad)", None: "var(--soft)"}[bar.better]
            fill = "var(--card)" if bar.better is None else ink
            rows.append(
                f'<g data-run="{text_of(bar.name)}"><title>{text_of(told)}</title>'
                f'<text x="{left - 8}" y="{y + 8}" text-anchor="end">{text_of(shown)}</text>'
                + _line(at_x(bar.low), y + 4, at_x(bar.high), y + 4, f'stroke="{ink}" stroke-width="1.6"')
                + f'<circle cx="{at_x(bar.delta):.1f}" cy="{y + 4}" r="4" fill="{fill}" stroke="{ink}" stroke-width="1.4"/>'
                f'<text class="soft" x="{width - right + 8}" y="{y + 8}">{told.partition(": ")[2]}</text></g>'
            )
            y += step
        y += 4
    for tick in xticks:
        ink = 'stroke="var(--soft)"' if tick == 0 else 'class="grid"'
        drawn.append(_line(at_x(tick), top, at_x(tick), y, ink))
        drawn.append(
            f'<text class="soft" x="{at_x(tick):.1f}" y="{y + 15}" text-anchor="middle">{f"{tick:+g}" if tick else "0"}</text>'
        )
    drawn.append(f'<text x="{(left + width - right) / 2}" y="{y + 33}" text-anchor="middle">{text_of(x)}</text>')
    return _figure(width, y + 42, f"{title}: {x}", [*drawn, *rows])


def _line(x1: float, y1: float, x2: float, y2: float, extra: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {extra}/>'


def _figure(width: float, height: float, label: str, drawn: Sequence[str]) -> str:
    return f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{text_of(label)}">{"".join(drawn)}</svg></figure>'


def widened(values: Sequence[float], span: float) -> tuple[float, float]:
    """The ends of the values, or, where they are closer than `span`, that much around their middle; at or above 0 it stays so."""
    low, high = min(values), max(values)
    if high - low < span:
        middle = (low + high) / 2
        low, high = (middle - span / 2, middle + span / 2) if low < 0 else (max(0.0, middle - span / 2), 0.0)
        high = high or low + span
    return low, high


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

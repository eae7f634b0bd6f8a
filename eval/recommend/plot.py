"""Labelled scatter plots as inline SVG: candidates with their intervals, and the frontier of those that none beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_fix.eval.report.svg import text_of, ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 400, 52, 20, 34, 46
LETTER, LINE = 5.7, 13  # of a label, in pixels
LEAST = 0.25  # an axis goes at least so far to both sides of the model itself
ROLES = {"winner": "var(--win)", "proven": "var(--mark)", "candidate": "var(--mark)", "control": "var(--soft)"}


@dataclass(frozen=True)
class Dot:
    """A candidate: its name, its place, half the widths of its intervals, and its role; only `named` ones get a label."""

    name: str
    x: float
    y: float
    dx: float = 0.0
    dy: float = 0.0
    role: str = "candidate"
    named: bool = True


def scatter(
    dots: Sequence[Dot], x: str, y: str, title: str, origin: tuple[float, float], better: tuple[int, int]
) -> str:
    """An SVG; `origin` is the model itself, `better` the signs of a change for the better on each axis (0: neither)."""
    named = [dot for dot in dots if dot.named]
    xs = [origin[0] - LEAST, origin[0] + LEAST, *(v for dot in named for v in (dot.x - dot.dx, dot.x + dot.dx))]
    ys = [origin[1] - LEAST, origin[1] + LEAST, *(v for dot in named for v in (dot.y - dot.dy, dot.y + dot.dy))]
    across, along = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    every = len(dots)
    dots = [dot for dot in dots if across[0] <= dot.x <= across[-1] and along[0] <= dot.y <= along[-1]]

    def at_x(value: float) -> float:
        return LEFT + (value - across[0]) / (across[-1] - across[0]) * (WIDTH - LEFT - RIGHT)

    def at_y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - along[0]) / (along[-1] - along[0]) * (HEIGHT - BOTTOM - TOP)

    def stroke(x1: float, y1: float, x2: float, y2: float, look: str) -> str:
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {look}/>'

    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    drawn = [f'<text x="{LEFT}" y="19" class="title">{text_of(title)}</text>']
    for tick in across:
        drawn += [stroke(at_x(tick), TOP, at_x(tick), bottom, 'class="grid"')]
        drawn += [f'<text class="soft" x="{at_x(tick):.1f}" y="{bottom + 15}" text-anchor="middle">{tick:g}</text>']
    for tick in along:
        drawn += [stroke(LEFT, at_y(tick), right, at_y(tick), 'class="grid"')]
        drawn += [f'<text class="soft" x="{LEFT - 6}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>']
    if every > len(dots):  # far away ones would squeeze what matters
        far = f"{every - len(dots)} more outside"
        drawn.append(f'<text class="soft" x="{right}" y="19" text-anchor="end">{far}</text>')
    middle = (TOP + bottom) / 2
    drawn.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{text_of(x)}</text>')
    turned = f'transform="rotate(-90 14 {middle})"'
    drawn.append(f'<text x="14" y="{middle}" text-anchor="middle" {turned}>{text_of(y)}</text>')
    dashes = 'stroke="var(--soft)" stroke-dasharray="4 3"'
    drawn += [stroke(at_x(origin[0]), TOP, at_x(origin[0]), bottom, dashes)]
    drawn += [stroke(LEFT, at_y(origin[1]), right, at_y(origin[1]), dashes)]
    if all(better):
        edge = frontier([*((dot.x, dot.y) for dot in named if dot.role != "control"), origin], better)
        path = " ".join(f"{at_x(a):.1f},{at_y(b):.1f}" for a, b in edge)
        drawn.append(
            f'<polyline points="{path}" fill="none" stroke="var(--win)" stroke-width="1.5" stroke-opacity=".55"/>'
        )
    for dot in sorted(dots, key=lambda dot: (dot.named, dot.role == "winner")):
        drawn.append(
            _dot(
                dot,
                at_x(dot.x),
                at_y(dot.y),
                [at_x(dot.x - dot.dx), at_x(dot.x + dot.dx)],
                [at_y(dot.y - dot.dy), at_y(dot.y + dot.dy)],
                f"{dot.name}: {x} {dot.x:+.1f}, {y} {dot.y:+.1f}",
            )
        )
    taken = [(at_x(dot.x) - 5, at_y(dot.y) - 5, at_x(dot.x) + 5, at_y(dot.y) + 5) for dot in named]
    own = Dot("your model", *origin)
    drawn.append(f'<path d="M{at_x(origin[0]) - 5:.1f} {at_y(origin[1]):.1f}l5 -5l5 5l-5 5z" fill="var(--ink)"/>')
    for dot in [own, *sorted(named, key=lambda dot: list(ROLES).index(dot.role))]:
        drawn.append(_label(dot, at_x(dot.x), at_y(dot.y), taken))
    return f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text_of(title)}">{"".join(drawn)}</svg></figure>'


def _dot(dot: Dot, x: float, y: float, xs: list[float], ys: list[float], told: str) -> str:
    colour = ROLES[dot.role]
    bars = ""
    if dot.named:
        look = f'stroke="{colour}" stroke-opacity=".45" stroke-width="1.3"'
        bars = f'<line x1="{xs[0]:.1f}" y1="{y:.1f}" x2="{xs[1]:.1f}" y2="{y:.1f}" {look}/>' if dot.dx else ""
        bars += f'<line x1="{x:.1f}" y1="{ys[0]:.1f}" x2="{x:.1f}" y2="{ys[1]:.1f}" {look}/>' if dot.dy else ""
    fill = colour if dot.role in ("winner", "proven") else "var(--card)"
    shade, size = ("", 5) if dot.named else (' opacity=".5"', 3)
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{fill}" stroke="{colour}" stroke-width="1.5"/>'
    return f"<g{shade}><title>{text_of(told)}</title>{bars}{circle}</g>"


def _label(dot: Dot, x: float, y: float, taken: list[tuple[float, float, float, float]]) -> str:
    """The name beside its dot, at the first of some places that no other label or dot covers; without one, no label."""
    wide = LETTER * len(dot.name)
    for down in (4, -8, 16):
        for anchor, left in (("start", x + 8), ("end", x - 8 - wide)):
            box = (left, y + down - LINE + 3, left + wide, y + down + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= TOP - 4 and box[3] <= HEIGHT - BOTTOM + 4
            if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                taken.append(box)
                bold = ' style="font-weight:600"' if dot.role == "winner" or dot.name == "your model" else ""
                at = f'x="{x + 8 if anchor == "start" else x - 8:.1f}" y="{y + down:.1f}" text-anchor="{anchor}"'
                return f'<text class="label" {at}{bold}>{text_of(dot.name)}</text>'
    return ""


def frontier(points: Sequence[tuple[float, float]], better: tuple[int, int]) -> list[tuple[float, float]]:
    """The points that no other is at least as good as in both, along the first axis.

    >>> frontier([(0, 0), (1, 1), (2, -1), (1, -2)], (1, 1))
    [(1, 1), (2, -1)]
    """
    a, b = better
    return sorted(
        {p for p in points if not any(q != p and a * q[0] >= a * p[0] and b * q[1] >= b * p[1] for q in points)}
    )

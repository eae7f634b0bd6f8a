"""Draw what captions find against what they invent, each run cut shorter and shorter (see `compare.frontier`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vlm_fix.whole import whole_file


def draw(
    curves: Mapping[str, Sequence[tuple[float, float, float]]], heading: str, found: str, path: str | Path
) -> None:
    """Save a figure, in the format that the name of the file asks for; a curve below another is better."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.9), layout="constrained")
    ax = figure.subplots()
    for name, points in curves.items():
        _, x, y = zip(*points, strict=True)
        (line,) = ax.plot([100 * v for v in x], [100 * v for v in y], lw=1.2, label=name)
        ax.plot(100 * x[-1], 100 * y[-1], "o", color=line.get_color())
    ax.set_xlabel(f"{found}, % (right is better)")
    ax.set_ylabel(f"{heading}, % (lower is better)")
    ax.set_title("Captions cut to 5, 10, ... 100 % (dot) of their words", size=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    with whole_file(path) as part:
        figure.savefig(part, dpi=160, format=Path(path).suffix[1:])

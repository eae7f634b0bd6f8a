"""A picture of an Observation: where each answer token looks, on the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_fix.errors import VlmFixError

if TYPE_CHECKING:
    from .observe import Observation

MOST = 12  # maps, where the rows are not chosen
ACROSS = 4


def plot(
    seen: Observation,
    rows: int | Sequence[int] | None = None,
    image: Any = None,
    tokenizer: Any = None,
    index: int = 0,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    sinks: bool = True,
) -> Any:
    """The matplotlib figure of `Observation.plot`, whose docstring says more."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise VlmFixError("plot needs matplotlib: pip install 'vlm-fix[eval]'") from None
    count = seen.visual_mass.shape[2]
    chosen = (
        [rows] if isinstance(rows, int) else list(rows) if rows is not None else list(range(count - 1) or [0])[:MOST]
    )
    if not chosen:
        raise VlmFixError("rows is empty: name the rows to draw, such as [0, 1], or leave it out.")
    maps = [seen.heatmap(row, layers, heads, sinks, index).numpy() for row in chosen]
    across = min(ACROSS, len(maps))
    down = math.ceil(len(maps) / across)
    figure = Figure(figsize=(2.5 * across + 0.8, 2.7 * down + 0.5), layout="constrained")
    high = max(float(one.max()) for one in maps) or 1.0
    axes, drawn = figure.subplots(down, across, squeeze=False).flatten(), None
    for place, row, one in zip(axes, chosen, maps, strict=False):
        height, width = one.shape
        extent = (0, width, height, 0)
        if image is not None:
            place.imshow(image, extent=extent)
        see_through = None if image is None else 0.25 + 0.7 * one / high
        drawn = place.imshow(one, extent=extent, vmin=0, vmax=high, cmap="inferno", alpha=see_through)
        place.set_title(_word(seen, row % count, tokenizer), fontsize=9)
    for place in axes:
        place.set_axis_off()
    assert drawn is not None
    figure.colorbar(drawn, ax=list(axes), label="attention weight of an image token", shrink=0.8)
    of = [f"{what} {', '.join(map(str, which))}" for what, which in (("layers", layers), ("heads", heads)) if which]
    figure.suptitle(f"What each token looked at: mean over {' and '.join(of) or 'all layers and heads'}", fontsize=10)
    return figure


def _word(seen: Observation, row: int, tokenizer: Any) -> str:
    """What the row predicts."""
    if row >= len(seen.tokens):
        return "(what comes next)"
    token = int(seen.tokens[row])
    return f"{row}: {getattr(tokenizer, 'tokenizer', tokenizer).decode([token]).strip()}" if tokenizer else f"row {row}"


def short(seen: Observation) -> str:
    """One line for `repr`."""
    depth, heads, rows = seen.visual_mass.shape
    grids = ", ".join(f"{h} x {w}" for h, w in seen.grids) or "no map of them"
    share = float(seen.visual_mass.mean())
    return (
        f"Observation({len(seen.tokens)} answer tokens in {rows} rows, {depth} layers x {heads} heads, "
        f"{seen.kept.shape[1]} image tokens ({grids}), attention to the image {share:.2f} on average)"
    )

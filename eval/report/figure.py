"""Draw figure.png: what changed against the baseline, ready for a paper.

    python -m vlm_fix.eval.report.figure results/picto-smol-shift docs/images/picto-smol-shift.png

also draws docs/images/picto-smol-shift-dark.png, for dark pages.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_fix.eval.run.store import load_results
from vlm_fix.eval.run.summary import by_split
from vlm_fix.eval.scorers.benchmark import Captions
from vlm_fix.eval.scorers.registry import LAYOUTS
from vlm_fix.eval.stats import SIGNIFICANT
from vlm_fix.whole import whole_file

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1")  # Okabe and Ito
MARKERS = ("D", "o", "s", "^", "v", "P", "X", "<")


LIGHT, DARK = ("white", "black"), ("#0d1117", "#e6edf3")  # ground and ink


def draw(results: Mapping[str, Any], path: Path, dark: bool = False) -> None:
    """Draw differences per split with 95 % intervals and McNemar's p, and for CHAIR C_I over recall."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs, (ground, ink) = list(results["runs"]), DARK if dark else LIGHT
    colours = (ink, *COLOURS[1:])
    looks = {
        run: (colours[i % len(colours)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]) for i, run in enumerate(runs)
    }
    panels = list(results["settings"]["data"])
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    style |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), ground)
    style |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
    with plt.rc_context(style):
        drawn, axes = plt.subplots(
            1, len(panels), figsize=(5.2 * len(panels), 3.9), layout="constrained", squeeze=False
        )
        for panel, ax in zip(panels, axes[0], strict=True):
            answers = LAYOUTS[panel].answers
            if isinstance(answers, Captions) and answers.drawn:
                _caption_panel(ax, results, looks, panel, answers)
            else:
                _delta_panel(ax, results, looks, panel)
        handles = [
            plt.Line2D(
                [], [], color=colour, marker=marker, linestyle="", label=run if len(run) < 40 else run[:39] + "…"
            )
            for run, (colour, marker) in looks.items()
        ]
        drawn.legend(handles=handles, loc="outside lower center", ncols=min(len(runs), 6 if len(panels) > 1 else 3))
        name, source = Path(results["settings"]["model"]["name"]).name, results["settings"]["data"][panels[0]]["source"]
        drawn.suptitle(
            f"{name} on {source}; bars: 95 % interval of the difference, open marks: not significant (Holm)", size=9
        )
        with whole_file(path) as part:  # a page never shows half a picture
            drawn.savefig(part, dpi=160, format="png", metadata={"Software": None})
        plt.close(drawn)


def _delta_panel(ax: Any, results: Mapping[str, Any], looks: Mapping[str, tuple[str, str]], benchmark: str) -> None:
    """Draw the difference of the first compared metric to the right: splits from top to bottom, a row per method."""
    layout, rows = LAYOUTS[benchmark], list(by_split(results, benchmark))
    name = layout.compared[0]
    splits = list(dict.fromkeys(split for split, _, _ in rows))
    methods = list(looks)[1:]
    step = 0.7 / max(len(methods), 1)
    for split, run, scores in rows:
        if name not in scores["delta"]:
            continue
        change, low, high = (100 * scores["delta"][name][key] for key in ("delta", "low", "high"))
        y = splits.index(split) + (methods.index(run) - (len(methods) - 1) / 2) * step
        colour, marker = looks[run]
        face = colour if scores["delta"][name]["p_holm"] < SIGNIFICANT else ax.get_facecolor()
        bars = [[change - low], [high - change]]
        ax.errorbar(change, y, xerr=bars, fmt=marker, color=colour, mfc=face, ms=5, lw=1.3, capsize=2)
        if "outcomes" in scores:
            p = scores["outcomes"]["p"]
            ax.text(1.01, y, f"p {p:.2g}", transform=ax.get_yaxis_transform(), size=6, va="center", color=colour)
    baseline = next(iter(looks))
    base = {split: scores[name] for split, run, scores in rows if run == baseline}
    ax.set_yticks(range(len(splits)), [f"{s}\n(baseline {100 * base[s]:.1f})" if s in base else s for s in splits])
    ax.set_ylim(len(splits) - 0.5, -0.5)
    for edge in range(1, len(splits)):
        ax.axhline(edge - 0.5, color="#88888855", lw=0.8, zorder=0)
    ax.axvline(0, color="#777777", lw=1, zorder=0)
    ax.set_xlabel(f"{benchmark.upper()} {layout.columns.get(name, name)}, points above the baseline; p: McNemar")


def _caption_panel(
    ax: Any, results: Mapping[str, Any], looks: Mapping[str, tuple[str, str]], task: str, captions: Captions
) -> None:
    """Draw what captions find to the right and what they invent upwards, with the intervals of the differences."""
    for _, run, scores in by_split(results, task):
        colour, marker = looks[run]
        x, y = 100 * scores[captions.found], 100 * scores[captions.invented]
        bars: dict[str, Any] = {}
        for axis, name in (("xerr", captions.found), ("yerr", captions.invented)):
            if name in scores["delta"]:
                change, low, high = (100 * scores["delta"][name][key] for key in ("delta", "low", "high"))
                bars[axis] = [[change - low], [high - change]]
        if not bars:  # the baseline: lines to compare the others with
            ax.axvline(x, color="#bbbbbb", lw=0.9, ls="--", zorder=0)
            ax.axhline(y, color="#bbbbbb", lw=0.9, ls="--", zorder=0)
        full = not bars or scores["delta"][captions.invented]["p_holm"] < SIGNIFICANT
        face = colour if full else ax.get_facecolor()
        ax.errorbar(x, y, fmt=marker, color=colour, mfc=face, ms=6, lw=1.1, capsize=2, **bars)
    ax.set_xlabel(f"{task.upper()} {captions.found}, % of the objects (right is better)")
    ax.set_ylabel(f"{captions.heading}, % of the mentions (lower is better)")


def main() -> None:
    results, place = load_results(Path(sys.argv[1])), Path(sys.argv[2])
    draw(results, place)
    draw(results, place.with_stem(f"{place.stem}-dark"), dark=True)


if __name__ == "__main__":
    main()

"""Show the effect of pruning at each budget: figure and table of a results folder whose runs say keep=N.

`python -m vlm_fix.eval.curves results/picto-llava-pruning docs/pruning.md` draws docs/images/pruning.png and writes the table
between the page's markers `<!-- curves -->` and `<!-- /curves -->`.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import write_atomic
from vlm_fix.whole import whole_file

CONTROLS = ("random_tokens", "uniform_grid", "downsample_image")
PANELS = {
    "accuracy": "POPE accuracy, mean of splits",
    "chair_i": "CHAIR_i (lower is better)",
    "recall": "caption recall",
}
MARKS = ("<!-- curves -->", "<!-- /curves -->")


def points(results: dict[str, Any]) -> dict[str, dict[int, dict[str, float]]]:
    """Return method -> budget -> percent of each of PANELS; the baseline has the budget 0."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for run, scores in results["runs"].items():
        keep = re.search(r"\bkeep=(\d+)\b", run)
        if run != "baseline" and (keep is None or "+" in run):
            continue
        captions = scores["chair"]["captions"]
        found.setdefault(run.partition(":")[0], {})[int(keep[1]) if keep else 0] = {
            "accuracy": 100 * statistics.mean(split["accuracy"] for split in scores["pope"].values()),
            "chair_i": 100 * captions["chair_i"],
            "recall": 100 * captions["recall"],
        }
    if len(found) < 2:
        raise VlmFixError("no run of these results says keep=N; run vlm-fix eval all --method hiprune:keep=32,...")
    return found


def figure(results: dict[str, Any], path: Path) -> None:
    """Draw the three panels, controls in grey, the unpruned model as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = points(results)
    base, budgets = found.pop("baseline")[0], sorted({k for each in found.values() for k in each}, reverse=True)
    drawn, axes = pyplot.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    colours = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    names = sorted(found, key=lambda name: (name in CONTROLS, name))
    for ax, (metric, title) in zip(axes, PANELS.items(), strict=True):
        ax.axhline(base[metric], color="black", linewidth=1, label="all tokens")
        for i, name in enumerate(names):
            xs = [k for k in budgets if k in found[name]]
            look: dict[str, Any] = {"color": colours[i % 20], "marker": "osv^DP"[i % 6]}
            if name in CONTROLS:
                look = {"color": "0.55", "linestyle": "--", "marker": "^sD"[CONTROLS.index(name)]}
            ys = [found[name][k][metric] for k in xs]
            ax.plot([budgets.index(k) for k in xs], ys, label=name, markersize=4, linewidth=1.4, **look)
        ax.set_title(title, fontsize=10)
        ax.set_xticks(range(len(budgets)), [str(k) for k in budgets])
        ax.set_xlabel("image tokens kept")
        ax.set_ylabel("%")
        ax.grid(alpha=0.25)
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    with whole_file(path) as part:
        drawn.savefig(part, dpi=120, format="png")
    pyplot.close(drawn)


def table(results: dict[str, Any]) -> str:
    """Format a Markdown table: POPE accuracy, CHAIR_i and recall per method and budget, the best of a column in bold."""
    found = points(results)
    base = found.pop("baseline")[0]
    budgets = sorted({k for each in found.values() for k in each}, reverse=True)
    names = sorted(found, key=lambda name: (name not in CONTROLS, name))
    best = {
        (k, metric): (min if metric == "chair_i" else max)(found[n][k][metric] for n in names if k in found[n])
        for k in budgets
        for metric in PANELS
    }

    def cell(name: str, k: int, metric: str) -> str:
        value = found[name].get(k, {}).get(metric)
        if value is None:
            return ""
        return f"**{value:.1f}**" if value == best[k, metric] else f"{value:.1f}"

    short = {"accuracy": "POPE", "chair_i": "CHAIR_i", "recall": "recall"}
    head = ["method"] + [f"{short[m]} @ {k}" for k in budgets for m in PANELS]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    whole = [f"{base[m]:.1f}" for m in PANELS]
    lines.append("| all tokens | " + " | ".join(whole * len(budgets)) + " |")
    for name in names:
        label = f"`{name}`" + (" (control)" if name in CONTROLS else "")
        lines.append(f"| {label} | " + " | ".join(cell(name, k, m) for k in budgets for m in PANELS) + " |")
    return "\n".join(lines)


def write(folder: Path, page: Path) -> None:
    """Write the figure and table of `folder` into the documentation page."""
    results, text = json.loads((folder / "results.json").read_text()), page.read_text()
    if any(text.count(mark) != 1 for mark in MARKS):
        raise VlmFixError(f"{page} needs the lines {MARKS[0]} and {MARKS[1]} once each.")
    figure(results, page.parent / "images" / "pruning.png")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    write_atomic(page, f"{before}{MARKS[0]}\n{table(results)}\n{MARKS[1]}{after}")


def main() -> None:
    """Run the program; the module docstring describes its arguments."""
    write(Path(sys.argv[1]), Path(sys.argv[2]))

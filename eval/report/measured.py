"""What each method did in the result files of this repository: for docs/methods.md and `vlm-fix methods NAME`.

`write` keeps it in data/measured.json, which is in the package as results/ is not.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlm_fix.eval.files import DATA, write_atomic
from vlm_fix.eval.run.summary import correct
from vlm_fix.eval.stats import SIGNIFICANT

KEPT = DATA / "measured.json"
COLUMNS: dict[str, tuple[str, str, str]] = {
    "POPE random": ("pope", "random", "accuracy"),
    "popular": ("pope", "popular", "accuracy"),
    "adversarial": ("pope", "adversarial", "accuracy"),
    "yes-ratio (adv.)": ("pope", "adversarial", "yes_ratio"),
    "CHAIR_i": ("chair", "captions", "chair_i"),
    "recall": ("chair", "captions", "recall"),
}
"""Heading -> (task, split, metric)."""
GOOD = {
    "POPE random": ("POPE random", 1),
    "popular": ("POPE popular", 1),
    "adversarial": ("POPE adversarial", 1),
    "CHAIR_i": ("CHAIR_i", -1),
    "recall": ("caption recall", 1),
}
"""Heading -> (its name in a sentence, 1 if more is better); a yes-ratio is neither."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A run of a single method: model, spec, folder of the results, differences by heading, and why it did nothing.

    `figures` holds delta, low, high (fractions) and p_holm of each heading that the run has; `idle` is what it said if it
    changed nothing.
    """

    model: str
    spec: str
    folder: str
    figures: Mapping[str, Mapping[str, float]]
    acted: bool = True
    idle: str = ""


def read(folder: Path) -> dict[str, list[Row]]:
    """Return method name -> all runs in `folder`/*/results.json of this method alone."""
    found: dict[str, list[Row]] = {}
    for path in sorted(folder.glob("*/results.json")):
        results = json.loads(path.read_text())
        correct(results["runs"])
        settings = results["settings"]
        for run, scores in results["runs"].items():
            if run == "baseline" or "+" in run:
                continue
            figures = {}
            for heading, (task, split, metric) in COLUMNS.items():
                if delta := scores.get(task, {}).get(split, {}).get("delta", {}).get(metric):
                    figures[heading] = {key: round(delta[key], 6) for key in ("delta", "low", "high", "p_holm")}
            acted = results.get("changed", {}).get(run, {}).get("changed") != 0
            said = [text.partition("in this call: ")[2] for text in results.get("warnings", {}).get(run, {})]
            told = f"{run} (sampled)" if settings.get("sample") else run
            model = Path(settings["model"]["name"]).name
            row = Row(model, told, path.parent.name, figures, acted, next(filter(None, said), ""))
            found.setdefault(re.split("[: ]", run)[0], []).append(row)
    return found


def write(folder: Path, path: Path = KEPT) -> None:
    """Keep what `read` returns, a row a line."""
    rows = [
        json.dumps({"method": name} | dataclasses.asdict(row)) for name, each in read(folder).items() for row in each
    ]
    write_atomic(path, "[\n" + ",\n".join(rows) + "\n]\n")


@functools.cache
def table() -> Mapping[str, Sequence[Row]]:
    """Return what `write` kept: method name -> its runs."""
    found: dict[str, list[Row]] = {}
    for row in json.loads(KEPT.read_text(encoding="utf-8")):
        found.setdefault(row.pop("method"), []).append(Row(**row))
    return found


def points(figure: Mapping[str, float] | None, before: str = "", after: str = "") -> str:
    """Format a difference in points, such as "+1.0 [0.3, 1.8]", a significant one marked; "" if there is none."""
    if not figure:
        return ""
    change, low, high = (round(100 * figure[key], 1) + 0.0 for key in ("delta", "low", "high"))  # no "-0.0"
    before, after = (before, after) if figure["p_holm"] < SIGNIFICANT else ("", "")
    return f"{before}{change:+.1f}{after} [{low:.1f}, {high:.1f}]"


def verdict(rows: Sequence[Row]) -> str:
    """Sum up the significant differences in a sentence."""
    if rows and not any(row.acted for row in rows):
        return "It never acted here: " + next((row.idle for row in rows if row.idle), "no answer changed.")
    better: set[str] = set()
    worse: set[str] = set()
    for row in rows:
        for heading, figure in row.figures.items():
            if heading in GOOD and figure["p_holm"] < SIGNIFICANT:
                what, sign = GOOD[heading]
                (better if figure["delta"] * sign > 0 else worse).add(what)
    if not better and not worse:
        return "Does not help here: no difference is significant."
    parts = [f"{word} on {', '.join(sorted(names))}" for word, names in (("better", better), ("worse", worse)) if names]
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}{'' if better else '; it does not help here'}."

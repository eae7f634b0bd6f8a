"""Make the leaderboard: one self-contained HTML page with a row for every run of many evaluations, to sort and to filter.

A cell has the difference from the baseline of the same run, drawn with its 95 % interval on one scale for its column; that
scale reaches at least five points to both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_fix import index
from vlm_fix.eval.scorers.registry import LOWER, NEITHER, better
from vlm_fix.eval.stats import SIGNIFICANT
from vlm_fix.registry import split_stack

from . import shell
from .page import columns, read
from .svg import text_of

LEAST, WIDTH, HEIGHT = 5.0, 96, 14
ABOUT = (
    "Every row is one method on one model and data set. Figures are differences in points from the unmodified model in the same "
    "run, with 95 % intervals (paired bootstrap over images). Green is significantly better, red significantly worse, at 5 % "
    "after Holm's correction over the runs of its evaluation; the grey line is no difference. Compare inside one model and data "
    "set: scenes, seeds and decoding differ between them."
)


def page(folders: Sequence[str | Path]) -> str:
    """Return the HTML. Raises VlmFixError for a folder without results."""
    rows = [row for _, results in read(folders) for row in _rows(results)]
    heads: dict[str, str] = {}  # heading -> what is better
    for *_, deltas in rows:
        for head, delta in deltas.items():
            name = delta["name"]
            heads[head] = "" if name in NEITHER else "lower is better" if name in LOWER else "higher is better"
    scale = {
        head: max(
            [LEAST, *(abs(100 * d[key]) for *_, cells in rows if (d := cells.get(head)) for key in ("low", "high"))]
        )
        for head in heads
    }
    body = "".join(_row(row, heads, scale) for row in rows)
    figures = [f"{head}\n{sense}" for head, sense in heads.items()]
    titles = ["method", *figures, "kind", "model", "data"]
    head = "".join(
        f'<th{"" if 0 < i < len(figures) + 1 else " class=text"}><button type="button">{text_of(title)}</button></th>'
        for i, title in enumerate(titles)
    )
    selects = _select("model", [row[1] for row in rows]) + _select("kind", [row[3] for row in rows])
    table = (
        f'<div class="scroll"><table class="board"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
    return shell.whole("Leaderboard", f'<p class="soft">{text_of(ABOUT)}</p>{table}', selects, "wide")


def _rows(results: Mapping[str, Any]) -> list[tuple[str, str, str, str, dict[str, Any]]]:
    """(run, model, data, kind, heading -> difference and figure) of each method."""
    settings, runs = results["settings"], results["runs"]
    _, *methods = runs
    model = Path(settings["model"]["name"]).name
    data = "; ".join(dict.fromkeys(each["source"] for each in settings["data"].values()))
    data += (
        ", sampling" if settings["sample"] else f", {settings['num_beams']} beams" if settings["num_beams"] > 1 else ""
    )
    known = {entry.name: entry.kind for entry in index.entries() or ()}
    made = []
    for run in methods:
        deltas = {
            full: delta | {"name": name}
            for _, full, task_, split, name in columns(results)
            if split and (delta := runs[run][task_][split]["delta"].get(name))
        }
        names = [part.partition(":")[0] for part in split_stack(run.partition(" as ")[0])]
        kinds = dict.fromkeys(known.get(name, "other") for name in names)
        made.append((run, model, data, " + ".join(kinds), deltas))
    return made


def _row(row: tuple[Any, ...], heads: Mapping[str, Any], scale: Mapping[str, float]) -> str:
    run, model, data, kind, deltas = row
    cells = "".join(_cell(deltas.get(head), scale[head]) for head in heads)
    words = "".join(f'<td class="text">{text_of(word)}</td>' for word in (kind, model, data))
    told = f'data-run="{text_of(run)}" data-model="{text_of(model)}" data-kind="{text_of(kind)}"'
    return f'<tr {told}><td class="text"><code>{text_of(run)}</code></td>{cells}{words}</tr>'


def _cell(delta: Mapping[str, Any] | None, most: float) -> str:
    if delta is None:
        return '<td data-v=""></td>'
    change, low, high = (round(100 * delta[key], 1) + 0.0 for key in ("delta", "low", "high"))
    good = better(delta["name"], delta["delta"]) if delta["p_holm"] < SIGNIFICANT else None
    kind, ink = {True: ("better", "good"), False: ("worse", "bad"), None: ("", "soft")}[good]
    at, middle = (lambda value: WIDTH / 2 + value / most * (WIDTH / 2 - 3)), HEIGHT / 2
    drawn = (
        f'<svg width="{WIDTH}" height="{HEIGHT}" aria-hidden="true"><path class="grid" d="M{WIDTH / 2} 0V{HEIGHT}"/>'
        f'<path stroke="var(--{ink})" d="M{at(low):.1f} {middle}H{at(high):.1f}"/>'
        f'<circle cx="{at(change):.1f}" cy="{middle}" r="3" fill="var(--{ink})"/></svg>'
    )
    return f'<td data-v="{change}"><span class="{kind}">{change:+.1f}</span> <small>[{low:.1f}, {high:.1f}]</small>{drawn}</td>'


def _select(name: str, values: Sequence[str]) -> str:
    options = "".join(f"<option>{text_of(value)}</option>" for value in sorted(set(values)))
    return f'<select name="{name}" aria-label="{name}"><option value="">every {name}</option>{options}</select>'

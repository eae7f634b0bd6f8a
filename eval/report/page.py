"""Make one self-contained HTML page, or a short Markdown table, from the folders of one or more evaluations.

The page has the tables, figures as inline SVG (accuracy against yes-ratio, CHAIR against recall or cover, gain against
time), and answers side by side with object words marked. It loads nothing, follows the reader's light or dark setting,
and can be printed. It shows the samples on which the runs differ most, and says so.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import write_atomic
from vlm_fix.eval.run.summary import correct
from vlm_fix.eval.scorers.benchmark import Captions, Layout, YesNo
from vlm_fix.eval.scorers.registry import LAYOUTS, PLAIN, groups, once, scorer_and_commit
from vlm_fix.eval.stats import SIGNIFICANT

from . import side_by_side
from . import tables as report
from .svg import Point, colour, scatter, text_of

MARKS = "<!-- leaderboard -->", "<!-- /leaderboard -->"
STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5c6670;--line:#d9dee3;--page:#fff;--card:#f6f8fa;--good:#0b6b3a;
--good-bg:#d8f3e3;--bad:#a3130b;--bad-bg:#fde0dd}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ec;--soft:#9aa5b1;--line:#343b43;--page:#14171b;--card:#1d2228;
--good:#8be0b0;--good-bg:#123524;--bad:#ffab9f;--bad-bg:#4a1713}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:1180px;margin:2rem auto;
padding:0 1rem}
h1,h2,h3{line-height:1.25;text-wrap:balance}h2{margin-top:3rem;border-top:1px solid var(--line);padding-top:1.5rem}
small,.soft,caption{color:var(--soft)}caption{text-align:left;font-size:.9em;padding:.4rem 0}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9em;margin:1rem 0}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
th{font-weight:600}td:first-child,th:first-child,tr.split td{text-align:left}tr.split td{font-weight:600;padding-top:.8rem}
td small{display:block}td .star{color:var(--ink);font-weight:600}code{font-size:.95em}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:1rem}figure{margin:0}
svg{width:100%;height:auto;background:var(--card);border-radius:8px}svg text{fill:var(--ink);font:11px system-ui,sans-serif}
svg .soft{fill:var(--soft)}svg .grid{stroke:var(--line)}.legend{columns:3 220px;padding:0;list-style:none}
.legend b{display:inline-block;min-width:1.5em;border-radius:1em;color:#fff;text-align:center;font-size:.8em}
.sample{background:var(--card);border-radius:8px;padding:1rem;margin:1rem 0;break-inside:avoid}
.sample:has(img){display:grid;grid-template-columns:150px 1fr;gap:.5rem 1rem}.sample p:first-of-type{margin:0}
.sample img{grid-row:1/3;width:150px;border-radius:6px}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,230px),1fr));gap:.8rem;align-content:start}
@media (max-width:640px){.sample img{grid-row:1}.sample:has(img) .answers{grid-column:1/3}
.sample:has(img){grid-template-columns:min(150px,35%) 1fr}.sample img{width:100%}}
.answers div{border-top:2px solid var(--line);padding-top:.3rem}.answers p{margin:.2rem 0;overflow-wrap:anywhere}
mark{border-radius:3px;padding:0 .15em}mark.good{color:var(--good);background:var(--good-bg)}
mark.bad{color:var(--bad);background:var(--bad-bg);text-decoration:underline wavy}
"""


def read(folders: Sequence[str | Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Read (folder, results) of finished evaluations. Raises VlmFixError for a folder without readable results.json."""
    found = []
    for folder in map(Path, folders):
        path = folder / "results.json" if folder.is_dir() else folder
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            correct(results["runs"])
            found.append((path.parent, {**results, "runs": dict(results["runs"])}))
        except (OSError, ValueError, KeyError, TypeError):
            raise VlmFixError(
                f"{path} is not the result of a finished evaluation: give folders that `vlm-fix eval --output` made, or "
                "finish the run there with --resume."
            ) from None
    return found


@contextlib.contextmanager
def shown(folder: Path) -> Iterator[None]:
    """Raise VlmFixError for results that lack what a report shows."""
    try:
        yield
    except VlmFixError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration) as error:
        raise VlmFixError(
            f"The results.json of {folder} is not as `vlm-fix eval` of this version writes it ({type(error).__name__}: {error}): "
            "run it again."
        ) from error


def page(folders: Sequence[str | Path], samples: int = 6) -> str:
    """Return the HTML of all folders, a section each, with `samples` captions and as many questions side by side."""
    sections = ""
    for folder, results in read(folders):
        with shown(folder):
            sections += _section(folder, results, samples)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>vlm-fix report</title><style>{STYLE}</style></head><body>'
        f"<h1>Hallucination with and without methods</h1>{sections}</body></html>\n"
    )


def _section(folder: Path, results: Mapping[str, Any], samples: int) -> str:
    settings = results["settings"]
    sources = "; ".join(dict.fromkeys(data["source"] for data in settings["data"].values()))
    model = settings["model"]
    about = [
        f"{model['parameters'] / 1e6:,.0f} M parameters, {model['dtype']}, weights {model['weights'][:23]}",
        f"seed {settings['seed']}, scorer {settings['scorer']}, {results['hardware']}",
        ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        f"vlm-fix {results['vlm_fix']}, {results['date'][:10]}, settings {results['config_hash'][:12]}",
    ]
    notes = "".join(f"<li><code>{text_of(run)}</code>: {text_of(note)}</li>" for run, note in report.notes(results))
    return (
        f"<h2>{text_of(Path(model['name']).name)} on {text_of(sources)}</h2>"
        f'<p class="soft">{"<br>".join(map(text_of, about))}</p>'
        f'<ul class="legend">{_legend(results)}</ul><div class="figures">{"".join(figures(results))}</div>'
        f"{''.join(map(_grid, report.grids(results)))}"
        f'<p class="soft">{text_of(report.STAR)}</p><ul>{notes}</ul>{side_by_side.samples(folder, results, samples)}'
    )


def _legend(results: Mapping[str, Any]) -> str:
    return "".join(
        f'<li><b style="background:{colour(i)}">{i}</b> <code>{text_of(run)}</code></li>'
        for i, run in enumerate(results["runs"])
    )


def _grid(grid: report.Grid) -> str:
    """Format a table with the method in the first column and each split in its own row."""
    head = "".join(f"<th>{text_of(head)}</th>" for head in ("method", *grid.heads))
    rows, last = [], ""
    for split, run, cells in grid.rows:
        if split != last:
            rows.append(f'<tr class="split"><td colspan="{len(cells) + 1}">{text_of(split)}</td></tr>')
        last = split
        shown = "".join(
            f"<td>{text_of(c.text)}"
            + (f"<small{' class=star' if c.star else ''}>{text_of(c.change)}</small>" if c.change else "")
            + "</td>"
            for c in cells
        )
        rows.append(f"<tr><td><code>{text_of(run)}</code></td>{shown}</tr>")
    return (
        f'<div class="scroll"><table><caption>{text_of(grid.caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


# ------------------------------------------------------------------------------------------------------------- figures


def figures(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield the SVG figures that these results have data for."""
    shown = {task: LAYOUTS[task] for task in LAYOUTS if task in results["settings"]["data"]}
    for task, layout in shown.items():
        if isinstance(layout.answers, YesNo):
            yield _accuracy_figure(results, task, layout.answers)
    for task, layout in shown.items():
        if isinstance(layout.answers, Captions):
            yield _caption_figure(results, task, layout.answers)
    for task, layout in shown.items():
        yield from _cost_figure(results, task, layout)


def _accuracy_figure(results: Mapping[str, Any], task: str, answers: YesNo) -> str:
    """Draw accuracy against the yes-ratio."""
    points = []
    for i, (run, each) in enumerate(results["runs"].items()):
        parts = _disjoint(each[task], answers)
        x, y = (100 * fmean(part[name] for part in parts) for name in ("yes_ratio", answers.accuracy))
        points.append(Point(i, run, x, y))
    over = f"{answers.accuracy}, %" + (", mean over splits" if len(parts) > 1 else "")
    line = 50 if answers.balanced else None
    return scatter(points, f"{task.upper()} yes-ratio, %", over, "Is a gain only a shift to yes?", line)


def _caption_figure(results: Mapping[str, Any], task: str, captions: Captions) -> str:
    """Draw what captions invent against what they find."""
    points = []
    for i, (run, each) in enumerate(results["runs"].items()):
        scores = each[task]["captions"]
        x, y = 100 * scores[captions.found], 100 * scores[captions.invented]
        ends = (_ends(v, scores, n) for v, n in ((x, captions.found), (y, captions.invented)))
        points.append(Point(i, run, x, y, *ends))
    heading = f"{captions.heading}, % (lower is better)"
    return scatter(points, f"{task.upper()} {captions.found}, %", heading, "Is a gain only saying less?")


def _cost_figure(results: Mapping[str, Any], task: str, layout: Layout) -> Iterator[str]:
    """Draw the gain against the time per token, if both are known."""
    if not layout.gain:
        return
    runs, (metric, sign, label) = results["runs"], layout.gain
    base, points = next(iter(runs)), []
    per_second = {run: results["speed"][run][task]["tokens_per_second"] for run in runs}
    for i, (run, each) in enumerate(runs.items()):
        parts = [part for part in each[task] if part not in groups(task)] or [*each[task]]
        gain = fmean(each[task][part][metric] - runs[base][task][part][metric] for part in parts)
        if per_second[run] and per_second[base]:
            points.append(Point(i, run, per_second[base] / per_second[run], 100 * sign * gain))
    if points:
        yield scatter(points, "time per token, baseline = 1", label, "What does it cost?", 1)


def _disjoint(parts: Mapping[str, Any], answers: YesNo) -> list[Any]:
    """Return the part with all answers, or else the parts that share none."""
    if answers.total in parts:
        return [parts[answers.total]]
    return [part for name, part in parts.items() if name not in answers.groups]


def _ends(value: float, scores: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """Return the interval of a difference, shifted to the run's own value."""
    delta = scores["delta"].get(name)
    return delta and (value + 100 * (delta["low"] - delta["delta"]), value + 100 * (delta["high"] - delta["delta"]))


# ------------------------------------------------------------------------------------------------------------ Markdown


def leaderboard(folders: Sequence[str | Path]) -> str:
    """Return a short Markdown table per folder: the main figures of each task and split, and speed, of every run."""
    boards = []
    for folder, results in read(folders):
        with shown(folder):
            boards.append(_board(folder, results))
    return "\n".join(boards)


def _board(folder: Path, results: Mapping[str, Any]) -> str:
    settings, runs = results["settings"], results["runs"]
    base = next(iter(runs))
    columns: list[tuple[str, str, str, str]] = []  # heading, task, split ("": their mean), metric
    for task in settings["data"]:
        for split in runs[base][task]:
            where = f"{task.upper()} {split}" if len(runs[base][task]) > 1 else task.upper()
            columns += [(head or where, task, split, name) for name, head in LAYOUTS[task].leaderboard.items()]
        columns += [(head, task, "", name) for name, head in LAYOUTS[task].leaderboard_means.items()]
    last = list(settings["data"])[-1]
    lines = [report.line(["method", *(c[0] for c in columns), "tokens/s"])]
    lines.append(report.line(["---", *["---:"] * (len(columns) + 1)]))
    for run in runs:
        cells = [
            _change(runs[run][b][split], name, run == base)
            if split
            else f"{100 * fmean(each[name] for part, each in runs[run][b].items() if part not in groups(b)):.1f}"
            for _, b, split, name in columns
        ]
        speed = results["speed"][run][last]["tokens_per_second"]
        lines.append(
            report.line([run if run == base else f"`{run}`", *cells, "-" if speed is None else f"{speed:.0f}"])
        )
    model = settings["model"]
    how = (
        "sampling"
        if settings["sample"]
        else "greedy"
        if settings["num_beams"] == 1
        else f"{settings['num_beams']} beams"
    )
    sources = "; ".join(dict.fromkeys(data["source"] for data in settings["data"].values()))
    lost = "".join(
        f" {run}: {unparsed} answers unparsed, {failed} failed."
        for run, each in runs.items()
        for scores in [[b[part] for task, b in each.items() for part in once(task, b)]]
        for unparsed, failed in [tuple(sum(s.get(k, 0) for s in scores) for k in ("unparsed", "failed"))]
        if unparsed or failed
    )
    how += f", seeds {', '.join(map(str, settings['seeds']))}" if settings.get("seeds") else ""
    how += "; `gaussian_logits as M`: noise of the size of M's term (`specs`)" if results.get("specs") else ""
    judges = "; ".join(f"{b.upper()} scorer {scorer_and_commit(settings, b)}" for b in settings["data"])
    return "\n".join(
        [
            f"### {Path(model['name']).name} on {sources}",
            "",
            *lines,
            "",
            f"{how}, {model['dtype']}, weights {model['weights'][:15]}, {judges}; "
            f"{results['hardware']}, {results['date'][:10]}, vlm-fix {results['vlm_fix']}. Baseline in percent (words: mean "
            "length; yes: yes-ratio, mean over splits), below it differences in points with a paired bootstrap 95 % interval "
            f"over images, bold where significant at 5 % after Holm's correction over the {len(runs) - 1} runs below the "
            f"baseline.{lost or ' Every answer was parsed, none failed.'} All of it: `{folder.name}/results.json`.",
            "",
        ]
    )


def _change(scores: Mapping[str, Any], name: str, base: bool) -> str:
    delta = scores["delta"].get(name)
    if base or not delta:
        return f"{scores[name]:.1f}" if name in PLAIN else f"{100 * scores[name]:.1f}"
    change, low, high = (round(100 * delta[key], 1) + 0.0 for key in ("delta", "low", "high"))
    return (f"**{change:+.1f}**" if delta["p_holm"] < SIGNIFICANT else f"{change:+.1f}") + f" [{low:.1f}, {high:.1f}]"


def save_markdown(text: str, path: Path) -> None:
    """Write the table between the `MARKS` in the file, or as the whole file if it has none."""
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    if MARKS[0] not in old:
        write_atomic(path, text)
        return
    start, _, rest = old.partition(MARKS[0])
    if MARKS[1] not in rest:
        raise VlmFixError(f"{path} has {MARKS[0]} but no {MARKS[1]} after it: add it where the table ends.")
    write_atomic(path, f"{start}{MARKS[0]}\n{text}{MARKS[1]}{rest.partition(MARKS[1])[2]}")

"""Make one self-contained HTML page, or a short Markdown table, from the folders of one or more evaluations.

The page has a sentence for each method, tables that can be sorted and filtered, figures as inline SVG (differences with
their intervals, accuracy against yes-ratio, CHAIR against recall or cover, gain against time), and answers side by side with
object words marked. It loads nothing, follows the reader's light or dark setting, and can be printed. It shows the samples on
which the runs differ most, and says so.
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
from vlm_fix.eval.scorers.registry import LAYOUTS, LOWER, PLAIN, better, groups, once, scorer_and_commit
from vlm_fix.eval.stats import SIGNIFICANT

from . import shell, side_by_side
from . import tables as report
from .svg import Bar, Point, forest, scatter, text_of

MARKS = "<!-- leaderboard -->", "<!-- /leaderboard -->"
KINDS = ("better", "worse")
NOTHING = '<span class="soft">no difference of the main figures is significant</span>'


def read(folders: Sequence[str | Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Read (folder, results) of finished evaluations. Raises VlmFixError for a folder without readable results.json."""
    found = []
    for folder in map(Path, folders):
        path = folder / "results.json" if folder.is_dir() else folder
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            correct(results["runs"])
            found.append((path.parent, results))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
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
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration, RecursionError) as error:
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
    return shell.whole("Hallucination with and without methods", sections)


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
        f'<ul class="verdicts">{_verdicts(results)}</ul><div class="figures">{"".join(figures(results))}</div>'
        f"{''.join(map(_grid, report.grids(results)))}"
        f'<p class="soft">{text_of(report.STAR)}</p><ul>{notes}</ul>{side_by_side.samples(folder, results, samples)}'
    )


def _verdicts(results: Mapping[str, Any]) -> str:
    """A line for each method: the main figures on which it is significantly better, or worse."""
    lines, base = [], next(iter(results["runs"]))
    for run, each in results["runs"].items():
        found: dict[bool, list[str]] = {True: [], False: []}
        for _, heading, task, split, name in columns(results):
            delta = each[task][split]["delta"].get(name) if split else None
            if delta and delta["p_holm"] < SIGNIFICANT and (good := better(name, delta["delta"])) is not None:
                found[good].append(f"{heading} ({100 * delta['delta']:+.1f})")
        told = [
            f'<span class="{kind}">{kind} on {text_of(", ".join(what))}</span>'
            for kind, what in zip(KINDS, found.values(), strict=True)
            if what
        ]
        if run != base:
            lines.append(
                f'<li data-run="{text_of(run)}"><code>{text_of(run)}</code>: {"; ".join(told) or NOTHING}</li>'
            )
    return "".join(lines)


def _grid(grid: report.Grid) -> str:
    """Format a table with the method in the first column; with splits, their names in the second."""
    several = any(split for split, _, _ in grid.rows)
    heads = ["method", *(["split"] if several else []), *grid.heads]
    head = "".join(
        f'<th{" class=text" if i <= several else ""}><button type="button">{text_of(head)}</button></th>'
        for i, head in enumerate(heads)
    )
    rows = []
    for split, run, cells in grid.rows:
        shown = "".join(f"<td>{text_of(c.text)}{_change_of(c)}</td>" for c in cells)
        part = f'<td class="text">{text_of(split)}</td>' if several else ""
        rows.append(
            f'<tr data-run="{text_of(run)}"><td class="text"><code>{text_of(run)}</code></td>{part}{shown}</tr>'
        )
    return (
        f'<div class="scroll"><table><caption>{text_of(grid.caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _change_of(cell: report.Cell) -> str:
    kind = {True: "better", False: "worse"}.get(cell.better) if cell.star else None  # type: ignore[arg-type]
    return f"<small{f' class={kind}' if kind else ''}>{text_of(cell.change)}</small>" if cell.change else ""


# ------------------------------------------------------------------------------------------------------------- figures


def figures(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield the SVG figures that these results have data for."""
    shown = {task: LAYOUTS[task] for task in LAYOUTS if task in results["settings"]["data"]}
    for task, layout in shown.items():
        yield from _differences(results, task, layout)
    for task, layout in shown.items():
        if isinstance(layout.answers, YesNo):
            yield _accuracy_figure(results, task, layout.answers)
    for task, layout in shown.items():
        if isinstance(layout.answers, Captions):
            yield _caption_figure(results, task, layout.answers)
    for task, layout in shown.items():
        yield from _cost_figure(results, task, layout)


def _differences(results: Mapping[str, Any], task: str, layout: Layout) -> Iterator[str]:
    """Draw every method's difference from the baseline, with its interval: the main figures of a task."""
    base, *methods = results["runs"]
    for name, heading in layout.leaderboard.items():
        parts = []
        for split in results["runs"][base][task]:
            deltas = {run: results["runs"][run][task][split]["delta"].get(name) for run in methods}
            bars = [_bar(run, name, delta) for run, delta in deltas.items() if delta]
            if bars:
                parts.append((split if len(results["runs"][base][task]) > 1 else "", bars))
        if parts:
            title = full_heading(task, heading or layout.columns.get(name, name))
            yield forest(parts, f"points above the baseline; {'lower' if name in LOWER else 'higher'} is better", title)


def _bar(run: str, name: str, delta: Mapping[str, Any]) -> Bar:
    significant = delta["p_holm"] < SIGNIFICANT
    value, low, high = (100 * delta[key] for key in ("delta", "low", "high"))
    return Bar(run, value, low, high, better(name, delta["delta"]) if significant else None)


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
        yield scatter(points, "time per token, baseline = 1", label, "What does it cost?", 1, (1, 10))


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


def columns(results: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Return (heading, the same with its task, task, split or "" for the mean of all, figure) of the main figures."""
    first, found = next(iter(results["runs"].values())), []
    for task in results["settings"]["data"]:
        for split in first[task]:
            where = f"{task.upper()} {split}" if len(first[task]) > 1 else task.upper()
            for name, head in LAYOUTS[task].leaderboard.items():
                found.append((head or where, full_heading(task, head) if head else where, task, split, name))
        found += [
            (head, f"{task.upper()} {head}", task, "", name) for name, head in LAYOUTS[task].leaderboard_means.items()
        ]
    return found


def full_heading(task: str, heading: str) -> str:
    """Return a heading that names its task: "CHAIR_i", "CHAIR recall"."""
    plain = heading.removesuffix(" ↓")
    return plain if task in plain.lower() else f"{task.upper()} {plain}"


def _board(folder: Path, results: Mapping[str, Any]) -> str:
    settings, runs = results["settings"], results["runs"]
    base, shown = next(iter(runs)), columns(results)
    last = list(settings["data"])[-1]
    lines = [report.line(["method", *(heading for heading, *_ in shown), "tokens/s"])]
    lines.append(report.line(["---", *["---:"] * (len(shown) + 1)]))
    for run in runs:
        cells = [
            _change(runs[run][b][split], name, run == base)
            if split
            else f"{100 * fmean(each[name] for part, each in runs[run][b].items() if part not in groups(b)):.1f}"
            for _, _, b, split, name in shown
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
            f"### {folder.name}: {Path(model['name']).name} on {sources}",
            "",
            *lines,
            "",
            f"{how}, {model['dtype']}, weights {model['weights'][:15]}, {judges}; "
            f"{results['hardware']}, {results['date'][:10]}, vlm-fix {results['vlm_fix']}. Baseline in percent (words: mean "
            "length; yes: yes-ratio, mean over splits), below it differences in points with a paired bootstrap 95 % interval "
            f"over images: bold is significantly better, ✗ significantly worse, at 5 % after Holm's correction over the "
            f"{len(runs) - 1} runs below the baseline.{lost or ' Every answer was parsed, none failed.'} All of it: "
            f"`{folder.name}/results.json`.",
            "",
        ]
    )


def _change(scores: Mapping[str, Any], name: str, base: bool) -> str:
    delta = scores["delta"].get(name)
    if base or not delta:
        return f"{scores[name]:.1f}" if name in PLAIN else f"{100 * scores[name]:.1f}"
    change, low, high = (round(100 * delta[key], 1) + 0.0 for key in ("delta", "low", "high"))
    good = better(name, delta["delta"]) if delta["p_holm"] < SIGNIFICANT else None
    shown = {True: f"**{change:+.1f}**", False: f"{change:+.1f} ✗", None: f"{change:+.1f}"}[good]
    return f"{shown} [{low:.1f}, {high:.1f}]"


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

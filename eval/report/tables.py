"""Turn results into tables, for the terminal, Markdown and the HTML page.

Tables fit 100 columns; a star marks a difference that is significant at 5 % after Holm's correction over the runs.
Fractions are shown in percent. The numbers are from `run/summary.py`; `figure.py` draws them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from vlm_fix.eval.files import write_atomic
from vlm_fix.eval.run.summary import by_split
from vlm_fix.eval.scorers.benchmark import Captions
from vlm_fix.eval.scorers.registry import LAYOUTS, PLAIN, better, once
from vlm_fix.eval.stats import SIGNIFICANT

from . import figure

CHANGES = {
    "mended": "mended",
    "broken": "broken",
    "p": "McNemar p",
    "fn_to_tp": "FN>TP",
    "tp_to_fn": "TP>FN",
    "fp_to_tn": "FP>TN",
    "tn_to_fp": "TN>FP",
    "verdict": "verdict",
    "chair_i": "C_I at equal length",
    "recall": "recall at equal length",
}
WIDTH = 100
BY_WORDS = "Yes where p(yes) > p(no): no answer has to be parsed"
BY_PROBABILITY = {"accuracy": "accuracy", "auroc": "AUROC", "ece": "ECE", "mass": "p(yes) + p(no)"}


def notes(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (run, what a reader of the table must know about it)."""
    notes = [
        (run, f"warned in {batches} batch{'es' * (batches > 1)}: {message}")
        for run, messages in results["warnings"].items()
        for message, batches in messages.items()
    ]
    for run, specs in results.get("specs", {}).items():
        told = ", ".join(f"{benchmark.upper()} as {spec}" for benchmark, spec in specs.items())
        notes.append((run, f"ran {told}: noise of the size of {results['settings']['runs'][run]['imitates']}'s term"))
    for run, sds in results.get("term_sd", {}).items():
        none = [benchmark.upper() for benchmark, sd in sds.items() if sd is None]
        if none:
            notes.append(
                (run, f"no step of {', '.join(none)} left it two tokens: it has no term there to match noise to")
            )
    for run, benchmarks in results["runs"].items():
        for benchmark, splits in benchmarks.items():
            wrong = {split: scores for split, scores in splits.items() if scores.get("misread")}
            if wrong:
                first = next(iter(wrong.values()))
                number = ", ".join(f"{scores['misread']} of {split}" for split, scores in wrong.items())
                notes.append(
                    (
                        run,
                        f"{benchmark.upper()}: the scorer {first['scorer']} takes answers against their plain word ({number}): "
                        f"{first.get('misread_example', 'see samples.jsonl')}; --scorer ours reads them",
                    )
                )
    read = results.get("probabilities", {}).get("runs", {})
    for run in results["runs"] if "probabilities" in results else ():
        if run not in read:
            notes.append((run, f"p_yes and p_no were not read: {_unread(results, run)}"))
    for run, count in list(results["changed"].items())[1:]:
        if not count["changed"]:
            notes.append((run, f"every one of its {count['answers']} answers is the baseline's"))
    return notes


def _unread(results: Mapping[str, Any], run: str) -> str:
    """Why a run has no probabilities of yes and no."""
    settings, told = results["settings"], results["probabilities"]
    if settings.get("server"):
        return "a server answers, and gives text alone"
    if settings.get("engine") == "vllm":
        return "vLLM answers, and the distributions of its steps are not seen here"
    if not (told.get("yes_tokens") and told.get("no_tokens")):
        return "no token of the vocabulary is yes, or none is no"
    if any(part.partition(":")[0] == "draft" for part in run.split("+")):
        return "it drafts, and its tokens are scored several at once"
    return "it chooses its tokens in a loop of its own"


def _value(name: str, scores: Mapping[str, Any]) -> str:
    """Format a value, such as "91.3", or "91.3 ±0.4" with the standard deviation over seeds."""
    scale = 1 if name in PLAIN else 100
    if isinstance(scores[name], int):
        return str(scores[name])
    sd = scores.get("seeds", {}).get(name)
    return f"{scale * scores[name]:.1f}" + (f" ±{scale * sd['sd']:.1f}" if sd else "")


def _delta(delta: Mapping[str, Any], name: str) -> str:
    """Format a difference, such as "+1.2 [-0.3, 2.7]", starred if it is significant; "" if nothing was compared."""
    if name not in delta:
        return ""
    change, low, high = (round(100 * delta[name][key], 1) + 0.0 for key in ("delta", "low", "high"))  # no "-0.0"
    return f"{change:+.1f} [{low:.1f}, {high:.1f}]{'*' if _star(delta, name) else ''}"


def _star(delta: Mapping[str, Any], name: str) -> bool:
    """Whether a difference is significant after the correction (`run.summary.correct`)."""
    return name in delta and delta[name]["p_holm"] < SIGNIFICANT


def _cell(name: str, scores: Mapping[str, Any]) -> Cell:
    delta = scores["delta"]
    good = better(name, delta[name]["delta"]) if name in delta else None
    return Cell(_value(name, scores), _delta(delta, name), _star(delta, name), good)


def _changes(scores: Mapping[str, Any]) -> dict[str, Cell]:
    """Return the cells of CHANGES that this row has; none for the baseline."""
    counts = {**scores.get("outcomes", {}), **scores.get("transitions", {})}
    if "verdict" in scores:
        counts["verdict"] = scores["verdict"]["is"]
    equal = scores.get("equal_length", {})
    return {name: Cell(f"{n:.2g}" if name == "p" else str(n)) for name, n in counts.items()} | {
        name: Cell(f"{100 * equal[name]['method']:.1f}", _delta(equal, name), _star(equal, name))
        for name in CHANGES
        if name in equal
    }


def _captions(results: Mapping[str, Any]) -> dict[str, str]:
    """Return one line about what was measured, per table."""
    settings, out = results["settings"], {}
    for benchmark, data in settings["data"].items():
        apart = once(benchmark, next(iter(results["runs"].values()))[benchmark])
        failed: dict[str, int] = {}
        for split, run, scores in by_split(results, benchmark):
            if split in apart and scores["failed"]:
                failed[run] = failed.get(run, 0) + scores["failed"]
        captions = isinstance(LAYOUTS[benchmark].answers, Captions)
        what = "captions failed and are left out" if captions else "answers failed and count as wrong"
        lost = (
            f"; {what}: {', '.join(f'{n} of {run}' for run, n in failed.items())} (see samples.jsonl)" if failed else ""
        )
        seeds = settings.get("seeds") or []
        many = f"; sums over the seeds {', '.join(map(str, seeds))}, ± their sd" if len(seeds) > 1 else ""
        out[benchmark] = LAYOUTS[benchmark].caption(settings, data) + many + lost
    many = ", of one process" if results.get("processes", 1) > 1 else ""
    out["speed"] = (
        f"Speed as measured in this run: {results['hardware']}, {settings['model']['dtype']}, batches of "
        f"{settings['batch_size']}; tokens/s with prefill{many}; memory: {results['peak_memory_of']}"
    )
    return out


STAR = (
    "Percent; below each value the difference from the baseline with its 95 % interval (paired bootstrap over images); "
    "* = significant at 5 % after Holm's correction over the runs of the table, each column and split for itself. Mended: "
    "only the method is right (captions: free of hallucination), broken: only the baseline; FN>TP with TN>FP is a shift to yes. "
    "The verdict goes by the intervals, uncorrected."
)
GATED = "Steps that a contrast's gate left as they are, in percent"
TERM = "What a contrast adds to the log-probabilities: standard deviation over the tokens it leaves uncut, in nats"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A value, its change against the baseline with interval (or ""), whether it is significant, and for the better."""

    text: str
    change: str = ""
    star: bool = False
    better: bool | None = None

    def __str__(self) -> str:
        return self.text + (f" ({self.change})" if self.change else "")


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table without formatting: rows are (split or "", run, cells), and `heads` are the headings of the cells."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[Cell, ...]], ...]


def grids(results: Mapping[str, Any]) -> list[Grid]:
    """Return the tables: scores and changes against the baseline per task, size of contrasts, speed of all runs."""
    captions, made = _captions(results), []
    for benchmark in results["settings"]["data"]:
        layout, found = LAYOUTS[benchmark], list(by_split(results, benchmark))
        columns = {name: head for name, head in layout.columns.items() if all(name in scores for *_, scores in found)}
        several = len({split for split, _, _ in found}) > 1
        rows, changed = [], []
        for split, run, scores in found:
            cells = tuple(_cell(name, scores) for name in columns)
            rows.append((split if several else "", run, cells))
            if changes := _changes(scores):
                changed.append((split if several else "", run, changes))
        made.append(Grid(captions[benchmark], tuple(columns.values()), tuple(rows)))
        names = [name for name in CHANGES if any(name in changes for _, _, changes in changed)]
        if names:
            filled = tuple((s, run, tuple(c.get(name, Cell("")) for name in names)) for s, run, c in changed)
            many = len(results["settings"].get("seeds") or ()) > 1
            title = f"{benchmark.upper()}, what changed against the baseline"
            title += "; counts are sums over the seeds, p their largest" if many else ""
            made.append(Grid(title, tuple(CHANGES[name] for name in names), filled))
    benchmarks = tuple(results["settings"]["data"])
    for caption, key, factor in ((TERM, "term_sd", 1), (GATED, "gated", 100)):
        sizes = tuple(
            ("", run, tuple(Cell("-" if of.get(b) is None else f"{factor * of[b]:.3g}") for b in benchmarks))
            for run, of in results.get(key, {}).items()
        )
        if sizes:
            made.append(Grid(caption, tuple(b.upper() for b in benchmarks), sizes))
    made += _by_probability(results)
    speeds = tuple(("", run, tuple(_speed_cells(results, each))) for run, each in results["speed"].items())
    units = ("tok/s", "first token s", "peak MB")
    heads = tuple(f"{b.upper()}\n{unit}" for b in results["settings"]["data"] for unit in units)
    return [*made, Grid(captions["speed"], heads, speeds)]


def _by_probability(results: Mapping[str, Any]) -> list[Grid]:
    """Return the table of the probabilities of yes and no, where they were read."""
    told = results.get("probabilities", {})
    rows = [
        (f"{benchmark.upper()} {split}".removesuffix(" questions"), run, figures)
        for benchmark in results["settings"]["data"]
        for split in dict.fromkeys(s for run in told.get("runs", {}).values() for s in run.get(benchmark, ()))
        for run, each in told["runs"].items()
        if (figures := each.get(benchmark, {}).get(split))
    ]
    if not rows:
        return []
    words = " and ".join(" ".join(map(repr, told[name])) for name in ("yes_tokens", "no_tokens"))
    cells = [
        (split, run, (Cell(str(f["n"])), *(Cell(_percent(f[name])) for name in BY_PROBABILITY)))
        for split, run, f in rows
    ]
    return [Grid(f"{BY_WORDS}; of the {told['of']}; tokens {words}", ("n", *BY_PROBABILITY.values()), tuple(cells))]


def _percent(value: float | None) -> str:
    """One that cannot be told (null, in older results NaN) is "-"."""
    return "-" if value is None or value != value else f"{100 * value:.1f}"


def tables(results: Mapping[str, Any]) -> Group:
    """Format the tables for the terminal, at most 100 columns wide."""
    made = []
    for grid in grids(results):
        table = _table(grid.caption)
        table.add_column("method", min_width=12, overflow="fold")
        for head in grid.heads:
            table.add_column(head, min_width=max(map(len, head.split("\n"))) if "\n" in head else None)
        last = ""
        for split, run, cells in grid.rows:
            if split != last:
                table.add_section()
                table.add_row(f"[bold]{split}[/bold]")
            last = split
            shown = []
            for cell in cells:
                style = {True: "bold green", False: "bold red", None: "bold"}[cell.better] if cell.star else "dim"
                shown.append(escape(cell.text) + (f"\n[{style}]{escape(cell.change)}[/{style}]" if cell.change else ""))
            label = (
                run if len(run) <= 16 else re.sub("(?=[:+])", "\n", run, count=1)
            )  # leaves room for value and change
            table.add_row(escape(label), *shown)
        made.append(table)
    return Group(*made)


def _speed_cells(results: Mapping[str, Any], speeds: Mapping[str, Any]) -> list[Cell]:
    cells = []
    for benchmark in results["settings"]["data"]:
        speed = speeds[benchmark]
        for name, form in (("tokens_per_second", ".1f"), ("first_token_seconds", ".3f"), ("peak_mb", ".0f")):
            cells.append(Cell("-" if speed[name] is None else f"{speed[name]:{form}}"))
    return cells


def _table(caption: str) -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        title=escape(caption),
        title_justify="left",
        title_style="italic",
        pad_edge=False,
        padding=(0, 1, 0, 0),
        width=WIDTH,
    )


def show(results: Mapping[str, Any], folder: Path) -> None:
    """Print the tables, and where the files are."""
    console = Console(highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    console.print(tables(results))
    console.print(STAR, style="dim")
    for run, note in notes(results):
        console.print(f"{escape(run)}: {escape(note)}", style="yellow")
    console.print(f"Results: {folder / 'results.json'}  table: {folder / 'table.md'}", soft_wrap=True)
    console.print(f"Figure: {folder / 'figure.png'}  answers: {folder / 'samples.jsonl'}", soft_wrap=True)


def markdown(results: Mapping[str, Any]) -> str:
    """Format the same tables in Markdown."""
    lines = []
    for grid in grids(results):
        several = any(split for split, _, _ in grid.rows)
        lead = ["split", "method"] if several else ["method"]
        heads = [*lead, *(head.replace(">", "→").replace("\n", " ") for head in grid.heads)]
        lines += [f"{grid.caption}.", "", line(heads), line(["---"] * len(lead) + ["---:"] * len(grid.heads))]
        for split, run, cells in grid.rows:
            lines.append(
                line([*([split] if several else []), f"`{run}`", *(str(c).replace("*", "\\*") for c in cells)])
            )
        lines.append("")
    lines += [f"`{run}`: {note}\n" for run, note in notes(results)]
    return "\n".join([*lines, STAR.replace("below each value", "in brackets").replace("*", "\\*"), ""])


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Write table.md and figure.png next to results.json."""
    write_atomic(folder / "table.md", markdown(results))
    figure.draw(results, folder / "figure.png")

"""From answers to numbers, tables and a figure.

`summarise` scores every run and compares it with the baseline, paired by question and caption. A sample that failed
stays in: it counts as wrong (POPE) or as a caption that says nothing (CHAIR), and is told. Tables fit 100 columns; a
star marks a difference whose 95 % interval (2000 bootstrap draws of images) excludes 0. Fractions are shown in percent.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from . import amber, chair, hallusion, mme, pope
from .result import Result
from .stats import Metric, column_sums, outcomes, paired_bootstrap, spread, transitions

if TYPE_CHECKING:
    from .tasks import Task


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a benchmark is compared and shown: `columns` are the figures of its table, with their headings; `compared` are
    the metrics that get an interval against the baseline (the AMBER score, of two tasks, gets it in `summarise`); `right`
    tells from a row's counts whether that sample is right (McNemar).
    """

    columns: Mapping[str, str]
    metrics: Mapping[str, Metric]
    compared: tuple[str, ...]
    right: Callable[[Mapping[str, Any]], Any]
    caption: Callable[[Mapping[str, Any], Mapping[str, Any]], str]  # (settings, its data) -> what was measured


def _pope_caption(settings: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    n = ", ".join(f"{n} {split}" for split, n in data["questions"].items())
    return f"POPE: {data['source']}; questions: {n}; scorer {settings['scorer']}"


def _chair_caption(settings: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    how = " (works without NLTK data)" if data["variant"] == "pattern" else ""
    text = f"CHAIR: {data['source']}; {data['images']} captions; variant {data['variant']}{how}"
    text += f"; {data['captions']}" if "captions" in data else ""
    return text + "; lower C_S and C_I are better, lower recall is not"


def _suite_caption(title: str) -> Callable[[Mapping[str, Any], Mapping[str, Any]], str]:
    return lambda _, data: f"{title}: {data['source']}; {data['images']} images; scorer {data['variant']}"


LAYOUTS = {
    "pope": Layout(
        {
            "accuracy": "accuracy",
            "precision": "prec.",
            "recall": "recall",
            "f1": "F1",
            "yes_ratio": "yes",
            "unparsed": "unp.",
        },
        pope.METRICS,
        ("accuracy", "f1", "yes_ratio"),
        lambda row: row["tp"] or row["tn"],
        _pope_caption,
    ),
    "chair": Layout(
        {"chair_s": "C_S", "chair_i": "C_I", "recall": "recall", "f1": "F1", "length": "length"},
        chair.METRICS,
        ("chair_s", "chair_i", "recall"),
        lambda row: not row["hallucinating"],
        _chair_caption,
    ),
    "amber": Layout(
        {"chair": "CHAIR", "cover": "cover", "hal": "Hal", "cog": "Cog", "score": "AMBER score"},
        amber.CAPTIONS,
        ("chair", "cover", "hal", "cog"),
        lambda row: not row["hallucinating"],
        _suite_caption(
            "AMBER captions (lower is better, but for cover and the score: half 100 - CHAIR, half F1 of all questions)"
        ),
    ),
    "amber-qa": Layout(
        {
            "accuracy": "acc",
            "precision": "prec.",
            "recall": "recall",
            "f1": "F1",
            "yes_ratio": "yes",
            "unparsed": "unp.",
        },
        amber.QUESTIONS,
        ("accuracy", "f1", "yes_ratio"),
        lambda row: row["tp"] or row["tn"],
        _suite_caption('AMBER questions; precision, recall and F1 are of "no"'),
    ),
    "mme": Layout(
        {"score": "score", "accuracy": "acc", "accuracy_plus": "acc+", "yes_ratio": "yes", "unparsed": "unp."},
        mme.METRICS,
        ("score", "accuracy", "yes_ratio"),
        lambda row: row["right"],
        _suite_caption("MME; score in its points"),
    ),
    "hallusion": Layout(
        {"aAcc": "aAcc", "qAcc": "qAcc", "fAcc": "fAcc", "yes_ratio": "yes", "unparsed": "unp."},
        hallusion.METRICS,
        ("aAcc", "qAcc", "fAcc", "yes_ratio"),
        lambda row: row["right"],
        _suite_caption("HallusionBench"),
    ),
}
COMMITS = {  # of the official script that a scorer or variant follows
    "official": "RUCAIBox/POPE@3df3ba1",
    "opera": "shikiw/OPERA@61426ef",
    "vcd": "DAMO-NLP-SG/VCD@d6568ff",
    "lmms": "lmms-eval 0.7.3",
    "vlmevalkit": "open-compass/VLMEvalKit@e8e78f0",
    "nltk": "shikiw/OPERA@61426ef",
    "pattern": "LisaAnne/Hallucination@6e4d33c",
}
CHANGES = {
    "mended": "mended",
    "broken": "broken",
    "p": "McNemar p",
    "fn_to_tp": "FN>TP",
    "tp_to_fn": "TP>FN",
    "fp_to_tn": "FP>TN",
    "tn_to_fp": "TN>FP",
    "chair_i": "C_I at equal length",
    "recall": "recall at equal length",
}
PLAIN = {"unparsed", "length", "n", "failed"}  # everything else is a fraction
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1")  # Okabe and Ito
MARKERS = ("D", "o", "s", "^", "v", "P", "X", "<")
WIDTH = 100


def summarise(
    runs: Sequence[str] | Mapping[str, Any],
    tasks: Sequence[Task],
    rows_of: Callable[[str, str], Sequence[Mapping[str, Any]]],
    seed: int = 0,
) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """run -> benchmark -> split -> metrics, `failed`, and what changed against the first run.

    `delta` {metric: Comparison}, `outcomes` and `transitions` (see `stats`) and, for captions, `equal_length` {metric:
    Comparison}. A run with several seeds shows its counts summed over them, with `seeds` {metric: mean, sd, values}; a
    run with one is compared with each seed of the other. The p of several seeds is the largest.
    """
    baseline = next(iter(runs))
    summary: dict[str, Any] = {run: {} for run in runs}
    every: dict[str, dict[str, dict[int, _Scored]]] = {}
    for task in tasks:
        scored = every[task.benchmark] = {run: _by_seed(task, rows_of(run, task.benchmark)) for run in runs}
        for run, ours in scored.items():
            summary[run][task.benchmark] = {
                split: _summary(task, split, ours, {} if run == baseline else scored[baseline], seed)
                for split in task.sizes
            }
    if {"amber", "amber-qa"} <= {task.benchmark for task in tasks if task.sizes}:
        whole = {run: _amber_whole(every["amber"][run], every["amber-qa"][run]) for run in runs}
        for run, results in whole.items():
            row, found = summary[run]["amber"]["captions"], _figures(amber.WHOLE, list(results.values()))
            row["score"] = found["score"]
            if "seeds" in found:
                row["seeds"] |= found["seeds"]
            if run != baseline:
                row["delta"] |= _compared(amber.WHOLE, _rows(_pairs(results, whole[baseline])), seed)
    return summary


def _amber_whole(captions: Mapping[int, _Scored], questions: Mapping[int, _Scored]) -> dict[int, Result]:
    """By seed; the last part of the questions is all of them."""
    return {
        s: amber.whole(each.results["captions"], [*questions[s].results.values()][-1]) for s, each in captions.items()
    }


@dataclasses.dataclass
class _Scored:
    """The results of one seed by split, and how many samples failed in each."""

    results: dict[str, Any]
    failed: dict[str, int]


def _by_seed(task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[int, _Scored]:
    answers: dict[int, dict[str, Any]] = {}
    for row in rows:
        answers.setdefault(row.get("seed", 0), {})[row["id"]] = None if row["error"] else row["answer"]
    scored = {}
    for seed, each in answers.items():
        results = task.score(each)
        told = {key: text for key, text in each.items() if text is not None}
        whole = results if len(told) == len(each) else task.score(told)
        scored[seed] = _Scored(
            results, {split: r.n - (whole[split].n if split in whole else 0) for split, r in results.items()}
        )
    return scored


def _summary(
    task: Task, split: str, ours: Mapping[int, _Scored], theirs: Mapping[int, _Scored], seed: int
) -> dict[str, Any]:
    """Metrics of one run and split; compared with `theirs`, the baseline, unless that is empty."""
    layout = LAYOUTS[task.benchmark]
    results = [scored.results[split] for scored in ours.values()]
    summary = _figures(layout.metrics, results)
    summary |= {"failed": sum(scored.failed[split] for scored in ours.values()), "delta": {}}
    if not theirs:
        return summary
    pairs = [(base.results[split], method.results[split]) for base, method in _pairs(ours, theirs)]
    summary["delta"] = _compared({name: layout.metrics[name] for name in layout.compared}, _rows(pairs), seed)
    each = [outcomes(base.rows, method.rows, layout.right) for base, method in pairs]
    summary["outcomes"] = {name: sum(e[name] for e in each) for name in ("mended", "broken")}
    summary["outcomes"]["p"] = max(e["p"] for e in each)
    if {"tp", "fp", "tn", "fn"} <= pairs[0][0].rows[0].keys():
        moves = [transitions(base.rows, method.rows) for base, method in pairs]
        summary["transitions"] = {name: sum(move[name] for move in moves) for name in moves[0]}
    if isinstance(results[0], chair.ChairResult):
        cut = [chair.at_equal_length(base, method) for base, method in pairs]
        summary["equal_length"] = _compared({name: layout.metrics[name] for name in layout.compared}, cut, seed)
    return summary


def _figures(metrics: Mapping[str, Metric], results: Sequence[Any]) -> dict[str, Any]:
    """The figures of one seed, or those of all seeds' counts with `seeds`, their spread."""
    figures = results[0].to_dict()
    if len(results) == 1:
        return figures
    summary = dict(figures)
    rows = [row for result in results for row in result.rows]
    sums = column_sums(rows, [name for name in rows[0] if name != "image"])
    for name, value in figures.items():
        if isinstance(value, int):
            summary[name] = sum(result.to_dict()[name] for result in results)
        elif name in metrics:
            summary[name] = float(metrics[name](sums))
    spreads = {n: spread([r.to_dict()[n] for r in results]) for n, v in figures.items() if isinstance(v, float)}
    return {**summary, "seeds": spreads}


def _pairs(ours: Mapping[int, Any], theirs: Mapping[int, Any]) -> list[tuple[Any, Any]]:
    """(baseline, method) per seed; a run with one seed stands beside each of the other's."""
    base, method = ({s: side.get(s, next(iter(side.values()))) for s in {*ours, *theirs}} for side in (theirs, ours))
    return [(base[s], method[s]) for s in sorted(base)]


def _rows(pairs: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    return [(base.rows, method.rows) for base, method in pairs]


def _compared(metrics: Mapping[str, Metric], pairs: Sequence[Any], seed: int) -> dict[str, Any]:
    """metric -> Comparison of the paired rows, all seeds of an image moving together."""
    base, method = ([row for pair in pairs for row in pair[side]] for side in (0, 1))
    return {
        name: comparison.to_dict() | {"excludes_zero": comparison.excludes_zero}
        for name, comparison in paired_bootstrap(metrics, base, method, seed=seed).items()
    }


def changed(
    runs: Iterable[str], tasks: Sequence[Task], rows_of: Callable[[str, str], Sequence[Mapping[str, Any]]]
) -> dict[str, dict[str, int]]:
    """run -> answers, and how many differ from the baseline's: a method that changed none did nothing here."""
    said = {
        run: {(t.benchmark, r["id"], r.get("seed", 0)): r["answer"] for t in tasks for r in rows_of(run, t.benchmark)}
        for run in runs
    }
    baseline = next(iter(said.values()))
    first = {key[:2]: text for key, text in reversed(baseline.items())}  # of the first seed
    return {
        run: {
            "answers": len(answers),
            "changed": sum(text != baseline.get(k, first[k[:2]]) for k, text in answers.items()),
        }
        for run, answers in said.items()
    }


def notes(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(run, what a reader of the table must know about it)."""
    notes = [
        (run, f"warned in {batches} batches: {message}")
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
    for run, count in list(results["changed"].items())[1:]:
        if not count["changed"]:
            notes.append((run, f"every one of its {count['answers']} answers is the baseline's"))
    return notes


def _scores(results: Mapping[str, Any], benchmark: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(split, run, metrics), split by split."""
    for split in dict.fromkeys(split for run in results["runs"].values() for split in run.get(benchmark, {})):
        for run, scores in results["runs"].items():
            if split in scores.get(benchmark, {}):
                yield split, run, scores[benchmark][split]


def _value(name: str, scores: Mapping[str, Any]) -> str:
    """Such as "91.3", or "91.3 ±0.4" with the standard deviation over seeds."""
    scale = 1 if name in PLAIN else 100
    if isinstance(scores[name], int):
        return str(scores[name])
    sd = scores.get("seeds", {}).get(name)
    return f"{scale * scores[name]:.1f}" + (f" ±{scale * sd['sd']:.1f}" if sd else "")


def _delta(delta: Mapping[str, Any], name: str) -> str:
    """Such as "+1.2 [-0.3, 2.7]", with a star where the interval excludes 0; empty where nothing was compared."""
    if name not in delta:
        return ""
    change, low, high = (round(100 * delta[name][key], 1) + 0.0 for key in ("delta", "low", "high"))  # no "-0.0"
    return f"{change:+.1f} [{low:.1f}, {high:.1f}]{'*' if delta[name]['excludes_zero'] else ''}"


def _star(delta: Mapping[str, Any], name: str) -> bool:
    return bool(delta.get(name, {}).get("excludes_zero"))


def _changes(scores: Mapping[str, Any]) -> dict[str, Cell]:
    """The cells of CHANGES that this row has; empty for the baseline."""
    counts = {**scores.get("outcomes", {}), **scores.get("transitions", {})}
    equal = scores.get("equal_length", {})
    return {name: Cell(f"{n:.2g}" if name == "p" else str(n)) for name, n in counts.items()} | {
        name: Cell(f"{100 * equal[name]['method']:.1f}", _delta(equal, name), _star(equal, name))
        for name in CHANGES
        if name in equal
    }


def scorer_of(settings: Mapping[str, Any], benchmark: str) -> str:
    """Which scorer judged a benchmark and the commit of its original, such as "official, RUCAIBox/POPE@3df3ba1"."""
    name = settings["scorer"] if benchmark == "pope" else settings["data"][benchmark].get("variant", benchmark)
    return f"{name}, {COMMITS[name]}" if name in COMMITS else name


def _captions(results: Mapping[str, Any]) -> dict[str, str]:
    """One line on what was measured, per table."""
    settings, out = results["settings"], {}
    for benchmark, data in settings["data"].items():
        failed = sum(scores["failed"] for _, _, scores in _scores(results, benchmark))
        lost = (
            f"; {failed} answer{'s' * (failed > 1)} failed and count as wrong or empty (see samples.jsonl)"
            if failed
            else ""
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
    "* = the interval excludes 0, not corrected for the number of comparisons. Mended: only the method is right (captions: "
    "free of hallucination), broken: only the baseline; FN>TP with TN>FP is a shift to yes."
)
TERM = "What a contrast adds to the log-probabilities: standard deviation over the tokens it leaves uncut, in nats"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A value, its change against the baseline with interval (or ""), and whether the interval excludes 0."""

    text: str
    change: str = ""
    star: bool = False

    def __str__(self) -> str:
        return self.text + (f" ({self.change})" if self.change else "")


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table before it has a form: rows are (split or "", run, cells); `heads` are those of the cells."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[Cell, ...]], ...]


def grids(results: Mapping[str, Any]) -> list[Grid]:
    """Per benchmark its scores and what changed against the baseline; the size of contrasts; the speed of all runs."""
    captions, made = _captions(results), []
    for benchmark in results["settings"]["data"]:
        layout, found = LAYOUTS[benchmark], list(_scores(results, benchmark))
        columns = {name: head for name, head in layout.columns.items() if all(name in scores for *_, scores in found)}
        several = len({split for split, _, _ in found}) > 1
        rows, changed = [], []
        for split, run, scores in found:
            cells = tuple(
                Cell(_value(name, scores), _delta(scores["delta"], name), _star(scores["delta"], name))
                for name in columns
            )
            rows.append((split if several else "", run, cells))
            if changes := _changes(scores):
                changed.append((split if several else "", run, changes))
        made.append(Grid(captions[benchmark], tuple(columns.values()), tuple(rows)))
        names = [name for name in CHANGES if any(name in changes for _, _, changes in changed)]
        if names:
            filled = tuple((s, run, tuple(c.get(name, Cell("")) for name in names)) for s, run, c in changed)
            title = f"{benchmark.upper()}, what changed against the baseline"
            made.append(Grid(title, tuple(CHANGES[name] for name in names), filled))
    benchmarks = tuple(results["settings"]["data"])
    sizes = []
    for run, sds in results.get("term_sd", {}).items():
        sizes.append(("", run, tuple(Cell("-" if sds.get(b) is None else f"{sds[b]:.3g}") for b in benchmarks)))
    if sizes:
        made.append(Grid(TERM, tuple(b.upper() for b in benchmarks), tuple(sizes)))
    speeds = tuple(("", run, tuple(_speed_cells(results, each))) for run, each in results["speed"].items())
    units = ("tok/s", "first token s", "peak MB")
    heads = tuple(f"{b.upper()}\n{unit}" for b in results["settings"]["data"] for unit in units)
    return [*made, Grid(captions["speed"], heads, speeds)]


def tables(results: Mapping[str, Any]) -> Group:
    """The tables for the terminal, 100 columns at most."""
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
                style = "bold" if cell.star else "dim"
                shown.append(escape(cell.text) + (f"\n[{style}]{escape(cell.change)}[/{style}]" if cell.change else ""))
            table.add_row(escape(run), *shown)
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
    """Print the tables and where everything lies."""
    console = Console(highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    console.print(tables(results))
    console.print(STAR, style="dim")
    for run, note in notes(results):
        console.print(f"{escape(run)}: {escape(note)}", style="yellow")
    console.print(f"Results: {folder / 'results.json'}  table: {folder / 'table.md'}", soft_wrap=True)
    console.print(f"Figure: {folder / 'figure.png'}  answers: {folder / 'samples.jsonl'}", soft_wrap=True)


def markdown(results: Mapping[str, Any]) -> str:
    """The same tables in Markdown."""
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
    """Write table.md and figure.png beside results.json."""
    (folder / "table.md").write_text(markdown(results))
    figure(results, folder / "figure.png")


def figure(results: Mapping[str, Any], path: Path) -> None:
    """figure.png: differences per split with 95 % intervals and McNemar's p, and for captions CHAIR_i over recall."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = list(results["runs"])
    looks = {
        run: (COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]) for i, run in enumerate(runs)
    }
    panels = list(results["settings"]["data"])
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with plt.rc_context(style):
        drawn, axes = plt.subplots(
            1, len(panels), figsize=(5.2 * len(panels), 3.9), layout="constrained", squeeze=False
        )
        for panel, ax in zip(panels, axes[0], strict=True):
            if panel == "chair":
                _chair_panel(ax, results, looks)
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
        drawn.suptitle(f"{name} on {source}; bars: 95 % interval of the difference, open marks: it includes 0", size=9)
        drawn.savefig(path, dpi=160, metadata={"Software": None})
        plt.close(drawn)


def _delta_panel(ax: Any, results: Mapping[str, Any], looks: Mapping[str, tuple[str, str]], benchmark: str) -> None:
    """Splits on the vertical axis, one row per method, difference of the first compared metric to the right."""
    layout, rows = LAYOUTS[benchmark], list(_scores(results, benchmark))
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
        face = colour if scores["delta"][name]["excludes_zero"] else "white"
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
        ax.axhline(edge - 0.5, color="#dddddd", lw=0.8, zorder=0)
    ax.axvline(0, color="#777777", lw=1, zorder=0)
    ax.set_xlabel(f"{benchmark.upper()} {layout.columns.get(name, name)}, points above the baseline; p: McNemar")


def _chair_panel(ax: Any, results: Mapping[str, Any], looks: Mapping[str, tuple[str, str]]) -> None:
    """Recall to the right, hallucinated mentions upwards; bars are the paired intervals around the baseline."""
    for _, run, scores in _scores(results, "chair"):
        colour, marker = looks[run]
        x, y = 100 * scores["recall"], 100 * scores["chair_i"]
        bars: dict[str, Any] = {}
        for axis, name in (("xerr", "recall"), ("yerr", "chair_i")):
            if name in scores["delta"]:
                change, low, high = (100 * scores["delta"][name][key] for key in ("delta", "low", "high"))
                bars[axis] = [[change - low], [high - change]]
        if not bars:  # the baseline: the cross that the others are read against
            ax.axvline(x, color="#bbbbbb", lw=0.9, ls="--", zorder=0)
            ax.axhline(y, color="#bbbbbb", lw=0.9, ls="--", zorder=0)
        full = not bars or scores["delta"]["chair_i"]["excludes_zero"]
        face = colour if full else "white"
        ax.errorbar(x, y, fmt=marker, color=colour, mfc=face, ms=6, lw=1.1, capsize=2, **bars)
    ax.set_xlabel("CHAIR recall, % of the objects (right is better)")
    ax.set_ylabel("CHAIR_i, % of the mentions (lower is better)")


def load(folder: str | Path) -> dict[str, Any]:
    """results.json of a finished run."""
    return json.loads((Path(folder) / "results.json").read_text())

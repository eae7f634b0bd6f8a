"""Score the answers of every run and compare them with the baseline's, paired by question or caption.

A sample that failed is reported. An answer to a question counts as wrong; a caption is left out, since an empty one would
have no hallucination, and a comparison is then over the captions that both runs have. A run of which no answer was made is
an error.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.compare import compare, shared
from vlm_fix.eval.scorers.benchmark import Overall
from vlm_fix.eval.scorers.registry import BENCHMARKS, LAYOUTS
from vlm_fix.eval.stats import Metric, column_sums, holm, p_value, paired_bootstrap, spread
from vlm_fix.eval.tasks import Task


def summarise(
    runs: Sequence[str] | Mapping[str, Any],
    tasks: Sequence[Task],
    rows_of: Callable[[str, str], Sequence[Mapping[str, Any]]],
    seed: int = 0,
) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Return run -> benchmark -> split -> metrics, `failed`, and what changed against the first run.

    What changed is what `compare` returns: `delta` {metric: Comparison, with p and p_holm as `correct` gives them},
    `outcomes`, `verdict` and more. The counts of several seeds are summed, with `seeds` {metric: mean, sd, values}; a run
    with one seed is compared with each seed of the other, and p is the largest over seeds.
    """
    baseline = next(iter(runs))
    summary: dict[str, Any] = {run: {} for run in runs}
    every: dict[str, dict[str, dict[int, _Scored]]] = {}
    for task in tasks:
        scored = every[task.benchmark] = {run: _by_seed(run, task, rows_of(run, task.benchmark)) for run in runs}
        for run, ours in scored.items():
            summary[run][task.benchmark] = {
                split: _summary(task, split, ours, {} if run == baseline else scored[baseline], seed)
                for split in task.sizes
            }
    for overall in (made.overall for made in BENCHMARKS.values()):
        if overall and {*overall.tasks} <= {task.benchmark for task in tasks if task.sizes}:
            _add_overall(summary, overall, every, seed)
    correct(summary)
    return summary


def correct(runs: Mapping[str, Any]) -> None:
    """Give every comparison its p-value, `p`, and `p_holm`: corrected over all runs of the table with the same metric.

    A table is one benchmark's, a split each; controls count like methods, as a reader compares them alike. Results that
    were made before p-values were kept get theirs from the interval.
    """
    tables: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for each in runs.values():
        for benchmark, splits in each.items():
            for split, scores in splits.items():
                for part in ("delta", "equal_length"):
                    for name, found in scores.get(part, {}).items():
                        tables.setdefault((benchmark, split, part, name), []).append(found)
    for table in tables.values():
        ps = [p_value(found["delta"], found["low"], found["high"], found.get("level", 0.95)) for found in table]
        for found, p, corrected in zip(table, ps, holm(ps), strict=True):
            found.update(p=p, p_holm=corrected)


def _add_overall(
    summary: dict[str, Any], overall: Overall, every: Mapping[str, Mapping[str, dict[int, _Scored]]], seed: int
) -> None:
    """Add the figures over two tasks to the summary of the first."""
    first, second = overall.tasks
    whole: dict[str, dict[int, Any]] = {
        run: {  # the last part of the second task has all its answers
            s: overall.combine(scored.results[overall.part], [*every[second][run][s].results.values()][-1])
            for s, scored in every[first][run].items()
        }
        for run in summary
    }
    baseline = next(iter(summary))
    for run, results in whole.items():
        row, found = summary[run][first][overall.part], _figures(overall.metrics, list(results.values()))
        row |= {name: found[name] for name in overall.metrics}
        if "seeds" in found:
            row["seeds"] |= found["seeds"]
        if run != baseline:
            pairs = _shared(_pairs(results, whole[baseline]))
            row["delta"] |= _compared(overall.metrics, _rows(pairs), seed) if pairs else {}


@dataclasses.dataclass
class _Scored:
    """The results of one seed by split, and the number of failed samples in each."""

    results: dict[str, Any]
    failed: dict[str, int]


def _by_seed(run: str, task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[int, _Scored]:
    answers: dict[int, dict[str, Any]] = {}
    for row in rows:
        answers.setdefault(row.get("seed", 0), {})[row["id"]] = None if row["error"] else row["answer"]
    scored = {}
    for seed, each in answers.items():
        results, failed = task.score(each), dict.fromkeys(task.sizes, 0)
        told = {key: text for key, text in each.items() if text is not None}
        if len(told) < len(each):
            whole, answered = task.score({key: text or "" for key, text in each.items()}), task.score(told)
            failed = {split: r.n - (answered[split].n if split in answered else 0) for split, r in whole.items()}
        if lost := next((split for split in task.sizes if split not in results), None):
            error = next((row["error"] for row in rows if row["error"]), "no answer")
            raise VlmFixError(
                f"{run}: none of the {failed[lost]} {lost} of {task.benchmark} was made ({error}): see samples.jsonl, fix the "
                "cause and start again in another --output."
            )
        if each and not told:
            raise VlmFixError(
                f"{run}: none of its {len(each)} answers to {task.benchmark} was made ({rows[0]['error']}), so there is nothing "
                "to judge it by: see samples.jsonl, fix the cause and start again in another --output."
            )
        scored[seed] = _Scored(results, failed)
    return scored


def _summary(
    task: Task, split: str, ours: Mapping[int, _Scored], theirs: Mapping[int, _Scored], seed: int
) -> dict[str, Any]:
    """Return the metrics of one run and split, compared with `theirs`, the baseline, unless that is empty."""
    layout = LAYOUTS[task.benchmark]
    results = [scored.results[split] for scored in ours.values()]
    summary = _figures(layout.metrics, results)
    summary |= {"failed": sum(scored.failed[split] for scored in ours.values()), "delta": {}}
    if not theirs:
        return summary
    pairs = _shared([(base.results[split], method.results[split]) for base, method in _pairs(ours, theirs)])
    return summary | (compare(layout, pairs, seed) if pairs else {})


def _figures(metrics: Mapping[str, Metric], results: Sequence[Any]) -> dict[str, Any]:
    """Return the figures of one seed, or of the summed counts of all seeds with their spread as `seeds`."""
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
    """Pair (baseline, method) per seed; a run with a single seed is paired with each seed of the other."""
    base, method = ({s: side.get(s, next(iter(side.values()))) for s in {*ours, *theirs}} for side in (theirs, ours))
    return [(base[s], method[s]) for s in sorted(base)]


def _shared(pairs: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Return the pairs, where captions failed those of the images that both have; pairs without one are left out."""
    found = []
    for pair in pairs:
        rows = [Counter(row["image"] for row in result.rows) for result in pair]
        if rows[0] == rows[1]:
            found.append(pair)
        elif any(rows[0][image] == n for image, n in rows[1].items()):
            found.append(shared(*pair))
    return found


def _rows(pairs: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    return [(base.rows, method.rows) for base, method in pairs]


def _compared(metrics: Mapping[str, Metric], pairs: Sequence[Any], seed: int) -> dict[str, Any]:
    """Return metric -> Comparison of the paired rows; the bootstrap draws all seeds of an image together."""
    base, method = ([row for pair in pairs for row in pair[side]] for side in (0, 1))
    return {
        name: comparison.to_dict() | {"excludes_zero": comparison.excludes_zero}
        for name, comparison in paired_bootstrap(metrics, base, method, seed=seed).items()
    }


def changed(
    runs: Iterable[str], tasks: Sequence[Task], rows_of: Callable[[str, str], Sequence[Mapping[str, Any]]]
) -> dict[str, dict[str, int]]:
    """Return run -> number of answers, and how many differ from the baseline's (none: the method did nothing)."""
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


def by_split(results: Mapping[str, Any], benchmark: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (split, run, metrics), split by split."""
    for split in dict.fromkeys(split for run in results["runs"].values() for split in run.get(benchmark, {})):
        for run, scores in results["runs"].items():
            if split in scores.get(benchmark, {}):
                yield split, run, scores[benchmark][split]

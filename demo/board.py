"""A benchmark's results in one sentence and one table, from the verdicts and figures that `vlm-fix eval` has in results.json."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from vlm_fix.eval.recommend.candidates import is_control
from vlm_fix.eval.report.page import columns
from vlm_fix.eval.scorers.registry import PLAIN, better, groups
from vlm_fix.eval.stats import SIGNIFICANT
from vlm_fix.registry import list_methods


def judged(results: Mapping[str, Any], run: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(part, verdict) of a method, wherever it was compared: what it "is", the "text" of it, and whether it is "sure".

    Sure: a figure of that part differs in the verdict's direction after Holm's correction, at equal length or recall too.
    """
    for task, parts in results["runs"][run].items():
        for part, scores in parts.items():
            if "verdict" in scores:
                sure = _sure(scores, scores["verdict"]["is"].startswith("better"))
                yield f"{task.upper()} {part}" if len(parts) > 1 else task.upper(), {**scores["verdict"], "sure": sure}


def _sure(scores: Mapping[str, Any], gain: bool) -> bool:
    """Whether a figure other than the yes-ratio differs for better (`gain`) or worse after Holm's correction."""
    found = [(name, each) for part in ("delta", "equal_length") for name, each in scores.get(part, {}).items()]
    return any(better(name, each["delta"]) is gain and each["p_holm"] < SIGNIFICANT for name, each in found)


def _control(run: str) -> bool:
    """Whether a run stands beside the methods to be beaten: the model decoded otherwise, or a stack with a control in it."""
    known = {method.name: method for method in list_methods()}
    names = [part.partition(":")[0] for part in run.partition(" as ")[0].split("+")]
    return (
        run in ("greedy", "sampled")
        or run.startswith("beams=")
        or any(n in known and is_control(known[n]) for n in names)
    )


def headline(results: Mapping[str, Any]) -> tuple[str, str]:
    """("good", "bad" or "none", one sentence): the method that is better somewhere and worse nowhere; else how it stands.

    Better only by saying less, or no, does not count, nor does what no compared figure of that part shows after Holm's
    correction. Controls are no methods.
    """
    runs = [run for run in list(results["runs"])[1:] if not _control(run)]
    if not runs:
        return "none", "Only the model itself was measured: choose a method to hold against it."
    gains, losses = dict[str, list[str]](), list[str]()
    for run in runs:
        verdicts = list(judged(results, run))
        gains[run] = [
            f"{part}: {v['text'].partition(': ')[2]}" for part, v in verdicts if v["is"] == "better" and v["sure"]
        ]
        if any(v["is"].startswith("worse") and v["sure"] for _, v in verdicts):
            losses.append(run)
    whole = [run for run in runs if gains[run] and run not in losses]
    if whole:
        best = max(whole, key=lambda run: len(gains[run]))
        more = f" (and {len(whole) - 1} more)" if len(whole) > 1 else ""
        return "good", f"{best}{more} is better than the model itself, and worse nowhere. {gains[best][0]}."
    if mixed := [run for run in runs if gains[run]]:
        return "bad", f"{mixed[0]} wins and loses. It is better on {gains[mixed[0]][0]}; but elsewhere it is worse."
    rest = len(runs) - len(losses)
    worse = f"{', '.join(losses)} {'is' if len(losses) == 1 else 'are'} worse somewhere" if losses else ""
    even = f"{rest} of {len(runs)} {'makes' if rest == 1 else 'make'} no difference that can be seen" if rest else ""
    return (
        "bad" if losses else "none"
    ), f"Nothing here beats the model itself: {'; '.join(filter(None, (worse, even)))}."


def verdict(results: Mapping[str, Any]) -> str:
    """The sentence, as HTML."""
    tone, said = headline(results)
    source = next(iter(results["settings"]["data"].values()))["source"]
    about = f"{results['settings']['model']['name']} on {source}; 95 % intervals, better or worse at 5 % after Holm"
    return (
        f'<div class="verdict {tone}" role="status"><p>{html.escape(said)}</p><small>{html.escape(about)}</small></div>'
    )


def table(results: Mapping[str, Any]) -> str:
    """A row for each method, a column for each main figure; coloured where the difference is significant."""
    shown, base = columns(results), next(iter(results["runs"]))
    task = list(results["settings"]["data"])[-1]
    heads = ["method", *(heading for heading, *_ in shown), "tokens/s"]
    rows = []
    for run, each in results["runs"].items():
        cells = []
        for heading, _, b, split, name in shown:
            scale = 1 if name in PLAIN else 100
            if not split:
                mean = fmean(scores[name] for part, scores in each[b].items() if part not in groups(b))
                cells.append(_cell(heading, f"{scale * mean:.1f}"))
                continue
            delta = each[b][split]["delta"].get(name) if run != base else None
            cells.append(_cell(heading, f"{scale * each[b][split][name]:.1f}", delta, name, scale))
        speed = results["speed"][run][task]["tokens_per_second"]
        cells.append(_cell("tokens/s", "-" if speed is None else f"{speed:.0f}"))
        rows.append(f'<tr><th scope="row">{html.escape(run)}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in heads)
    return f'<table class="board"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _cell(heading: str, value: str, delta: Mapping[str, Any] | None = None, name: str = "", scale: int = 100) -> str:
    tone, change = "", ""
    if delta:
        good = better(name, delta["delta"]) if delta["p_holm"] < SIGNIFICANT else None
        tone = {True: "better", False: "worse", None: ""}[good]
        by, low, high = (round(scale * delta[key], 1) + 0.0 for key in ("delta", "low", "high"))
        change = f"<small>{by:+.1f} [{low:.1f}, {high:.1f}]</small>"
    return f'<td class="{tone}" data-head="{html.escape(heading)}"><b>{value}</b>{change}</td>'

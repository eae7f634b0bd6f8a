"""Figures that papers report, each with its source and its own baseline, for comparison with our runs.

Baselines of the same model differ by ten points between papers (scorer, images, decoding, length). So a figure is always
shown with the baseline of its own table, and `compare` says where its setup differs from ours or is unknown.

Data: data/published.json, in percent. A row has method, benchmark, metrics, source and status (C: official code and its
paper, P: the paper's text, N: a table or note elsewhere, only a lead) and, where stated, baseline, split, model, decoding,
max_new_tokens, scorer, images and settings of the method.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import DATA
from vlm_fix.eval.scorers.registry import groups
from vlm_fix.eval.tasks.sample import MAX_NEW_TOKENS
from vlm_fix.registry import parse_spec

NAMES = {"accuracy": "accuracy", "f1": "F1", "yes_ratio": "yes", "chair_s": "C_S", "chair_i": "C_I", "score": "score"}
HEADS = ("method", "benchmark", "model", "its baseline > method", "source")
COMPARED = ("method", "benchmark", "published", "ours", "where the setups differ")


@functools.cache
def table() -> tuple[dict[str, Any], ...]:
    """Return all rows of published.json."""
    return tuple(json.loads((DATA / "published.json").read_text(encoding="utf-8"))["rows"])


def select(method: str = "", benchmark: str = "", model: str = "") -> list[dict[str, Any]]:
    """Return the rows of these methods (comma-separated; "" means all) and benchmark, on models containing `model`."""
    names = [name.strip() for name in method.split(",") if name.strip()]
    if method.strip() and not names:
        raise VlmFixError(f"--method {method!r} names no method; leave it out to see all.")
    for given, key in ((names, "method"), ([benchmark] if benchmark else [], "benchmark")):
        known = list(dict.fromkeys(row[key] for row in table()))
        unknown = [name for name in given if name not in known]
        if unknown:
            raise VlmFixError(f"no figures are kept for {key} {unknown[0]!r}; there are some for {', '.join(known)}.")
    rows = [
        row
        for row in table()
        if (not names or row["method"] in names)
        and (not benchmark or row["benchmark"] == benchmark)
        and model.lower() in row.get("model", "").lower()
    ]
    if not rows:
        raise VlmFixError(f"no figures are kept for --model {model!r} here; leave the option out to see all.")
    return rows


def cells(row: Mapping[str, Any]) -> list[str]:
    """Format a row under HEADS, with one line per metric in the fourth cell."""
    return [
        row["method"] + (f":{row['settings']}" if "settings" in row else ""),
        _where(row),
        row.get("model", "not stated"),
        _figures(row, row["metrics"]),
        f"{row['source']} [{row['status']}]" + (f"; {row['note']}" if "note" in row else ""),
    ]


def _where(row: Mapping[str, Any]) -> str:
    return row["benchmark"].upper() + (f" {row['split']}" if "split" in row else "")


def _figures(row: Mapping[str, Any], names: Iterable[str]) -> str:
    lines = []
    for name in names:
        base, value = row.get("baseline", {}).get(name), row["metrics"][name]
        told = f"{value:g} (no baseline)" if base is None else f"{base:g} > {value:g} ({value - base:+.4g})"
        lines.append(f"{NAMES[name]} {told}")
    return "\n".join(lines)


def compare(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a line under COMPARED for each published row whose method and benchmark are in our run."""
    lines = []
    for run in ("+".join(stack) for stack in results["settings"]["methods"] if len(stack) == 1):
        for row in table():
            ours = results["runs"][run].get(row["benchmark"], {})
            split = row.get("split", "mean")
            splits = [s for s in ours if s not in groups(row["benchmark"])] if split == "mean" else [split]
            names = [name for name in row["metrics"] if splits and all(name in ours.get(s, {}) for s in splits)]
            if row["method"] == run.partition(":")[0] and names:
                mean = f" (here: mean of {len(splits)} splits)" if len(splits) > 1 else ""
                told = [*differences(row, run, results), f"from {row['source']} [{row['status']}]"]
                cells = (run, _where(row) + mean, _figures(row, names), _ours(results, run, row, splits, names))
                lines.append(dict(zip(COMPARED, (*cells, "\n".join(told)), strict=True)))
    return lines


def _ours(
    results: Mapping[str, Any], run: str, row: Mapping[str, Any], splits: Sequence[str], names: Iterable[str]
) -> str:
    """Format our figures like `_figures`, with the interval of the difference if there is a single split."""
    lines = []
    for name in names:
        sides = [
            [results["runs"][side][row["benchmark"]][split][name] for split in splits] for side in ("baseline", run)
        ]
        base, method = (100 * statistics.fmean(side) for side in sides)
        delta = results["runs"][run][row["benchmark"]][splits[0]]["delta"].get(name) if len(splits) == 1 else None
        bounds = f" [{100 * delta['low']:.1f}, {100 * delta['high']:.1f}]" if delta else ""
        lines.append(f"{NAMES[name]} {base:.1f} > {method:.1f} ({method - base:+.1f}{bounds})")
    return "\n".join(lines)


def differences(row: Mapping[str, Any], run: str, results: Mapping[str, Any]) -> list[str]:
    """Return where the setup of a published figure differs from that of `run`, and what is not stated."""
    settings, benchmark = results["settings"], row["benchmark"]
    data = settings["data"][benchmark]
    scorer = data.get("variant") or settings["scorer"]
    ours = {
        "model": settings["model"]["name"],
        "decoding": _decoding(settings),
        "max_new_tokens": settings["max_new_tokens"] or MAX_NEW_TOKENS.get(benchmark),
        "scorer": scorer,
        "images": data["source"],
    }
    told, unknown = [], []
    for key, mine in ours.items():
        if key not in row:
            unknown.append(key.replace("_", " "))
        elif _plain(row[key]) != _plain(mine):
            told.append(f"{key.replace('_', ' ')}: {row[key]} there, {mine} here")
    if "settings" in row and not _same_settings(row, run):
        told.append(f"settings: {row['settings']} there, {run} here")
    if "split" not in row and len(results["runs"]["baseline"][benchmark]) > 1:
        unknown.append("split")
    return told + ([f"not known of it: {', '.join(unknown)}"] if unknown else [])


def _same_settings(row: Mapping[str, Any], run: str) -> bool:
    """Whether the run has the values of the parameters that a row names; other parameters do not count."""
    there, here = parse_spec(f"{row['method']}:{row['settings']}"), parse_spec(run)
    names = [part.partition("=")[0] for part in row["settings"].split(",")]
    return type(there) is type(here) and all(getattr(there, name) == getattr(here, name) for name in names)


def _decoding(settings: Mapping[str, Any]) -> str:
    if settings["sample"]:
        return "sampling"
    return "greedy" if settings["num_beams"] == 1 else f"{settings['num_beams']} beams"


def _plain(value: Any) -> str:
    """Normalise names: "llava-hf/llava-1.5-7b-hf" and "LLaVA-1.5-7B" are the same model."""
    return str(value).lower().rpartition("/")[2].removesuffix("-hf")


def render(heads: Sequence[str], lines: Sequence[Sequence[str]], title: str) -> Any:
    """Format a table for the terminal."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    shown = Table(
        *heads, box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="italic", padding=(0, 1, 0, 0)
    )
    shown.columns[0].overflow = "fold"
    shown.columns[0].min_width = min(24, max((len(line[0]) for line in lines), default=0))
    for line in lines:
        shown.add_row(*map(escape, line))
    return shown

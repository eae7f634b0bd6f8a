"""Evaluations as CSV, a line for each figure, and as LaTeX tables for booktabs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import tables

HEAD = ("folder", "model", "run", "task", "part", "metric", "value", "delta", "low", "high", "excludes_zero")
SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    ">": r"$>$",
    "<": r"$<$",
    "±": r"$\pm$",
    "↓": r"$\downarrow$",
    "→": r"$\to$",
    "*": r"$^{*}$",
    "▁": r"\_",  # the space of SentencePiece, and that of byte-level vocabularies
    "Ġ": r"\.{G}",
}


def csv_text(found: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
    """Return every number of every run, task and part of (folder, results), with its change against the baseline."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEAD)
    for folder, results in found:
        for run, tasks in results["runs"].items():
            for task, parts in tasks.items():
                for part, scores in parts.items():
                    place = (folder, results["settings"]["model"]["name"], run, task, part)
                    for name, value in scores.items():
                        if isinstance(value, int | float) and not isinstance(value, bool):
                            change = scores["delta"].get(name, {})
                            writer.writerow([*place, name, value, *(change.get(key, "") for key in HEAD[7:])])
        for run, tasks in results.get("probabilities", {}).get("runs", {}).items():
            for task, parts in tasks.items():
                for part, figures in parts.items():
                    place = (folder, results["settings"]["model"]["name"], run, task, part)
                    writer.writerows(
                        [*place, f"probability_{name}", value, "", "", "", ""] for name, value in figures.items()
                    )
    return out.getvalue()


def latex(found: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
    r"""Return the tables of the report, one `table` each; it needs \usepackage{booktabs}."""
    made = []
    for folder, results in found:
        for grid in tables.grids(results):
            columns = "l" + "r" * len(grid.heads)
            lines = [rf"% {folder}", r"\begin{table}", rf"\caption{{{escape(grid.caption)}}}"]
            lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _line(["method", *grid.heads]), r"\midrule"]
            last = ""
            for part, run, cells in grid.rows:
                if part != last:
                    lines.append(rf"\multicolumn{{{len(columns)}}}{{l}}{{\textit{{{escape(part)}}}}} \\")
                last = part
                lines.append(_line([run, *map(str, cells)]))
            made.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]))
    return "\n\n".join(made) + "\n"


def escape(text: str) -> str:
    """Escape what LaTeX reads as a command.

    >>> print(escape("50 % of A_b*"))
    50 \\% of A\\_b$^{*}$
    """
    return "".join(SPECIAL.get(letter, letter) for letter in text.replace("\n", " "))


def _line(cells: Sequence[str]) -> str:
    return " & ".join(map(escape, cells)) + r" \\"

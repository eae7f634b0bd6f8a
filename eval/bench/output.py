"""Show the results of a bench as a table, and write them as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from vlm_fix.eval.files import write_atomic


def write(results: dict[str, Any], path: Path) -> None:
    """Write the results as JSON."""
    write_atomic(path, json.dumps(results, indent=1) + "\n")


def table(results: dict[str, Any]) -> Table:
    """Format the results as a table for the terminal."""
    prune = results["bench"] == "prune"
    head = ["method", "first token", "tokens/s", "fastest", "peak memory"] + ["kept", "KV MB", "scoring"] * prune
    out = Table(*head, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    out.title = (
        f"{results['shape']}, {results['dtype']}, {results['prompt_tokens']} prompt tokens "
        f"({results['visual_tokens']} visual), {results['new_tokens']} new, {results['rounds']} rounds, {results['hardware']}"
    )
    out.caption = escape(
        "median [lowest, highest] of the ratios to the unwrapped model in the same round\n"
        "fastest: of the fastest first token and the fastest tenth of the others, over all rounds"
    )
    out.columns[0].overflow = "fold"
    for column in out.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for i, row in enumerate(results["rows"]):
        if not row["seconds"] and i:
            out.add_row(f"{escape(row['spec'])}\n[dim]{escape(row['note'])}[/dim]")
            continue
        cells = (
            [f"{row['seconds']:.3f} s", f"{row['speed']:.1f}", "", f"{row['peak_mb']:.0f} MB"]
            if i == 0 and row["seconds"]
            else ["not timed", "", "", f"{row['peak_mb']:.0f} MB"]
            if i == 0
            else [_ratio(row["first_token"]), _ratio(row["tokens_per_second"]), _both(row), f"{row['memory']:.2f}"]
        )
        if prune:
            cells += [
                "" if row["kept"] is None else f"{row['kept']:.0f}",
                "" if row["kv_mb"] is None else f"{row['kv_mb']:.1f}",
                "" if row["scoring"] is None else f"{1000 * row['scoring']:.0f} ms",
            ]
        out.add_row(escape(row["spec"]) + (f"\n[dim]{row['note']}[/dim]" if row["note"] else ""), *cells)
    return out


def _both(row: dict[str, Any]) -> str:
    return "{:.2f}, {:.2f}".format(*row["fastest"]) if "fastest" in row else ""  # files before 2026-12 have none


def _ratio(spread: list[float]) -> str:
    return f"{spread[0]:.2f} [{spread[1]:.2f}, {spread[2]:.2f}]"

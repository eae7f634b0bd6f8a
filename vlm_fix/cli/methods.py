"""vlm-fix methods: the methods, or what is known of some: paper, settings, and what they did on the bundled models."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_fix import index

from .common import add, add_json, console, table, written

if TYPE_CHECKING:
    from vlm_fix.eval.report import measured

EXAMPLES = """examples:
  vlm-fix methods              every method in a line
  vlm-fix methods pai vcd      paper, settings with defaults and ranges, figures on the bundled models"""


def add_to(commands: Any) -> None:
    parser = add(
        commands, "methods", "list the methods, or what is known of some: paper, settings, figures", run, EXAMPLES
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="methods to tell more of, or file.py:Class (all, a line each)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    if not args.names and not args.json:
        return _list()
    from vlm_fix.eval.report import measured
    from vlm_fix.registry import get_method, list_methods

    known = measured.table()
    chosen = [get_method(name) for name in args.names] or list_methods()
    rows: list[dict[str, Any]] = [
        {
            "name": method.name,
            "kind": method.kind,
            "paper": method.paper,
            "about": ((method.__doc__ or "").strip().splitlines() or [""])[0],
            "parameters": _settings(method),
            "measured": [dataclasses.asdict(row) for row in known.get(method.name, ())],
        }
        for method in chosen
    ]
    if args.json:
        print(json.dumps(rows, indent=2, default=str))
    else:
        _tell(rows)
        _figures([row for method in chosen for row in known.get(method.name, ())])


def _list() -> None:
    from rich.markup import escape

    short, last = table("kind", "method", "what it does", gap=0), ""
    for name, kind, about in _read():
        short.add_row(f"[dim]{kind if kind != last else ''}[/dim]", f"[bold]{name}[/bold]", escape(about))
        last = kind
    console().print(short)
    print("vlm-fix methods NAME: paper and settings; docs/methods.md: formula, cost and what it does on Picto")


def _read() -> list[tuple[str, str, str]]:
    """(name, kind, first sentence) of every method, without importing torch where their files say it."""
    if (found := index.entries()) is not None:
        return [(entry.name, entry.kind, entry.about) for entry in found]
    from vlm_fix.registry import list_methods

    return [(m.name, m.kind, ((m.__doc__ or "").strip().splitlines() or [""])[0]) for m in list_methods()]


def _tell(rows: list[dict[str, Any]]) -> None:
    from rich.markup import escape

    long = table("method", "what it does, paper, settings with defaults")
    for row in rows:
        lines = [escape(row["about"])] + [f"[dim]{escape(row['paper'])}[/dim]"] * bool(row["paper"])
        for p in row["parameters"]:
            told = " ".join(filter(None, (p["help"].replace("None:", "auto:"), p["range"] and f"({p['range']})")))
            default = escape(written(p["default"]))
            lines.append(f"[cyan]{escape(p['name'])}[/cyan]={default}  [dim]{escape(told)}[/dim]")
        long.add_row(f"[bold]{row['name']}[/bold]\n[dim]{row['kind']}[/dim]", "\n".join(lines))
    console().print(long)


def _figures(rows: Sequence[measured.Row]) -> None:
    from rich.markup import escape

    from vlm_fix.eval.report import measured

    for model in dict.fromkeys(row.model for row in rows):
        shown = table("run", *measured.COLUMNS, gap=0)
        shown.padding = (0, 1, 0, 0)
        shown.columns[0].overflow = "fold"
        for row in rows:
            if row.model == model:
                cells = (measured.points(row.figures.get(name), after="*") for name in measured.COLUMNS)
                run = (
                    escape(row.spec.replace(":", "\n:", 1))
                    + f"\n[dim]{escape(row.folder.removeprefix(f'{model}-'))}[/dim]"
                )
                shown.add_row(run, *(escape(cell.replace(" [", "\n[")) for cell in cells))
        console().print(
            f"{model}, points above the baseline with their 95 % interval, by folder of results/; less CHAIR_i is better; "
            "* significant after Holm's correction"
        )
        console().print(shown)


def _settings(method: Any) -> list[dict[str, Any]]:
    """The settings of a method class: its dataclass fields."""
    rows = []
    for field in dataclasses.fields(method):
        default = None if field.default is dataclasses.MISSING else field.default
        meta = field.metadata
        low, high = ("" if meta.get(end) is None else f"{meta[end]:g}" for end in ("low", "high"))
        span = f"above {low}" if meta.get("open") and low else f"{low} to {high}" if low and high else ""
        span = span or (f"at least {low}" if low else f"at most {high}" if high else "")
        span = ", ".join(map(str, meta.get("choices") or ())) or span
        rows.append({"name": field.name, "default": default, "help": meta.get("help", ""), "range": span})
    return rows

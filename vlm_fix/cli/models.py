"""vlm-fix models: the model families, and how many methods of each kind work on them."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vlm_fix.errors import VlmFixError

from .common import add, add_json, console, table

ABOUT = """Counts are methods that work on a tiny model of the true architecture, of those there are: the tests' own record.

examples:
  vlm-fix models                 every family in a line
  vlm-fix models qwen3_vl        what is refused there, and why"""


def add_to(commands: Any) -> None:
    parser = add(commands, "models", "list the model families and what works on them", run, ABOUT)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to tell more of: what is refused, and why")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from vlm_fix.eval.report.models_page import record
    from vlm_fix.families import FAMILIES

    known = record()["families"]
    if wrong := [name for name in args.names if name not in known]:
        raise VlmFixError(f"there is no model {wrong[0]!r} in the record; `vlm-fix models` lists those there are.")
    if args.json:
        rows = []
        for name in args.names or known:
            types = next(f.model_types for f in FAMILIES if f.name == known[name]["family"])
            rows.append({"name": name, "model_types": types, **known[name]})
        print(json.dumps(rows, indent=2))
    elif args.names:
        _tell(args.names)
    else:
        _list(list(known))


def _list(names: list[str]) -> None:
    from vlm_fix.eval.report.models_page import KINDS, counts

    short = {"attention": "attn", "hidden": "hid", "contrast": "contr", "logits": "log", "procedure": "proc"}
    listed = table("model", *(short.get(kind, kind) for kind in KINDS), gap=0)
    listed.padding = (0, 1, 0, 0)
    for name in names:
        listed.add_row(name, *(f"{works}/{total}" for works, total in counts(name).values()))
    console().print(listed)


def _tell(names: list[str]) -> None:
    from vlm_fix.eval.report.models_page import KINDS, counts, reasons, shown

    for name in names:
        told = console()
        told.print(f"[bold]{name}[/bold]")
        told.print("works: " + ", ".join(f"{title} {shown(*counts(name)[kind])}" for kind, title in KINDS.items()))
        for why, methods in reasons(name).items():
            told.print(f"refused: [bold]{', '.join(methods)}[/bold]: {why}", markup=True)

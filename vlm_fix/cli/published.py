"""vlm-fix published: what papers report, with sources and their own baselines."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .common import add, add_json, console

ABOUT = """the mark after a source says how the figure was read:
  C  in the official code's repository and its paper    P  in the paper's text
  N  in a table or note elsewhere: a lead, not a fact

  vlm-fix published --method vcd,pai --benchmark chair
  vlm-fix eval pope --method vcd --compare-published"""


def add_to(commands: Any) -> None:
    parser = add(commands, "published", "list what papers report, with sources and their own baselines", run, ABOUT)
    parser.add_argument("--method", default="", metavar="A,B", help="only these methods")
    parser.add_argument("--benchmark", default="", metavar="NAME", help="only this benchmark, such as pope or chair")
    parser.add_argument("--model", default="", metavar="TEXT", help="only models whose name contains this")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from vlm_fix.eval.report import published

    rows = published.select(args.method, args.benchmark, args.model)
    if args.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    title = "What papers report, each figure with the baseline of its own table; C, P, N: see --help"
    console().print(published.render(published.HEADS, [published.cells(row) for row in rows], title))

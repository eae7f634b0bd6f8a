"""vlm-fix report: an HTML page, a leaderboard, or a Markdown table, of evaluations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError

from .common import add, check_place

ABOUT = """The page is self-contained: tables, figures and answers side by side. A Markdown file that has the
lines <!-- leaderboard --> and <!-- /leaderboard --> is only changed between them.

  vlm-fix report runs/first runs/second --out report.html
  vlm-fix report results/*/results.json --board leaderboard.html
  vlm-fix report results/*/results.json --markdown docs/leaderboard.md"""


def add_to(commands: Any) -> None:
    parser = add(commands, "report", "make one HTML page, or a Markdown table, of evaluations", run, ABOUT)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folders that `vlm-fix eval --output` made")
    parser.add_argument("--out", metavar="FILE", help="the page (report.html, unless another form is given alone)")
    parser.add_argument(
        "--markdown", metavar="FILE", help="the short table; replaces what is between the marks, see below"
    )
    parser.add_argument("--board", metavar="FILE", help="one page with a row for each run, to sort and filter")
    parser.add_argument("--csv", metavar="FILE", help="every figure of every run, a line each")
    parser.add_argument("--latex", metavar="FILE", help="the tables, for booktabs")
    parser.add_argument("--samples", type=int, metavar="N", help="captions and questions shown (6)")


def run(args: argparse.Namespace) -> None:
    other = args.markdown or args.board or args.csv or args.latex
    if args.samples is not None and (args.samples < 0 or (other and not args.out)):
        wrong = "give 0 or more" if args.samples < 0 else "it is for the page: add --out FILE, or leave --samples out"
        raise VlmFixError(f"--samples {args.samples}: {wrong}.")
    if twice := [folder for folder in args.folders if args.folders.count(folder) > 1]:
        raise VlmFixError(f"{twice[0]} is given twice: name each run once.")
    out = args.out or ("" if other else "report.html")
    for place in filter(None, (out, args.markdown, args.board, args.csv, args.latex)):
        check_place(place)
    from vlm_fix.eval.files import write_atomic
    from vlm_fix.eval.report import board, export, page

    if args.markdown:
        page.save_markdown(page.leaderboard(args.folders), Path(args.markdown))
        print(args.markdown)
    if args.board:
        write_atomic(Path(args.board), board.page(args.folders))
        print(args.board)
    for place, make in ((args.csv, export.csv_text), (args.latex, export.latex)):
        if place:
            found = page.read(args.folders)
            with page.shown(found[0][0]):
                text = make(found)
            write_atomic(Path(place), text)
            print(place)
    if out:
        write_atomic(Path(out), page.page(args.folders, 6 if args.samples is None else args.samples))
        print(Path(out))

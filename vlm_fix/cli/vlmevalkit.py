"""vlm-fix vlmevalkit: run VLMEvalKit with a method."""

from __future__ import annotations

import argparse
from typing import Any

from .common import add

EXAMPLES = """examples:
  vlm-fix vlmevalkit VLMEvalKit --method pai:alpha=0.2 --model llava_next_vicuna_7b --data POPE"""


def add_to(commands: Any) -> None:
    parser = add(commands, "vlmevalkit", "run VLMEvalKit with a method", run, EXAMPLES)
    parser.add_argument("folder", metavar="DIR", help="a clone of VLMEvalKit; all else goes to its run.py")
    parser.add_argument("--method", required=True, metavar="A+B", help="one method or a stack")
    parser.add_argument(
        "--calibration", default="", metavar="FILE", help='of vlm-fix calibrate; several with ";" between'
    )
    parser.set_defaults(rest=[])


def run(args: argparse.Namespace) -> None:
    from vlm_fix.eval.harness.vlmevalkit import launch

    launch(args.folder, args.method, args.rest, args.calibration)

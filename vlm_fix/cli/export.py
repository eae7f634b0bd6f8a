"""vlm-fix export: answers in the input format of a benchmark's judge."""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

from vlm_fix.eval.scorers.benchmark import KEYS
from vlm_fix.eval.scorers.judges import JUDGES

from .common import add, check_place

EXAMPLES = """the judge itself is not called; its own script reads the file:
  vlm-fix export mmhal answers.jsonl --template response_template.json --out mmhal.json
  vlm-fix export objhal answers.jsonl --template obj_halbench_300_with_image.jsonl --out objhal_answer.jsonl
  vlm-fix export mm-vet answers.jsonl --out mm-vet.json"""


def add_to(commands: Any) -> None:
    parser = add(commands, "export", "write answers in the input format of a benchmark's judge", run, EXAMPLES)
    parser.add_argument("judge", choices=tuple(JUDGES), help="which format")
    parser.add_argument("answers", metavar="ANSWERS", help="a file in any of the layouts of vlm-fix score")
    parser.add_argument("--template", metavar="FILE", help="the benchmark's questions")
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write")
    for argument in KEYS:
        parser.add_argument(argument.name, **argument.options)


def run(args: argparse.Namespace) -> None:
    check_place(args.out)
    from vlm_fix.eval.scorers import judges
    from vlm_fix.eval.scorers.answers import Keys

    told = functools.partial(print, file=sys.stderr)
    judges.export(args.judge, args.answers, args.out, args.template, Keys(args.answer_key, args.id_key), told)
    print(args.out)

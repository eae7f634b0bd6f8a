"""vlm-fix export: answers in the input format of a benchmark's judge, or a method in the weights of a plain checkpoint."""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers.benchmark import KEYS
from vlm_fix.eval.scorers.judges import JUDGES

from .common import add, add_model, add_weights, check_place

EXAMPLES = """answers for a judge, which is not called; its own script reads the file:
  vlm-fix export mmhal answers.jsonl --template response_template.json --out mmhal.json
  vlm-fix export objhal answers.jsonl --template obj_halbench_300_with_image.jsonl --out objhal_answer.jsonl
  vlm-fix export mm-vet answers.jsonl --out mm-vet.json

a method that is a change of weights, in a checkpoint that transformers, vLLM and others load without vlm-fix:
  vlm-fix export nullu:file=subspace.safetensors OUT --model llava-hf/llava-1.5-7b-hf
  vlm-fix export nullu OUT --calibration nullu.json"""


def add_to(commands: Any) -> None:
    parser = add(commands, "export", "write answers for a judge, or a method into a checkpoint", run, EXAMPLES)
    parser.add_argument("what", metavar="WHAT", help=f"a judge's format ({', '.join(JUDGES)}), or a method")
    parser.add_argument(
        "path", metavar="PATH", help="the answers, in any of the layouts of vlm-fix score; or OUT, a new folder"
    )
    parser.add_argument("--template", metavar="FILE", help="the benchmark's questions")
    parser.add_argument("--out", metavar="FILE", help="where to write answers")
    parser.add_argument("--calibration", action="append", default=[], metavar="FILE", help="of vlm-fix calibrate")
    add_model(parser)
    add_weights(parser)
    for argument in KEYS:
        parser.add_argument(argument.name, **argument.options)


def _known(what: str) -> None:
    """Raise VlmFixError for one word that is neither a judge nor a method."""
    from vlm_fix.registry import list_methods

    names = {method.name for method in list_methods()}
    if what.isidentifier() and what not in names and what not in JUDGES:
        raise VlmFixError(f"there is no judge and no method {what!r}: the judges are {', '.join(JUDGES)}.")


CHECKPOINT = {"model": "picto-llava", "dtype": "auto", "device": "auto", "calibration": []}
ANSWERS = dict.fromkeys(("out", "template", "answer_key", "id_key"))
"""The options of a method in a checkpoint, and those of answers, with their usual values."""


def run(args: argparse.Namespace) -> None:
    _known(args.what)
    for name, usual in (CHECKPOINT if args.what in JUDGES else ANSWERS).items():
        if getattr(args, name) != usual:
            raise VlmFixError(f"--{name.replace('_', '-')} has no effect on export {args.what}: leave it out.")
    if args.what not in JUDGES:
        check_place(args.path, folder=True)
        from vlm_fix.eval.export import export

        made = export(args.what, args.path, args.model, args.dtype, args.device, args.calibration)
        print(f"{made['model']} with {args.what} ({made['dtype']}) written to {args.path}")
        return
    if args.out is None:
        raise VlmFixError(f"export {args.what} needs --out FILE, where to write.")
    check_place(args.out)
    from vlm_fix.eval.scorers import judges
    from vlm_fix.eval.scorers.answers import Keys

    told = functools.partial(print, file=sys.stderr)
    judges.export(args.what, args.path, args.out, args.template, Keys(args.answer_key, args.id_key), told)
    print(args.out)

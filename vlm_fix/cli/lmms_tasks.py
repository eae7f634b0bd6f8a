"""vlm-fix lmms-tasks: the folder of tasks for lmms-eval's --include_path."""

from __future__ import annotations

import argparse
from typing import Any

from vlm_fix.errors import VlmFixError

from .common import add, add_images, check_place

EXAMPLES = """examples:
  lmms-eval --model vlm_fix_llava_hf --model_args "pretrained=llava-hf/llava-1.5-7b-hf,method=pai:alpha=0.2;gamma=1.1" \\
    --tasks pope_official --include_path $(vlm-fix lmms-tasks)
  vlm-fix lmms-tasks --out tasks --data picto:shift --limit 100     # tasks pope_picto, pope_picto_random, ...
  lmms-eval --model vlm_fix_llava_hf --model_args pretrained=picto-llava,method=var+vcd,dtype=float32 --device cpu \\
    --tasks pope_picto --include_path tasks

models: vlm_fix_llava_hf, vlm_fix_qwen2_5_vl, vlm_fix_qwen3_vl; in method, + stacks and ; stands for a comma."""


def add_to(commands: Any) -> None:
    parser = add(commands, "lmms-tasks", "print the folder of tasks for lmms-eval's --include_path", run, EXAMPLES)
    parser.add_argument("--out", metavar="DIR", help="first write tasks there, over --data")
    parser.add_argument("--data", metavar="DATA", help="picto:SPLIT or coco:DIR (picto:shift)")
    add_images(parser)
    parser.add_argument("--seed", type=int, metavar="S", help="of the data (0)")


def run(args: argparse.Namespace) -> None:
    if args.out:
        check_place(args.out, folder=True)
    for name in ("data", "ids", "limit", "seed"):
        if not args.out and getattr(args, name) is not None:
            raise VlmFixError(f"--{name} has no effect: it is for the tasks that --out DIR writes; add that.")
    if args.ids and not (args.data or "").startswith("coco:"):
        raise VlmFixError("--ids has no effect: it is for --data coco:DIR.")
    from vlm_fix.eval.harness import lmms

    if args.out:
        from vlm_fix.eval.settings import Settings

        settings = Settings(
            "pope", data=args.data or "picto:shift", ids=args.ids, limit=args.limit, seed=args.seed or 0
        )
        print(lmms.write_tasks(args.out, settings))
    else:
        print(lmms.TASKS)

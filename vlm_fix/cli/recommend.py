"""vlm-fix recommend: which method, at which strength, for a model and its data."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError

from .common import add, add_json, add_model, add_weights, check_place, finite

ABOUT = """Tries every method that the model's family serves, at several strengths, and stacks of the best, on half of the images;
then measures the two best once on the other half. The answer is "better by x [a, b]", or "nothing here beats your model".

  vlm-fix recommend --budget 30m                                    bundled model and data: runs anywhere, on a CPU
  vlm-fix recommend --model llava-hf/llava-1.5-7b-hf --data coco:/data/coco --budget 3h --max-slowdown 1.3
  vlm-fix recommend --model my/model --data questions.jsonl,objects.jsonl --objective questions
  vlm-fix eval all --method @vlm-fix.yaml           in Python: wrap(model, "vlm-fix.yaml")
  vlm-fix serve my/model --method @vlm-fix.yaml

FILE of --data has rows with image (a path) and question and label (yes or no), or image and objects (COCO's names), of which a
caption is asked. Beside OUT.yaml come OUT.html, OUT.json and OUT.steps.jsonl, with which --resume continues. docs/recommend.md
says how chance is kept out, and how many images it takes."""


def add_to(commands: Any) -> None:
    parser = add(commands, "recommend", "find the best method for a model and its data, and prove it", run, ABOUT)
    add_model(parser)
    parser.add_argument(
        "--data", default="picto:shift", metavar="DATA", help="picto:SPLIT, coco:DIR or FILE,FILE (%(default)s)"
    )
    parser.add_argument("--budget", default="30m", metavar="TIME", help="for all of it: 30m, 3h (%(default)s)")
    parser.add_argument(
        "--objective",
        choices=("hallucination", "captions", "questions"),
        default="hallucination",
        help="CHAIR_i and balanced accuracy, or one of them (%(default)s)",
    )
    limits = parser.add_argument_group("what it may cost; none: anything")
    limits.add_argument("--min-recall", type=_limit, default=-1.0, metavar="P", help="points of caption recall (-1)")
    limits.add_argument("--max-length", type=_limit, default=25.0, metavar="P", help="percent of caption length (25)")
    limits.add_argument("--max-yes", type=_limit, default=10.0, metavar="P", help="points of the yes-ratio (10)")
    limits.add_argument("--max-slowdown", type=_limit, default=2.5, metavar="X", help="times as slow (2.5)")
    how = parser.add_argument_group("how")
    how.add_argument("--method", default="", metavar="A,B+C", help="try only these, beside the controls (all)")
    how.add_argument("--calibration", action="append", metavar="FILE", help="of vlm-fix calibrate; may be repeated")
    how.add_argument("--limit", type=int, metavar="N", help="number of images (600; all of your own)")
    how.add_argument("--seed", type=int, default=0, metavar="S", help="of data and of the split in two (%(default)s)")
    how.add_argument("--batch-size", type=int, default=16, metavar="B", help="samples per batch (%(default)s)")
    how.add_argument("--max-new-tokens", type=int, metavar="N", help="longest caption (512)")
    how.add_argument("--engine", choices=("hf", "vllm"), default="hf", help="generate, or vLLM (%(default)s)")
    how.add_argument("--device-map", choices=("auto", "balanced", "sequential"), help="spread the model over all GPUs")
    add_weights(how)
    parser.add_argument("--out", default="vlm-fix.yaml", metavar="FILE", help="the recommendation (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted search of --out")
    add_json(parser, "print OUT.json")


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    check_place(args.out)
    from vlm_fix.eval.recommend.api import recommend, seconds_of
    from vlm_fix.eval.recommend.live import Live
    from vlm_fix.eval.recommend.objective import Limits
    from vlm_fix.eval.recommend.page import failures
    from vlm_fix.eval.run.loading import load_model, load_served
    from vlm_fix.registry import parse, split_methods

    for name, least in (("limit", 1), ("batch_size", 1), ("max_new_tokens", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise VlmFixError(f"--{name.replace('_', '-')} is {value}: give a whole number of at least {least}.")
    names = [field.name for field in dataclasses.fields(Limits)]
    limits = Limits(**{name: getattr(args, name) for name in names})
    total = seconds_of(args.budget)
    for stack in split_methods(args.method):  # before minutes of loading
        parse(list(stack))
    load: Any = load_served if args.engine == "vllm" else load_model
    model, processor, identity = load(args.model, args.dtype, args.device, args.device_map)
    try:
        with Live(total) as live:
            made = recommend(
                model,
                processor,
                args.data,
                args.budget,
                args.objective,
                limits,
                args.method,
                tuple(args.calibration or ()),
                args.limit,
                args.seed,
                args.batch_size,
                args.max_new_tokens,
                args.out,
                args.resume,
                identity,
                shlex.join(["vlm-fix", *(word for word in args.argv if word != "--resume")]),
                started,
                live.show,
            )
    except KeyboardInterrupt:
        print(f"stopped; continue with the same command and --resume (--out {args.out})", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(made.report, indent=2))
        return 0
    print(made.verdict)
    for sentence in failures(made.report):
        print(f"note: {sentence}", file=sys.stderr)
    places = ", ".join(str(Path(args.out).with_suffix(end)) for end in (".yaml", ".html", ".json"))
    print(f"written to {places}")
    if made.better:
        print(f'use it: vlm_fix.wrap(model, "{args.out}"), or --method @{args.out}')
    return 0


def _limit(text: str) -> float | None:
    try:
        return None if text.lower() == "none" else finite(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or none to switch the limit off") from None

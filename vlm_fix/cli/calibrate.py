"""vlm-fix calibrate: find a method's settings for a model on labelled questions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import add, add_json, add_model, add_weights, check_place, written

ABOUT = """METHOD is a name from `vlm-fix methods`, optionally with settings: iri, iri:noise=5. The method
first finds its own parameters; --search then tries values of any setting. FILE is read by
wrap(model, METHOD, calibration=FILE), by `vlm-fix eval --calibration FILE`, and, as calibration/METHOD.json in the
folder of a checkpoint, without being named.
Methods that compare a truthful with a hallucinated caption (nullu, vti) take Picto's, or --pairs: JSONL with image
(a file name in the folder of coco:DIR), value and h_value, as VTI and LURE publish theirs.

examples:
  vlm-fix calibrate iri --out iri.json
  vlm-fix calibrate zerotuning --limit 200
  vlm-fix calibrate pai --search "alpha=0.1|0.2|0.5" --search "layers=2-|3-" --data coco:/data/train2014
  vlm-fix eval pope --method iri --calibration iri.json"""


def add_to(commands: Any) -> None:
    parser = add(commands, "calibrate", "find a method's settings for a model on labelled questions", run, ABOUT)
    parser.add_argument("method", metavar="METHOD", help="see below")
    add_model(parser)
    parser.add_argument("--data", default="picto:train", metavar="DATA", help="picto:SPLIT or coco:DIR (%(default)s)")
    parser.add_argument(
        "--limit", type=int, default=300, metavar="N", help="questions to find with, and to score (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of data and noise (%(default)s)")
    parser.add_argument(
        "--search", action="append", default=[], metavar="NAME=A|B", help="values to try; repeat for combinations"
    )
    parser.add_argument(
        "--pairs",
        metavar="FILE",
        help="of captions, for methods that calibrate on them (made up for picto): JSONL, see below",
    )
    parser.add_argument("--out", metavar="FILE", help="where to write (METHOD.json)")
    add_weights(parser)
    add_json(parser, "print the file instead of a table")


def run(args: argparse.Namespace) -> None:
    out = Path(place := args.out or f"{args.method.partition(':')[0]}.json")
    check_place(place)
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from vlm_fix.eval.calibrate import calibrate, parse_search

    search, stderr = parse_search(args.search), Console(stderr=True)
    columns = TextColumn("{task.description:<20}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal) as bar:
        job = bar.add_task("", total=1.0)

        def progress(label: str, share: float) -> None:
            bar.update(job, description=label, completed=share)

        result = calibrate(
            args.method,
            args.model,
            args.data,
            args.limit,
            args.seed,
            search,
            args.dtype,
            args.device,
            progress,
            pairs=args.pairs,
        )
    made = result.calibration
    made.write(out)
    if args.json:
        print(out.read_text(), end="")
        return
    for options, accuracy in result.tried:
        tried = ",".join(f"{k}={v}" for k, v in options.items()) or "the model alone"
        print(f"{tried:<40} {accuracy:.3f} right")
    for name, value in made.found.items():
        print(f"{made.method}: {name} = {written(value)}")
    score = made.score
    print(
        f"held-out accuracy {score['accuracy_before']:.3f} -> {score['accuracy_after']:.3f} on {score['questions']} "
        f"questions ({score['mended']} mended, {score['broken']} broken, McNemar p {score['mcnemar_p']:.2g}), "
        f"yes-ratio {score['yes_ratio_before']:.3f} -> {score['yes_ratio_after']:.3f}, "
        f"log-probability of the right answer {score['sureness_before']:.4f} -> {score['sureness_after']:.4f}"
    )
    if result.tried:
        print(
            "searched on yes/no questions alone: look at captions too (vlm-fix eval chair --calibration) before using it"
        )
    print(f"written to {out}")

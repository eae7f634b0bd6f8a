"""vlm-fix picto: render or train the bundled world."""

from __future__ import annotations

import argparse
from typing import Any

from vlm_fix.errors import VlmFixError

from .common import add, add_json, add_model, add_weights, check_place, console, table

EXAMPLES = """examples:
  vlm-fix picto render picto-shift --scenes 500 --split shift --seed 0
  vlm-fix picto refer --model picto-smol --scenes 50 --method control_mllm
  vlm-fix picto train --seed 0 --out my-picto
  vlm-fix picto train --look crowded+large --out my-large-picto
  vlm-fix picto train --language smol --seed 0 --out my-smol"""


def add_to(commands: Any) -> None:
    jobs = add(commands, "picto", "render or train the bundled world", epilog=EXAMPLES).add_subparsers(
        metavar="JOB", required=True
    )
    render = add(jobs, "render", "write scenes as a COCO-format folder", _render)
    render.add_argument("out", metavar="OUT")
    render.add_argument("--scenes", type=int, default=500, metavar="N", help="(%(default)s)")
    render.add_argument(
        "--split",
        default="test",
        metavar="SPLIT",
        help="train, test, shift or style, a look behind it, as in shift+crowded+small+large (%(default)s)",
    )
    render.add_argument("--seed", type=int, default=0, metavar="S", help="(%(default)s)")
    refer = add(jobs, "refer", "which of two objects is in this box? no control, a crop, and methods", _refer)
    refer.add_argument("--method", default="control_mllm", metavar="A,B", help="methods that take a box (%(default)s)")
    refer.add_argument("--scenes", type=int, default=50, metavar="N", help="two questions each (%(default)s)")
    refer.add_argument("--split", default="test", metavar="SPLIT", help="(%(default)s)")
    refer.add_argument("--seed", type=int, default=0, metavar="S", help="(%(default)s)")
    add_model(refer)
    add_weights(refer)
    add_json(refer)
    train = jobs.add_parser(
        "train", help="train picto-llava or picto-smol again (vlm-fix picto train --help)", add_help=False
    )
    train.set_defaults(run=_train, rest=[])


def _render(args: argparse.Namespace) -> None:
    check_place(args.out, folder=True)
    from vlm_fix.eval import picto

    if args.scenes < 1:
        raise VlmFixError(f"--scenes is {args.scenes}: give a whole number of at least 1.")
    print(picto.render(args.out, scenes=args.scenes, split=args.split, seed=args.seed))


def _refer(args: argparse.Namespace) -> None:
    import json

    from rich.console import Console
    from rich.progress import Progress

    from vlm_fix.eval.picto import referring
    from vlm_fix.eval.run.loading import load_model
    from vlm_fix.registry import split_methods

    if args.scenes < 1:
        raise VlmFixError(f"--scenes is {args.scenes}: give a whole number of at least 1.")
    specs = ["+".join(stack) for stack in split_methods(args.method)]
    asked = referring.questions(args.scenes, args.split, args.seed)
    model, processor, _ = load_model(args.model, args.dtype, args.device)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("pointing", total=len(asked) * (2 + len(specs)))
        rows = referring.measure(model, processor, asked, specs, lambda: progress.advance(task))
    found = referring.accuracies(rows, args.seed)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    shown = table("way", "questions", "accuracy", "against none", "against the crop")
    for row in found:
        deltas = [f"{d['delta']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" for d in (row["none"], row["crop"])]
        shown.add_row(row["way"], str(row["n"]), f"{row['accuracy']:.3f}", *deltas)
    console().print(shown)


def _train(args: argparse.Namespace) -> None:
    """Hand the arguments to the training of the model that --language names."""
    which = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which.add_argument("--language", choices=("picto", "smol"), default="picto")
    known, rest = which.parse_known_args(args.rest)
    if known.language == "smol":
        from vlm_fix.eval.picto.train_smol import main as train
    else:
        from vlm_fix.eval.picto.train import main as train
    train(rest)

"""vlm-fix describe: one image's caption under several methods, its objects coloured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_fix.errors import VlmFixError

from .common import add, add_json, add_model, add_weights, check_count, console

if TYPE_CHECKING:
    from vlm_fix.eval.picture import Answer, Shown

ABOUT = """IMAGE is a file, or one of the examples in the package: scene:0 to scene:11 (drawn) and coco:519208 and so on
(photographs); without it, scene:0. Objects that are in the image are green, objects that are not are red, both as CHAIR reads
them. That takes the truth: it is known of the examples, of files called as in COCO (COCO_val2014_000000000042.jpg), and of
any other image that --objects describes. Without it, objects that not every caption names are yellow.

examples:
  vlm-fix describe --method vcd,pai
  vlm-fix describe photo.jpg --model llava-hf/llava-1.5-7b-hf --method vcd,pai:alpha=0.5+vhr
  vlm-fix describe photo.jpg --objects "dog,sports ball" --method my_method.py:Boost
  vlm-fix describe scene:2 --prompt "Is there a dog in the image?" """
COLOURS = {True: "bold green", False: "bold red", None: "yellow"}


def add_to(commands: Any) -> None:
    parser = add(commands, "describe", "caption one image with and without methods, in colour", run, ABOUT)
    parser.add_argument("image", nargs="?", default="scene:0", metavar="IMAGE", help="file or example (%(default)s)")
    parser.add_argument("--method", default="", metavar="A,B+C", help="runs beside the baseline; + stacks methods")
    add_model(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="what is asked (to describe the image)")
    parser.add_argument("--objects", metavar="A,B", help="the COCO objects that are in the image")
    parser.add_argument("--calibration", action="append", metavar="FILE", help="of vlm-fix calibrate; may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (%(default)s)")
    add_weights(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    check_count("--max-new-tokens", args.max_new_tokens)
    if not args.image.startswith(("scene:", "coco:")) and not Path(args.image).is_file():
        raise VlmFixError(f"there is no image {args.image}: give a file, or an example such as scene:0.")
    from vlm_fix.eval import picture
    from vlm_fix.registry import parse, split_methods

    stacks = split_methods(args.method)
    for stack in stacks:
        parse(stack)
    shown = _find(args.image, args.objects)
    answers = picture.ask(
        shown.image,
        args.prompt,
        [["baseline"], *(stack for stack in stacks if stack != ["baseline"])],
        args.model,
        args.dtype,
        args.device,
        args.max_new_tokens,
        args.calibration or (),
    )
    if args.json:
        rows = [{**answer._asdict(), "objects": answer.objects(shown.truth)} for answer in answers]
        print(
            json.dumps(
                {"image": args.image, "truth": None if shown.truth is None else sorted(shown.truth), "answers": rows},
                indent=2,
            )
        )
    elif shown.truth is None:
        made = list(answers)
        _show(made, None, _common(made))
    else:
        _show(answers, shown.truth, ())


def _find(name: str, objects: str | None) -> Shown:
    from vlm_fix.eval import picture

    if not name.startswith("coco:"):
        return picture.find(name, objects)
    from vlm_fix.demo import examples

    example = examples.find(name)
    return picture.Shown(example.image, example.truth if objects is None else picture.objects_of(objects))


def _common(answers: Sequence[Answer]) -> frozenset[str]:
    """The objects that every answer names."""
    named = [frozenset(name for _, _, name, _ in answer.marks(None)) for answer in answers]
    return frozenset.intersection(*named)


def _show(answers: Any, truth: Collection[str] | None, common: Collection[str]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    screen, any_marked = console(), False
    for answer in answers:
        text = Text(answer.text)
        marks = [mark for mark in answer.marks(truth) if truth is not None or mark[2] not in common]
        for start, end, _, right in marks:
            text.stylize(COLOURS[right], start, end)
        any_marked |= bool(marks)
        missing = list(dict.fromkeys(name for _, _, name, right in marks if right is False))
        screen.print(f"\n[bold]{answer.method}[/bold]  [dim]{answer.tokens} tokens, {answer.seconds:.1f} s[/dim]")
        screen.print(Padding(text, (0, 0, 0, 2)))
        if missing:
            screen.print(Padding(Text("not in the image: " + ", ".join(missing), style="red"), (0, 0, 0, 2)))
        for note in answer.notes:
            screen.print(Padding(Text(note, style="dim"), (0, 0, 0, 2)))
    if truth is not None and any_marked:
        screen.print("\n[green]Green[/green] is in the image, [red]red[/red] is not.", style="dim")
    elif truth is None:
        told = "Yellow: not every caption names it. " if any_marked else ""
        screen.print(f"\n{told}What is in this image is not known here: --objects says it.", style="dim")

"""vlm-fix point: ask about a region of a picture."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError

from .common import add, add_model, add_new_tokens, add_weights, check_count

EXAMPLES = """examples:
  vlm-fix point photo.jpg "What is this?" --box 120,40,260,210 --model llava-hf/llava-1.5-7b-hf
  vlm-fix point photo.jpg "What is this?" --point 190,125
  vlm-fix point photo.jpg "What is this?" --mask mask.png --method control_mllm:version=1"""


def add_to(commands: Any) -> None:
    parser = add(commands, "point", "ask about a region of a picture, with ControlMLLM", run, EXAMPLES)
    parser.add_argument("image", metavar="IMAGE", help="a picture")
    parser.add_argument("question", metavar="QUESTION", help="what is asked")
    region = parser.add_mutually_exclusive_group(required=True)
    region.add_argument("--box", metavar="X,Y,X,Y", help="left, top, right, bottom, in the picture's pixels")
    region.add_argument("--point", metavar="X,Y", help="in pixels")
    region.add_argument("--scribble", metavar="X,Y,...", help="its points, in pixels")
    region.add_argument("--mask", metavar="FILE", help="a picture of the same size whose bright pixels are the region")
    parser.add_argument("--method", default="control_mllm", metavar="SPEC", help="its settings (%(default)s)")
    add_new_tokens(parser, 60, "most tokens of an answer")
    add_model(parser)
    add_weights(parser)


def run(args: argparse.Namespace) -> None:
    check_count("--new-tokens", args.new_tokens)
    for file in filter(None, (args.image, args.mask)):
        if not Path(file).is_file():
            raise VlmFixError(f"there is no picture {file!r}: give an image file.")
    import vlm_fix
    from vlm_fix.eval.prompts import encode
    from vlm_fix.eval.run.loading import load_model
    from vlm_fix.images import read_image
    from vlm_fix.methods.procedures.regions import shares
    from vlm_fix.registry import parse

    picture, at = read_image(args.image), list[float]()
    name = next(n for n in ("box", "point", "scribble", "mask") if getattr(args, n) is not None)
    if name == "mask":
        bright = read_image(args.mask, upright=False, mode="L").point(lambda value: 255 * (value > 127))
        if bright.getbbox() is None:
            raise VlmFixError(
                f"--mask {args.mask} has no bright pixel, so there is no region: make what you mean white."
            )
    else:
        at = numbers(getattr(args, name), name, (picture.width, picture.height))
    stack = parse(args.method)
    model, processor, _ = load_model(args.model, args.dtype, args.device)
    if name == "mask":
        region = {"mask": args.mask}
    else:
        region = {name: tuple(round(share, 5) for share in shares(at, picture.size, processor.image_processor))}
    inputs = dict(encode(model, processor, [picture], [args.question]))
    how = {"max_new_tokens": args.new_tokens, "do_sample": False}
    last = next((m for m in reversed(stack) if {*region} <= vars(m).keys()), stack[-1])
    pointing = [m.also(region) if m is last else m for m in stack]
    for label, methods in (("whole picture", "baseline"), ("region", pointing)):
        with vlm_fix.wrapped(model, methods):
            said = model.generate(**inputs, **how)[0, inputs["input_ids"].shape[1] :]
        print(f"{label}: {processor.tokenizer.decode(said, skip_special_tokens=True).strip()}")


def numbers(text: str, name: str, size: tuple[int, int]) -> list[float]:
    """The coordinates in "X,Y,...", which lie in a picture of this width and height."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not all(map(math.isfinite, found)):
        found = []
    if not found or len(found) % 2 or (name == "box" and len(found) != 4) or (name == "point" and len(found) != 2):
        raise VlmFixError(f"--{name} {text!r} is not of the form {'10,20,60,80' if name == 'box' else '10,20'}.")
    if not all(0 <= value <= size[i % 2] for i, value in enumerate(found)):
        raise VlmFixError(f"--{name} {text!r} lies outside the picture, which has {size[0]} x {size[1]} pixels.")
    if name == "box" and not (found[0] < found[2] and found[1] < found[3]):
        raise VlmFixError(f"--box {text!r} holds nothing: give left, top, right and bottom, in this order.")
    return found

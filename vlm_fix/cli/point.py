"""vlm-fix point: ask about a region of a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError

from .common import add, add_model, add_weights

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
    parser.add_argument("--new-tokens", type=int, default=60, metavar="N", help="(%(default)s)")
    add_model(parser)
    add_weights(parser)


def run(args: argparse.Namespace) -> None:
    for file in filter(None, (args.image, args.mask)):
        if not Path(file).is_file():
            raise VlmFixError(f"there is no picture {file!r}: give an image file.")
    import vlm_fix
    from vlm_fix.eval.run.loading import load_model
    from vlm_fix.images import read_image
    from vlm_fix.methods.procedures.regions import shares
    from vlm_fix.registry import parse

    picture = read_image(args.image)
    model, processor, _ = load_model(args.model, args.dtype, args.device)
    if args.mask:
        region = {"mask": args.mask}
    else:
        name = next(n for n in ("box", "point", "scribble") if getattr(args, n))
        given = shares(numbers(getattr(args, name), name), picture.size, processor.image_processor)
        region = {name: tuple(round(share, 5) for share in given)}
    words = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": args.question}]}]
    text = processor.apply_chat_template(words, add_generation_prompt=True)
    inputs = dict(processor(images=picture, text=text, return_tensors="pt").to(model.device, model.dtype))
    how = {"max_new_tokens": args.new_tokens, "do_sample": False}
    stack = parse(args.method)
    last = next((m for m in reversed(stack) if {*region} <= vars(m).keys()), stack[-1])
    pointing = [m.also(region) if m is last else m for m in stack]
    for label, methods in (("whole picture", "baseline"), ("region", pointing)):
        with vlm_fix.wrapped(model, methods):
            said = model.generate(**inputs, **how)[0, inputs["input_ids"].shape[1] :]
        print(f"{label}: {processor.tokenizer.decode(said, skip_special_tokens=True).strip()}")


def numbers(text: str, name: str) -> list[float]:
    """The coordinates in "X,Y,..."."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or len(found) % 2 or (name == "box" and len(found) != 4) or (name == "point" and len(found) != 2):
        raise VlmFixError(f"--{name} {text!r} is not of the form {'10,20,60,80' if name == 'box' else '10,20'}.")
    return found

"""vlm-fix inspect: look into a model while it answers, and write one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.whole import whole_file

from .common import add, add_model, add_new_tokens, add_weights, check_count, check_place, finite

EXAMPLES = """examples:
  vlm-fix inspect photo.jpg "Is there a dog in the image?"
  vlm-fix inspect photo.jpg "Describe the image." --answer "A dog on a sofa." --causal dog --out page.html
  vlm-fix inspect photo.jpg "Describe the image." --method pai --out page.html"""


def add_to(commands: Any) -> None:
    parser = add(commands, "inspect", "look into a model while it answers: one HTML page", run, EXAMPLES)
    parser.add_argument("image", metavar="IMAGE", help="a picture")
    parser.add_argument("prompt", metavar="PROMPT", help="what the model is asked")
    parser.add_argument("--out", default="inspect.html", metavar="FILE", help="the page (%(default)s)")
    parser.add_argument("--method", metavar="SPEC", help="a method on the model")
    parser.add_argument("--answer", metavar="TEXT", help="an answer to look at, instead of the model's own (greedy)")
    add_new_tokens(parser, 40, "most tokens of its own")
    parser.add_argument(
        "--causal", metavar="WORD", help="also the causal map of the first token of this word of the answer"
    )
    parser.add_argument(
        "--noise", type=finite, default=3.0, metavar="X", help="of the causal map's image, in deviations (%(default)s)"
    )
    parser.add_argument("--no-saliency", action="store_true", help="leave out what needs a backward pass")
    add_model(parser)
    add_weights(parser)


def run(args: argparse.Namespace) -> None:
    check_count("--new-tokens", args.new_tokens)
    check_place(args.out)
    if not Path(args.image).is_file():
        raise VlmFixError(f"there is no picture {args.image!r}: give an image file.")
    from rich.console import Console
    from rich.progress import Progress

    import vlm_fix
    from vlm_fix.eval.prompts import encode
    from vlm_fix.eval.run.loading import load_model
    from vlm_fix.families import arch_of, visual_cells
    from vlm_fix.images import read_image
    from vlm_fix.observation.page import page
    from vlm_fix.registry import parse

    picture, spec = read_image(args.image), args.method or "baseline"
    parse([spec])
    model, processor, _ = load_model(args.model, args.dtype, args.device)
    inputs = dict(encode(model, processor, [picture], [args.prompt]))
    tokenizer, start = processor.tokenizer, inputs["input_ids"].shape[1]
    with vlm_fix.wrapped(model, spec), Progress(console=Console(stderr=True), transient=True) as progress:
        if args.answer is None:
            said = model.generate(**inputs, max_new_tokens=args.new_tokens, do_sample=False)[0, start:].tolist()
        else:
            blank = "" if args.answer[:1].isspace() else " "
            said = tokenizer(blank + args.answer, add_special_tokens=False)["input_ids"]
        ends = model.generation_config.eos_token_id
        said = [token for token in said if token not in (ends if isinstance(ends, list) else [ends])]
        task = progress.add_task("looking", total=1.0)
        found = vlm_fix.inspect(
            model,
            inputs,
            said,
            saliency=not args.no_saliency,
            causal=None if args.causal is None else place_of(args.causal, tokenizer, said),
            noise=args.noise,
            progress=lambda what, share: progress.update(task, description=what, completed=share),
        )
    names = {int(i): tokenizer.decode([int(i)]) for i in {*found.ids.tolist(), *found.lens_tokens.flatten().tolist()}}
    shown = [names[i] for i in found.ids.tolist()]
    title = f"{args.model}: {Path(args.image).name}" + (f", {spec}" if args.method else "")
    cells = visual_cells(model, arch_of(model).family, inputs)
    text = page(found, shown, names, cells, [picture] * len(cells), title, args.prompt)
    with whole_file(args.out) as part:
        part.write_text(text, encoding="utf-8")
    print(f"{args.out}: {tokenizer.decode(said).strip()}")


def place_of(word: str, tokenizer: Any, said: list[int]) -> int:
    """The answer's token with which `word` begins."""
    for t in range(len(said)):
        before, text = tokenizer.decode(said[:t]), tokenizer.decode(said)
        if text[len(before) :].strip().startswith(word):
            return t
    raise VlmFixError(
        f"the answer does not hold {word!r}, so there is no token to trace: it is {tokenizer.decode(said)!r}."
    )

"""vlm-fix bench: time methods against the unwrapped model, on random weights."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError

from .common import DTYPES, add, add_json, check_figure, check_place, console

Timed = tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]
"""Results, and what makes their table."""


SHAPED = ("attention", "decode", "prune", "scaling", "peers")  # on random weights of a shape
LOADED = ("draft", "serve")  # on a model by name
OPTIONS: dict[str, tuple[tuple[str, ...], Any]] = {  # what they are for, and their defaults
    "shape": (SHAPED, "small"),
    "model": (LOADED, "picto-llava"),
    "device": ((*SHAPED, "draft"), "auto"),
    "dtype": ((*SHAPED, "draft"), "auto"),
    "seed": (SHAPED, 0),
    "keep": (("prune",), "192,64"),
    "sizes": (("scaling",), None),
    "figure": (("scaling",), None),
    "concurrent": (("serve",), "1,8,32"),
    "questions": (("serve",), 1),
}


def add_to(commands: Any) -> None:
    parser = add(commands, "bench", "time methods against the unwrapped model, on random weights", run)
    parser.add_argument(
        "kind",
        choices=(*SHAPED, *LOADED),
        help="which methods; peers: beside other people's code",
    )

    def option(name: str, text: str, **how: Any) -> None:
        kinds, default = OPTIONS[name]
        only = {SHAPED: "random weights: ", (*SHAPED, "draft"): ""}.get(kinds, f"{' and '.join(kinds)} only: ")
        parser.add_argument(f"--{name}", help=only + text + (f" ({default})" if default is not None else ""), **how)

    option("shape", "small, small-qwen, llava-1.5-7b or qwen2.5-vl-7b", metavar="S")
    option("model", "folder or name", metavar="NAME")
    parser.add_argument("--method", default="", metavar="A,B+C", help="only these (all of the kind)")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="tokens to time (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="scaling: 0 for memory alone (%(default)s)")
    option("keep", "visual tokens kept", metavar="N,M")
    option("sizes", "such as visual=64|576,layers=1|8,batch=1|4,answer=8|128 (all four)", metavar="S")
    option("figure", "also draw it, as .svg, .png or .pdf", metavar="FILE")
    option("concurrent", "requests in flight", metavar="N,M")
    option("questions", "different questions that are asked in turn", type=int, metavar="N")
    option("device", "auto, cpu or cuda", metavar="DEV")
    option("dtype", "of the weights", choices=DTYPES)
    option("seed", "of the weights and the prompt", type=int, metavar="S")
    parser.add_argument("--output", metavar="FILE", help="also write the figures as JSON")
    add_json(parser, "print the JSON instead of the table")


def run(args: argparse.Namespace) -> None:
    for name, (kinds, default) in OPTIONS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.kind not in kinds:
            used = " or ".join(f"bench {kind}" for kind in kinds)
            raise VlmFixError(f"--{name} has no effect on bench {args.kind}: it is for {used}; leave it out.")
    for file in (args.output, args.figure):
        if file:
            check_place(file)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silence the banner of torch's profiler
    from vlm_fix.eval import bench

    timed = {"serve": _serve, "scaling": _scaling, "draft": _draft, "peers": _peers}.get(args.kind, _methods)
    results, table = timed(args)
    if args.output:
        bench.write(results, Path(args.output))
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        console().print(table(results))


def _stacks(args: argparse.Namespace, default: str = "") -> list[str]:
    """--method, a stack each."""
    from vlm_fix.registry import split_methods

    return ["+".join(stack) for stack in split_methods(args.method or default)]


def _methods(args: argparse.Namespace) -> Timed:
    """The methods of a kind beside the unwrapped model."""
    from vlm_fix.eval import bench

    try:
        keep = tuple(float(part) for part in args.keep.split(","))
        if not all(0 < part < math.inf for part in keep):  # nan is neither
            raise ValueError
    except ValueError:
        raise VlmFixError(f"--keep {args.keep!r} is not a list of counts or shares such as 192,64.") from None
    how = {"device": args.device, "dtype": args.dtype, "new_tokens": args.new_tokens, "rounds": args.rounds}
    with ticking(f"bench {args.kind}") as tick:
        results = bench.run(args.kind, args.shape, _stacks(args), keep=keep, seed=args.seed, tick=tick, **how)
    return results, bench.table


@contextlib.contextmanager
def ticking(what: str, every: float = 10) -> Iterator[Callable[[int], None]]:
    """What to call with the number of steps when one is done: a bar in a terminal, elsewhere a line every few seconds."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(what, total=None)
            yield lambda total: progress.update(task, total=total, advance=1)
        return
    done, told = 0, time.monotonic()

    def tick(total: int) -> None:
        nonlocal done, told
        done += 1
        if time.monotonic() - told >= every:
            told = time.monotonic()
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    yield tick


def _scaling(args: argparse.Namespace) -> Timed:
    """How the cost of methods grows with the sizes of a prompt."""
    from vlm_fix.eval.bench import scaling
    from vlm_fix.registry import parse

    specs = _stacks(args, "pai,vcd,hiprune:keep=32")
    for spec in specs:
        parse(spec)
    sizes = _sizes(args.sizes, scaling.SIZES) if args.sizes else None
    if args.figure:
        check_figure("figure", args.figure)
    with ticking("bench scaling") as tick:
        results = scaling.run(specs, args.shape, sizes=sizes, tick=tick, **_timed(args))
    if args.figure:
        scaling.figure(results, Path(args.figure))
    return results, scaling.table


def _peers(args: argparse.Namespace) -> Timed:
    """Methods beside other people's code."""
    from vlm_fix.eval.bench import peers

    names = [name for name in args.method.split(",") if name]
    with ticking("bench peers") as tick:
        results = peers.run(names, args.shape, tick=tick, **_timed(args))
    return results, peers.table


def _timed(args: argparse.Namespace) -> dict[str, Any]:
    """Device and data type that --device and --dtype ask for, and what else all kinds on random weights take."""
    import torch

    from vlm_fix.eval.run.loading import check_device

    check_device(args.device)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = auto if args.device == "auto" else args.device
    dtype = "bfloat16" if device.startswith("cuda") else "float32"
    dtype = dtype if args.dtype == "auto" else args.dtype
    return {"device": device, "dtype": dtype, "new_tokens": args.new_tokens, "rounds": args.rounds, "seed": args.seed}


def _sizes(text: str, known: Any) -> dict[str, list[int]]:
    """visual=64|576,batch=1|4 as numbers."""
    try:
        made = {
            name: [int(n) for n in values.split("|")] for name, _, values in (p.partition("=") for p in text.split(","))
        }
    except ValueError:
        made = {"": [0]}
    if not made.keys() <= {*known} or min(n for values in made.values() for n in values) < 1:
        raise VlmFixError(
            f"--sizes {text!r} is not a list such as visual=64|576,batch=1|4; sizes are {', '.join(known)}."
        )
    return made


def _serve(args: argparse.Namespace) -> Timed:
    """Methods inside vLLM."""
    if args.questions < 1:
        raise VlmFixError(f"--questions {args.questions}: at least one is asked.")
    try:
        concurrent = [int(part) for part in args.concurrent.split(",")]
    except ValueError:
        concurrent = [0]
    if min(concurrent) < 1:
        raise VlmFixError(f"--concurrent {args.concurrent!r} is not a list of numbers of requests such as 1,8,32.")
    from vlm_fix.eval.bench.clock import enough

    enough(args.new_tokens, args.rounds)
    if importlib.util.find_spec("vllm") is None:
        raise VlmFixError("vLLM is not installed: pip install 'vlm-fix[vllm]'.")
    from vlm_fix.eval.bench import serving

    with ticking("bench serve") as tick:
        results = serving.run(_stacks(args), args.model, args.new_tokens, args.rounds, tick, concurrent, args.questions)
    return results, serving.table


def _draft(args: argparse.Namespace) -> Timed:
    """A model that drafts for itself."""
    from vlm_fix.eval.bench import drafting

    with ticking("bench draft") as tick:
        results = drafting.run(_stacks(args), args.model, args.new_tokens, args.rounds, args.device, args.dtype, tick)
    return results, drafting.table

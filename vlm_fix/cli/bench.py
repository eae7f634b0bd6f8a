"""vlm-fix bench: time methods against the unwrapped model, on random weights."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError

from .common import DTYPES, add, add_json, check_place, console


def add_to(commands: Any) -> None:
    parser = add(commands, "bench", "time methods against the unwrapped model, on random weights", run)
    parser.add_argument(
        "kind",
        choices=("attention", "decode", "prune", "scaling", "peers", "draft", "serve"),
        help="which methods; peers: beside other people's code",
    )
    parser.add_argument("--shape", default="small", metavar="S", help="small, small-qwen, llava-1.5-7b, qwen2.5-vl-7b")
    parser.add_argument("--method", default="", metavar="A,B+C", help="only these (all of the kind)")
    parser.add_argument(
        "--model", default="picto-llava", metavar="NAME", help="draft and serve only: folder or name (%(default)s)"
    )
    parser.add_argument(
        "--concurrent", default="1,8,32", metavar="N,M", help="serve only: requests in flight (%(default)s)"
    )
    parser.add_argument(
        "--questions", type=int, metavar="N", help="serve only: different questions that are asked in turn (1)"
    )
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="tokens to time (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="scaling: 0 for memory alone (%(default)s)")
    parser.add_argument("--keep", metavar="N,M", help="visual tokens kept, prune only (192,64)")
    parser.add_argument(
        "--sizes", metavar="S", help="scaling only, such as visual=64|576,layers=1|8,batch=1|4,answer=8|128 (all four)"
    )
    parser.add_argument("--figure", metavar="FILE", help="scaling only: also draw it, as .svg, .png or .pdf")
    parser.add_argument("--device", default="auto", metavar="DEV", help="auto, cpu or cuda (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the weights and the prompt (%(default)s)")
    parser.add_argument("--output", metavar="FILE", help="also write the figures as JSON")
    add_json(parser, "print the JSON instead of the table")


def run(args: argparse.Namespace) -> None:
    if args.output:
        check_place(args.output)
    if args.keep and args.kind != "prune":
        raise VlmFixError(f"--keep has no effect on bench {args.kind}: it is for bench prune; leave it out.")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silence the banner of torch's profiler
    from vlm_fix.eval import bench
    from vlm_fix.registry import split_methods

    if args.questions is not None and args.kind != "serve":
        raise VlmFixError(f"--questions has no effect on bench {args.kind}: it is for bench serve; leave it out.")
    if args.questions is not None and args.questions < 1:
        raise VlmFixError(f"--questions {args.questions}: at least one is asked.")
    for option in ("sizes", "figure"):
        if getattr(args, option) and args.kind != "scaling":
            raise VlmFixError(f"--{option} has no effect on bench {args.kind}: it is for bench scaling; leave it out.")
    if args.kind == "serve":
        _serve(args)
        return
    if args.kind == "scaling":
        _scaling(args)
        return
    if args.kind == "draft":
        _draft(args)
        return
    if args.kind == "peers":
        _peers(args)
        return
    try:
        keep = tuple(float(part) for part in (args.keep or "192,64").split(","))
    except ValueError:
        raise VlmFixError(f"--keep {args.keep!r} is not a list of counts or shares such as 192,64.") from None
    with ticking(f"bench {args.kind}") as tick:
        results = bench.run(
            args.kind,
            args.shape,
            ["+".join(stack) for stack in split_methods(args.method)],
            device=args.device,
            dtype=args.dtype,
            new_tokens=args.new_tokens,
            rounds=args.rounds,
            keep=keep,
            seed=args.seed,
            tick=tick,
        )
    if args.output:
        bench.write(results, Path(args.output))
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        console().print(bench.table(results))


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


def _scaling(args: argparse.Namespace) -> None:
    """How the cost of methods grows with the sizes of a prompt."""
    from vlm_fix.eval import bench
    from vlm_fix.eval.bench import scaling
    from vlm_fix.eval.run.loading import check_device
    from vlm_fix.registry import parse, split_methods

    specs = ["+".join(stack) for stack in split_methods(args.method or "pai,vcd,hiprune:keep=32")]
    for spec in specs:
        parse(spec.split("+"))
    sizes = _sizes(args.sizes, scaling.SIZES) if args.sizes else None
    if args.figure:
        check_place(args.figure)
        if Path(args.figure).suffix not in (".svg", ".png", ".pdf"):
            raise VlmFixError(f"--figure {args.figure!r} must end in .svg, .png or .pdf.")
    check_device(args.device)
    device, dtype = _where(args)
    with ticking("bench scaling") as tick:
        results = scaling.run(
            specs,
            args.shape,
            sizes=sizes,
            device=device,
            dtype=dtype,
            new_tokens=args.new_tokens,
            rounds=args.rounds,
            seed=args.seed,
            tick=tick,
        )
    if args.output:
        bench.write(results, Path(args.output))
    if args.figure:
        scaling.figure(results, Path(args.figure))
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        console().print(scaling.table(results))


def _peers(args: argparse.Namespace) -> None:
    """Methods beside other people's code."""
    from vlm_fix.eval import bench
    from vlm_fix.eval.bench import peers
    from vlm_fix.eval.run.loading import check_device

    check_device(args.device)
    device, dtype = _where(args)
    with ticking("bench peers") as tick:
        results = peers.run(
            [name for name in args.method.split(",") if name],
            args.shape,
            device=device,
            dtype=dtype,
            new_tokens=args.new_tokens,
            rounds=args.rounds,
            seed=args.seed,
            tick=tick,
        )
    if args.output:
        bench.write(results, Path(args.output))
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        console().print(peers.table(results))


def _where(args: argparse.Namespace) -> tuple[str, str]:
    """The device and the data type that --device and --dtype ask for."""
    import torch

    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = auto if args.device == "auto" else args.device
    dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return device, dtype if args.dtype == "auto" else args.dtype


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


def _serve(args: argparse.Namespace) -> None:
    """Methods inside vLLM."""
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        raise VlmFixError("vLLM is not installed: pip install 'vlm-fix[vllm]'.")
    from vlm_fix.eval import bench
    from vlm_fix.eval.bench import serving
    from vlm_fix.registry import split_methods

    specs = ["+".join(stack) for stack in split_methods(args.method)]
    try:
        concurrent = [int(part) for part in args.concurrent.split(",")]
    except ValueError:
        concurrent = [0]
    if min(concurrent) < 1:
        raise VlmFixError(f"--concurrent {args.concurrent!r} is not a list of numbers of requests such as 1,8,32.")
    with ticking("bench serve") as tick:
        results = serving.run(
            specs,
            args.model,
            args.new_tokens,
            args.rounds,
            tick,
            concurrent,
            args.questions or 1,
        )
    if args.output:
        bench.write(results, Path(args.output))
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        console().print(serving.table(results))


def _draft(args: argparse.Namespace) -> None:
    """A model that drafts for itself."""
    from vlm_fix.eval import bench
    from vlm_fix.eval.bench import drafting
    from vlm_fix.registry import split_methods

    specs = ["+".join(stack) for stack in split_methods(args.method)]
    with ticking("bench draft") as tick:
        results = drafting.run(specs, args.model, args.new_tokens, args.rounds, args.device, args.dtype, tick)
    if args.output:
        bench.write(results, Path(args.output))
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        console().print(drafting.table(results))

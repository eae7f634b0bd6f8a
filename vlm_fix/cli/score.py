"""vlm-fix score: score answers or captions that you have."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers.benchmark import Benchmark
from vlm_fix.eval.scorers.registry import BENCHMARKS

from . import doubts
from .common import add, add_json
from .compare import add_common, show

EXAMPLES = """examples:
  vlm-fix score pope answers.jsonl                         POPE's own questions about COCO, one split or all three
  vlm-fix score pope coco_pope_random.json answers.jsonl --scorer vcd
  vlm-fix score chair captions.jsonl --variant nltk --json"""


def add_to(commands: Any) -> None:
    group = add(commands, "score", "score answers or captions that you have", epilog=EXAMPLES)
    kinds = group.add_subparsers(metavar="BENCHMARK", required=True)
    for benchmark in BENCHMARKS.values():
        parser = add(kinds, benchmark.name, benchmark.score_what, functools.partial(_score, benchmark))
        for argument in benchmark.arguments:
            parser.add_argument(argument.name, **argument.options)
        parser.add_argument("--against", metavar="BASE", help="a baseline's answers: compare with them, in one verdict")
        add_common(parser)
        add_json(parser)


def _score(benchmark: Benchmark, args: argparse.Namespace) -> None:
    told = functools.partial(print, file=sys.stderr)
    given = {a.dest: getattr(args, a.dest) for a in benchmark.arguments}
    if args.against:
        new = given.pop(benchmark.answers)
        show(benchmark, args.against, [new], given, args)
        return
    if args.common or args.frontier:
        name = "--common" if args.common else "--frontier"
        raise VlmFixError(f"{name} has no effect without --against BASE: leave it out.")
    found = benchmark.score_files(**given, tell=told)
    doubts.tell(found, benchmark)
    if not isinstance(found, dict):
        _print(args, benchmark.title, found)
    elif args.json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        _print_parts(benchmark.title, found)


def _print(args: argparse.Namespace, title: str, result: Any) -> None:
    """Print the figures of a result; --json prints its rows as well."""
    import dataclasses

    title = "RePOPE" if getattr(result, "labels", "") == "repope" else title
    if args.json:
        print(json.dumps(dataclasses.asdict(result) | result.to_dict(), indent=2, default=str))
        return
    for name, value in result.to_dict().items():
        if isinstance(value, float):
            print(f"{title}  {name:<20} {value:.5f}")
        elif value is None:
            print(f"{title}  {name:<20} -")
        elif isinstance(value, int | str):
            print(f"{title}  {name:<20} {value}")
    if getattr(result, "repope", None):
        print()
        _print(args, title, result.repope)


def _print_parts(title: str, found: dict[str, Any]) -> None:
    """Print the figures of a benchmark's parts, then those of the whole."""
    for part, figures in found.items():
        for name, value in figures.items() if isinstance(figures, dict) else ():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {figure}" for key, figure in value.items())
            text = f"{value:.5f}" if isinstance(value, float) else "-" if value is None else value
            print(f"{title}  {part:<22} {name:<12} {text}")
    for name, value in found.items():
        if not isinstance(value, dict):
            print(f"{title}  {name:<35} {value:.2f}")
